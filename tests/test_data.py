"""Documents, rows of tokens, and the demo model trained on them."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exl3 import demo_model
from exl3.data import builtin
from exl3.data.builtin import builtin_texts, code_texts, prose_texts
from exl3.data.rows import calibration_rows, evaluation_rows, random_rows, row_kinds, rows_hash
from exl3.data.texts import read_texts
from exl3.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
STORY = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "


@pytest.fixture
def tokenizer():
    """Byte-level BPE of 300 tokens with BOS 0, EOS 1 and padding 2."""
    return demo_model.train_tokenizer([STORY], 300)


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- files


def test_txt_is_one_document_without_the_byte_order_mark(tmp_path):
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeffone\r\n\n\ntwo ü".encode())
    assert read_texts(path) == ["one\r\n\n\ntwo ü"]


def test_jsonl_takes_text_then_content_then_the_longest_string(tmp_path):
    lines = [
        {"id": "much longer than the text", "content": "no", "text": "a"},
        {"id": "much longer than the text", "content": "b"},
        {"title": "c", "body": "the longest", "n": 3},
        {"text": None, "content": "d"},
        "e\u2028f",
        {"text": " "},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    assert read_texts(str(path)) == ["a", "b", "the longest", "d", "e\u2028f"]


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('"a\\ud800b"')
    assert read_texts(path) == ["a?b"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"n": [1, 2], "title": ["x", "y"], "text": ["a", None]}, ["a"]),
        ({"title": ["x", "y"], "content": ["a", "b"]}, ["a", "b"]),
        ({"n": [1, 2], "title": ["x", "y"], "other": ["v", "w"]}, ["x", "y"]),
        ({"text": pa.array(["x", "y"], pa.large_string())}, ["x", "y"]),
    ],
)
def test_parquet_columns(tmp_path, columns, expected):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    assert read_texts(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text", r"a\.csv: cannot read this kind of file.*\.txt, \.jsonl, \.parquet"),
        ("gone.txt", None, r"gone\.txt: there is no such file"),
        ("a.txt", b"", r"a\.txt: the file holds no text"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: the file holds no text"),
        ("a.txt", b"ab\xff\xfec", r"a\.txt: not UTF-8 text \(byte 2\)"),
        ("a.txt", b"ab\0c", r"a\.txt: a binary file"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": oops}', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'"a"\n{"n": 1}', r"a\.jsonl, line 2: no text here"),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1: no text here"),
        ("a.parquet", b"", r"a\.parquet: not a readable parquet file"),
        ("a.parquet", b"PAR1 and nonsense PAR1", r"a\.parquet: not a readable parquet file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path / name)


def test_parquet_without_strings_names_its_columns(tmp_path):
    pq.write_table(pa.table({"n": [1], "m": [2.0]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column of strings \(columns: n, m\)"):
        read_texts(tmp_path / "a.parquet")


# --- built-in text

DIGEST = """
import hashlib, itertools
from exl3.data.builtin import builtin_texts
texts = [t for k in ("prose", "code") for t in itertools.islice(builtin_texts(k), 120)]
print(hashlib.sha256(repr(texts).encode()).hexdigest())
"""


def test_builtin_text_is_the_same_in_every_process(tmp_path):
    processes = []
    for seed, folder in (("1", tmp_path), ("2", REPOSITORY)):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", DIGEST]
        processes.append(
            subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE)
        )
    texts = [text for kind in ("prose", "code") for text in islice(builtin_texts(kind), 120)]
    here = hashlib.sha256(repr(texts).encode()).hexdigest()
    assert [process.communicate()[0].decode().strip() for process in processes] == [here] * 2


def test_held_out_text_is_apart_from_the_rest():
    for kind in ("prose", "code"):
        held_out = {text for _, text in builtin_texts(kind, held_out=True)}
        rest = {text for _, text in builtin_texts(kind)}
        assert 0.05 < len(held_out) / (len(held_out) + len(rest)) < 0.2
        assert len(held_out & rest) <= 2  # empty modules are all alike
    # What a module says of itself and its source are on the same side.
    code = "\n".join(text for _, text in builtin_texts("code"))
    docs = [text for _, text in builtin_texts("prose", held_out=True)]
    assert sum(text[:200] in code for text in docs) < len(docs) / 20


def test_builtin_text_is_documentation_and_code():
    topics = list(islice(prose_texts(), 20))
    assert sum("statement" in text for text in topics) > 5
    code = list(islice(code_texts(), 20))
    assert sum("import " in text for text in code) > 10
    assert len(set(topics + code)) == 40


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An empty standard library; returns a function that puts a file into it."""
    monkeypatch.setattr(builtin, "library_folder", lambda: tmp_path)

    def put(name, content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return put


MODULE = '"""Module."""\nraise SystemExit\nclass A:\n    "A class."\n    def f(x):\n        "f."\n'


def test_library_is_parsed_and_never_run(library):
    library("pydoc_data/topics.py", "# made\ntopics = {'if': ' The if.\\n', 'for': 'The for.'}")
    library("m.py", MODULE)
    texts = list(builtin_texts())
    assert sorted(texts[:2]) == [("prose", "The for."), ("prose", "The if.")]
    assert texts[2:] == [("prose", "Module.\n\nA class.\n\nf."), ("code", MODULE)]


def test_what_is_no_good_text_is_left_out(library):
    library("good.py", "x = 1\n")
    library("site-packages/a.py", "x = 2\n")
    library("unittest/test/a.py", "x = 3\n")
    library("__pycache__/a.py", "x = 4\n")
    library("_sysconfigdata_linux.py", "x = 5\n")
    library("latin.py", "x = 'ü'\n".encode("latin-1"))
    library("empty.py", "\n")
    library("notes.txt", "x = 6\n")
    library("broken.py", "def (\n")
    assert sorted(builtin_texts()) == [("code", "def (\n"), ("code", "x = 1\n")]
    assert sorted(builtin_texts("prose")) == sorted(builtin_texts("code"))


def test_no_library_names_the_way_out(library):
    with pytest.raises(UserError, match="-c FILE"):
        builtin_texts()


# --- rows


def test_file_rows_are_the_files_tokens_in_order(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(STORY) + "\n" + json.dumps(STORY * 2))
    first, second = plain_ids(tokenizer, STORY), plain_ids(tokenizer, STORY * 2)
    expected = [0, *first, 1, 0, *second]
    rows = calibration_rows(tokenizer, 100, 8, path)
    assert rows.dtype == torch.int64
    assert rows.shape == (len(expected) // 8, 8)
    assert rows.flatten().tolist() == expected[: rows.numel()]


def test_a_longer_file_is_sampled_evenly(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(STORY * 20)
    tokens = [0, *plain_ids(tokenizer, STORY * 20)]
    cols = len(tokens) // 10
    rows = calibration_rows(tokenizer, 4, cols, path)
    assert rows.tolist() == [tokens[at * cols :][:cols] for at in (0, 2, 5, 7)]


@pytest.mark.parametrize(
    ("bos", "eos", "before", "between"),
    [
        ("<s>", "</s>", [0], [1, 0]),
        ("</s>", "</s>", [1], [1]),
        (None, "</s>", [], [1]),
        ("<s>", None, [0], [0]),
        (None, None, [], []),
    ],
)
def test_bos_and_eos_only_where_there_are_some(tmp_path, tokenizer, bos, eos, before, between):
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    path = tmp_path / "a.jsonl"
    path.write_text('"x"\n"y"')
    x, y = plain_ids(tokenizer, "x"), plain_ids(tokenizer, "y")
    assert calibration_rows(tokenizer, 9, 1, path).flatten().tolist() == before + x + between + y


def test_a_file_of_less_than_a_row(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt: the text holds 2 tokens, less than one row of 3"):
        calibration_rows(tokenizer, 1, 3, tmp_path / "a.txt")


def test_tokens_the_model_lacks(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(STORY)
    biggest = max(plain_ids(tokenizer, STORY))
    calibration_rows(tokenizer, 1, 16, tmp_path / "a.txt", vocab_size=biggest + 1)
    with pytest.raises(UserError, match=f"token {biggest}, but there are only {biggest} embed"):
        calibration_rows(tokenizer, 99, 1, tmp_path / "a.txt", vocab_size=biggest)


def test_builtin_rows(tokenizer):
    rows = calibration_rows(tokenizer, 20, 64)
    assert rows.shape == (20, 64)
    assert rows.dtype == torch.int64
    assert rows.min() >= 0
    assert rows.max() < len(tokenizer)
    assert len({tuple(row) for row in rows.tolist()}) == 20
    assert torch.equal(rows, calibration_rows(tokenizer, 20, 64))
    assert torch.equal(rows[:7], calibration_rows(tokenizer, 7, 64))


def test_a_seed_changes_the_random_rows_alone(tokenizer):
    differs = calibration_rows(tokenizer, 20, 64) != calibration_rows(tokenizer, 20, 64, seed=1)
    kinds = list(row_kinds(20))
    assert [kinds.count(kind) for kind in ("prose", "code", "random")] == [11, 7, 2]
    assert differs.any(1).tolist() == [kind == "random" for kind in kinds]


def test_random_rows_hold_every_ordinary_token_and_no_other(tokenizer):
    row = next(random_rows(tokenizer, 8000, seed=0, limit=290))
    assert set(row.tolist()) == set(range(3, 290))


def test_short_builtin_text_starts_over_elsewhere(tokenizer, library):
    library("a.py", "abcdefg = 1234567\n")
    turn = [0, *plain_ids(tokenizer, "abcdefg = 1234567\n")]
    rows = calibration_rows(tokenizer, 20, 7)
    prose = [row for row, kind in zip(rows.tolist(), row_kinds(20), strict=True) if kind == "prose"]
    assert len(turn) == 19
    assert (
        list(chain.from_iterable(prose)) == (turn + turn[1:] + turn[2:] + turn[3:] + turn[4:])[:77]
    )


def test_tokenizers_do_not_complain_about_long_text(tmp_path, tokenizer, monkeypatch):
    seen = []
    logger = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(logger, "warning", lambda *message, **_: seen.append(message))
    tokenizer.model_max_length = 4
    (tmp_path / "a.txt").write_text(STORY)
    calibration_rows(tokenizer, 1, 8, tmp_path / "a.txt")
    evaluation_rows(tokenizer, STORY, 8)
    assert seen == []
    tokenizer(STORY)
    assert len(seen) == 1


def test_evaluation_rows(tokenizer):
    tokens = tokenizer(STORY)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    rows = evaluation_rows(tokenizer, STORY, 8)
    assert rows.tolist() == [tokens[at : at + 8] for at in range(0, len(tokens) - 8, 8)]
    rows = evaluation_rows(tokenizer, STORY, 8, rows=3, stride=2)
    assert rows.tolist() == [tokens[at : at + 8] for at in (0, 2, 4)]
    with pytest.raises(UserError, match=f"{len(tokens)} tokens, too few for rows of 1000"):
        evaluation_rows(tokenizer, STORY, 1000)


def test_rows_hash_is_of_ids_and_shape():
    rows = torch.arange(6).view(2, 3)
    ids = b"".join(number.to_bytes(8, "little") for number in range(6))
    assert rows_hash(rows) == hashlib.sha256(b"2,3:" + ids).hexdigest()
    assert rows_hash(rows) != rows_hash(rows.view(3, 2))


# --- the demo model


@pytest.fixture
def little_text(monkeypatch):
    """The demo model is trained on a few documents, in small batches and on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(demo_model, "BATCH", 2)
    monkeypatch.setattr(demo_model, "CONTEXT", 64)
    monkeypatch.setattr(
        demo_model,
        "builtin_texts",
        lambda kind, held_out=False: islice(builtin_texts(kind, held_out), 30),
    )
    yield
    torch.set_num_threads(threads)


def test_demo_model_loads_and_is_used_again(tmp_path, little_text, capsys):
    out = tmp_path / "new" / "demo"
    random_state = torch.get_rng_state()
    demo_model.make_demo_model(out, steps=3, progress=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [path.name for path in out.parent.iterdir()] == ["demo"]

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float16
    assert len(tokenizer) == model.config.vocab_size == 1024
    special = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    assert special == tuple(tokenizer.convert_tokens_to_ids(demo_model.SPECIAL)) == (0, 1, 2)
    heldout = next(prose_texts(held_out=True))
    assert tokenizer.decode(plain_ids(tokenizer, heldout)) == heldout
    everything = "\n".join(prose_texts(held_out=True))
    assert demo_model.perplexity(model.float(), tokenizer, everything) < 2 * 1024

    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert capsys.readouterr().out == ""
    demo_model.make_demo_model(out, steps=3)
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert "there already" in capsys.readouterr().out


def test_demo_training_is_reproducible_and_learns(little_text):
    texts = list(islice(prose_texts(), 10))
    tokenizer = demo_model.train_tokenizer(texts, 300)
    models = [demo_model.train_model(tokenizer, texts, 20, seed, False) for seed in (5, 5, 6)]
    first, same, other = (model.lm_head.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    untrained = demo_model.new_model(len(tokenizer)).eval()
    before, after = (demo_model.perplexity(m, tokenizer, texts[0]) for m in (untrained, models[0]))
    assert after < 0.7 * before


def test_orthogonal_sets_singular_values_near_one():
    matrix = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(demo_model.orthogonal(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_demo_model_leaves_other_files_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="something else is there"):
        demo_model.make_demo_model(tmp_path, steps=1)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_failed_demo_leaves_nothing(tmp_path, little_text, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(demo_model.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_model.make_demo_model(tmp_path / "demo", steps=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_demo_script_knows_its_flags():
    script = str(REPOSITORY / "util" / "make_demo_model.py")
    result = subprocess.run(
        [sys.executable, script, "--step", "1"], capture_output=True, text=True, cwd="/"
    )
    assert result.returncode == 2
    assert "required: -o" in result.stderr
