"""Before and after the work: dry runs, checks of the result, rotary changes, text from datasets."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jobs_helpers import flags, run
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, save_tokenizer

from exl3.data.builtin import builtin_texts
from exl3.data.rows import TextSource, calibration_rows, text_source_rows
from exl3.data.tokenizer import load_tokenizer
from exl3.errors import UserError
from exl3.evaluate.metrics import Scores
from exl3.jobs import estimate as estimates
from exl3.jobs.check import complaint
from exl3.jobs.output_hessians import output_hessian_bytes
from exl3.model.rope import Rope, with_rope
from exl3.model.streamed import StreamedModel

CONVERT = Path(__file__).resolve().parents[1] / "convert.py"
SIZES = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 300}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", folder, num_hidden_layers=2, **SIZES)
    save_tokenizer(folder)
    return folder


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def dry(text):
    """The sizes a dry run prints, in bytes."""
    unit = {"MiB": 2**20, "GiB": 2**30}
    found = re.findall(r"^(\w+) +([\d.,]+) ([MG]iB)", text, re.M)
    return {name: float(number.replace(",", "")) * unit[u] for name, number, u in found}


def peak_of(command):
    """Bytes of memory a command takes. Asked by a small process: a child has as its own peak what
    its parent had when it was started."""
    program = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    asked = [sys.executable, "-c", program, *command]
    return 1024 * int(subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.mark.slow
def test_dry_run_foretells_sizes_and_memory(tmp_path):
    save_tiny(
        "llama", tmp_path / "model", num_hidden_layers=2, hidden_size=512, intermediate_size=1024,
        vocab_size=4096, dtype=torch.float16,
    )  # fmt: skip
    save_tokenizer(tmp_path / "model")
    job = flags(tmp_path / "model", tmp_path / "out", tmp_path / "work", "3", **{"-cpi": 0})
    told = subprocess.run(
        [sys.executable, CONVERT, *job, "--dry_run"], capture_output=True, text=True, check=True
    ).stdout
    assert not (tmp_path / "work").exists()
    peak = peak_of([sys.executable, str(CONVERT), *job])
    sizes = dry(told)
    rounding = 0.05 * 2**20  # of a printed MiB
    out = folder_bytes(tmp_path / "out")
    assert sizes["output"] == pytest.approx(out, abs=0.005 * out + rounding)
    # At its largest: while the states are saved anew. The gradients and what was kept of them are
    # gone by now.
    kept = output_hessian_bytes(StreamedModel(tmp_path / "model"), range(2), 6 * 64)
    gradients = 2 * 2 * 6 * 64 * 512 * 4 + kept
    work = folder_bytes(tmp_path / "work") + gradients
    states = (tmp_path / "work" / "states.safetensors").stat().st_size
    assert sizes["work"] == pytest.approx(work + states, abs=0.005 * (work + states) + rounding)
    assert sizes["memory"] == pytest.approx(peak, rel=0.25)


def test_dry_run_in_short(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("-i", str(tiny), "-b", "2.5", "-cc", "64", "--dry_run")
    text = capsys.readouterr().out
    assert "2.500 bits per weight, 327,680 weights" in text
    assert set(dry(text)) == {"output", "work", "memory"}
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_any_work(tiny, tmp_path, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr(estimates.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(UserError, match=r"has 0\.0 MiB free, the job needs \d\.\d MiB; make room"):
        run(*flags(tiny, tmp_path / "out", tmp_path / "work"))
    assert list((tmp_path / "work" / "layers").iterdir()) == []


def test_rows_longer_than_the_context_are_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="-cc 65: the model's context is 64 tokens"):
        run(*flags(tiny, tmp_path / "out", tmp_path / "work", **{"-cc": 65}))


def test_the_check_at_the_end(tiny, tmp_path, capsys):
    job = flags(tiny, tmp_path / "out", tmp_path / "work", "8", **{"-hb": 8, "--check_rows": 2})
    run(*job)
    text = capsys.readouterr().out
    assert "On 2 held-out rows of 64 tokens" in text
    assert "WARNING" not in text
    told = json.loads((tmp_path / "work" / "check.json").read_text())
    assert 0 < told["kld"] < 0.05
    assert told["perplexity"]["quant"] == pytest.approx(told["perplexity"]["original"], rel=0.05)
    run(*job)
    assert "held-out" not in capsys.readouterr().out  # it is known already


def test_the_check_complains_where_it_should():
    def scores(nll, kld=0.1):
        return Scores(kld_sum=kld, positions=1, nll_sum=nll, tokens=1)

    assert complaint(scores(2.0), scores(2.1)) is None
    assert "2.7 times the original's" in complaint(scores(2.0), scores(3.0))
    assert "not finite" in complaint(scores(2.0), scores(float("nan")))
    assert "not finite" in complaint(scores(2.0), scores(2.0, kld=float("inf")))
    assert "source may be damaged" in complaint(scores(float("nan")), scores(2.0))


def test_an_unquantized_head(tiny, tmp_path):
    run(*flags(tiny, tmp_path / "out", tmp_path / "work", "2", **{"-hb": 16}))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(tiny / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], source["lm_head.weight"].half())
    assert "lm_head.trellis" not in stored
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["head_bits"] == 16


def test_hq_gives_attention_one_bit_more(tiny, tmp_path):
    job = flags(tiny, tmp_path / "out", tmp_path / "work", "2", **{"-hq": ""})[:-1]
    run(*job, "--uniform")
    storage = json.loads((tmp_path / "out" / "quantization_config.json").read_text())
    bits = {k: m.get("bits_per_weight") for k, m in storage["tensor_storage"].items()}
    assert all(b == 3 for k, b in bits.items() if "self_attn" in k)
    assert all(b == 2 for k, b in bits.items() if "mlp" in k)


def test_one_scale_for_all_outputs_is_recorded(tiny, tmp_path):
    run(*flags(tiny, tmp_path / "out", tmp_path / "work", "2", **{"--out_scales": "never"}))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    svh = stored["model.layers.0.mlp.up_proj.svh"][:192]
    assert svh.abs().unique().numel() == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["out_scales"] == "never"


def test_rotary_changes_are_applied_and_written(tiny, tmp_path):
    run(*flags(tiny, tmp_path / "out", tmp_path / "work", "2", **{"-ra": 2, "-rs": 4}))
    head = 128 // 4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rope = config["rope_parameters"]
    assert rope["rope_theta"] == pytest.approx(10000 * 2 ** (head / (head - 2)))
    assert rope["rope_type"] == "linear"
    assert rope["factor"] == 4
    changed = StreamedModel(tiny, rope=Rope(2, 4), dtype=torch.float32)
    plain = StreamedModel(tiny, dtype=torch.float32)
    ids = torch.arange(20)[None]
    outputs = []
    for model in (changed, plain):
        model.load_embedding()
        model.load_block(0)
        outputs.append(model.run_block(0, ids, None))
    assert not torch.allclose(*outputs)
    # Another spelling of the same job, which the old spelling in a config must give, too.
    with pytest.raises(UserError, match="different job"):
        run("-w", str(tmp_path / "work"), "-r", "-rs", "2")


def test_text_from_a_dataset_folder(tiny, tmp_path):
    (tmp_path / "data").mkdir()
    texts = [f"the quick brown fox {i} " * 30 for i in range(20)]
    table = pa.table({"id": list(range(20)), "body": texts})
    pq.write_table(table, tmp_path / "data" / "train-00000.parquet")
    tokenizer = load_tokenizer(tiny)
    source = TextSource(str(tmp_path / "data"))
    rows = text_source_rows(tokenizer, source, 4, 32)
    assert rows.shape == (4, 32)
    assert "quick" in tokenizer.decode(rows[0])
    with pytest.raises(UserError, match=r"nope is not there; its columns of strings are body"):
        text_source_rows(tokenizer, TextSource(source.place, column="nope"), 4, 32)
    with pytest.raises(UserError, match="no dataset of that name could be loaded"):
        text_source_rows(tokenizer, TextSource(source.place, split="missing"), 4, 32)


def test_a_stride_of_rows(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox and the lazy dog " * 20)
    tokenizer = load_tokenizer(tiny)
    whole = text_source_rows(tokenizer, TextSource(str(tmp_path / "a.txt")), 1, 60)[0]
    rows = text_source_rows(tokenizer, TextSource(str(tmp_path / "a.txt"), stride=5), 6, 16)
    assert all(torch.equal(row, whole[5 * i : 5 * i + 16]) for i, row in enumerate(rows))


def test_held_out_text_is_never_in_calibration_rows(tiny):
    tokenizer = load_tokenizer(tiny)
    rows = calibration_rows(tokenizer, 40, 256, vocab_size=300)
    calibration = "\n".join(tokenizer.decode(row) for row in rows)
    for _, text in builtin_texts("prose", held_out=True):
        lines = [line for line in text.splitlines() if len(line) > 60]
        assert not any(line in calibration for line in lines[:3])


def test_a_damaged_unquantized_tensor_is_told(tiny, tmp_path):
    save_tiny("llama", tmp_path / "model", num_hidden_layers=2, **SIZES)
    save_tokenizer(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][7, 3] = 1e9
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight has values up to 1e\+09"):
        run(*flags(tmp_path / "model", tmp_path / "out", tmp_path / "work"))
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "work" / "layers").iterdir()) == []  # said before any work


def test_another_scaling_keeps_its_other_numbers():
    raw = {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0}}
    changed = {"rope_theta": 20000.0, "rope_type": "llama3", "factor": 8.0}
    assert with_rope(raw, changed) == {
        "rope_theta": 20000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
        },
    }


def test_rotary_embeddings_of_another_kind_are_not_taken_over():
    theirs = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    layered = {"full_attention": {"rope_theta": 10000.0, "rope_type": "default"}}
    for ours, like in ((layered, theirs), (theirs, layered), (None, theirs)):
        with pytest.raises(UserError, match="are of another kind than the original's"):
            Rope(like=like).parameters(SimpleNamespace(rope_parameters=ours))
    assert Rope(like=layered).parameters(SimpleNamespace(rope_parameters=layered)) is None


def test_another_folder_of_the_partial_name_stays(tiny, tmp_path):
    mine = tmp_path / "out.exl3-partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else; move it away"):
        run(*flags(tiny, tmp_path / "out", tmp_path / "work"))
    assert (mine / "thesis.txt").read_text() == "mine"


def test_rows_of_a_job_that_never_began_are_not_used(tiny, tmp_path):
    job = flags(tiny, tmp_path / "out", tmp_path / "work", **{"-hb": 16})
    run(*job)
    work = tmp_path / "work"
    (work / "identity.json").unlink()  # as if killed right after the rows were saved
    run(*flags(tiny, tmp_path / "new", work, **{"-hb": 16, "-cr": 3}))
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"]["calibration"]["rows"] == 3


def test_tokens_that_the_model_lacks_are_told(tmp_path, capsys):
    save_tiny("llama", tmp_path / "model", num_hidden_layers=1, **{**SIZES, "vocab_size": 258})
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("0123456789 " * 100)
    job = flags(tmp_path / "model", tmp_path / "out", tmp_path / "work", "2")
    run(*job, "-c", str(tmp_path / "text.txt"), "--check_rows", "2")
    assert "The quant is not compared with the original" in capsys.readouterr().out
    assert (tmp_path / "out").is_dir()
