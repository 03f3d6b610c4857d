"""Gradients of streamed models against autograd on the stock model, and the files between."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import BLOCKS, HIDDEN, VOCAB, save_tiny, tiny_rows
from torch import nn
from transformers import AutoModelForCausalLM

from exl3 import parallel
from exl3.errors import JobError, UserError
from exl3.jobs import boundaries as boundaries_module
from exl3.jobs import inputs, output_hessians, streams
from exl3.jobs.boundaries import (
    GRADIENT,
    STATE,
    Boundaries,
    boundary_bytes,
    boundary_gradients,
    boundary_work,
    identity,
)
from exl3.jobs.output_hessians import (
    OutputHessian,
    all_saved,
    block_output_hessians,
    load_output_hessians,
    output_hessian_bytes,
    save_output_hessians,
    with_hessians,
)
from exl3.jobs.plan import gradient_rows
from exl3.jobs.sensitivities import Sensitivities
from exl3.jobs.settings import Settings
from exl3.jobs.survey import Survey
from exl3.model.capture import capture_inputs
from exl3.model.gradients import OutputGradients, sample_targets, token_uniforms
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress

SEED = 7
ROWS, COLS = 5, 24


@pytest.fixture(autouse=True)
def one_thread():
    with parallel.one_thread_per_op():
        yield


@pytest.fixture
def small_batches(monkeypatch):
    """Several batches of two rows, and tail pieces that do not divide a row."""
    monkeypatch.setattr(streams, "BATCH_TOKENS", 2 * COLS)
    monkeypatch.setattr(boundaries_module, "TAIL_TOKENS", 7)


def stock_gradients(folder: Path, rows: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Autograd's gradients at the outputs of a stock model's linears, (rows, cols, out)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    added: dict[str, torch.Tensor] = {}

    def add_nothing(name: str):
        def hook(module, args, output):
            added[name] = torch.zeros_like(output, requires_grad=True)
            return output + added[name]

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(add_nothing(name))
    sampled_loss(model(rows).logits, seed).backward()
    return {name: zeros.grad for name, zeros in added.items()}


def sampled_loss(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Cross-entropy of logits (rows, cols, vocab) on targets drawn from them, summed."""
    rows, cols, _ = logits.shape
    uniforms = torch.cat([token_uniforms(seed, row, cols) for row in range(rows)])
    flat = logits.flatten(0, 1)
    targets = sample_targets(flat.detach().softmax(-1), uniforms)
    return nn.functional.cross_entropy(flat, targets, reduction="sum")


def fill(folder: Path, model: StreamedModel, rows: torch.Tensor, seed: int = SEED) -> Boundaries:
    boundaries = Boundaries(folder, model, rows, seed)
    model.load_embedding()
    boundary_gradients(model, boundaries)
    return boundaries


def all_hessians(model: StreamedModel, boundaries: Boundaries) -> dict[str, OutputHessian]:
    found = {}
    for i in range(model.num_blocks):
        model.load_block(i)
        found |= block_output_hessians(model, i, model.block_linears(i), boundaries)
        model.free_block(i)
    return found


def all_gradients(model: StreamedModel, boundaries: Boundaries) -> dict[str, torch.Tensor]:
    """Gradients at the outputs of all blocks' linears, (tokens, out)."""
    found, rows = {}, slice(0, len(boundaries.rows))
    for i in range(model.num_blocks):
        model.load_block(i)
        with OutputGradients(model, i, model.block_linears(i)) as gradients:
            state, gradient = boundaries.state(i, rows), boundaries.load(GRADIENT, i)
            found |= gradients.run(boundaries.rows, state, gradient).gradients
        model.free_block(i)
    return found


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.norm() > 0
    return float((ours - theirs).norm() / theirs.norm())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    path.unlink()
    save_file(tensors, path, metadata)


def metadata_of(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


# -- Against autograd on the stock model ---------------------------------------------------------


# olmo overwrites what its projections give (clamp_), gemma2 has softcaps and local attention,
# qwen3 norms q and k, granite scales everything, gpt_neox adds attention and MLP side by side.
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "olmo", "granite", "gpt_neox"])
def test_gradients_and_hessians_are_those_of_autograd(tmp_path, small_batches, kind):
    save_tiny(kind, tmp_path / "model")
    rows = tiny_rows(ROWS, COLS)
    theirs = stock_gradients(tmp_path / "model", rows, SEED)
    model = StreamedModel(tmp_path / "model")
    boundaries = fill(tmp_path / "boundaries", model, rows)

    gradients = all_gradients(model, boundaries)
    hessians = all_hessians(model, boundaries)

    assert len(gradients) >= 4 * BLOCKS
    assert hessians.keys() == gradients.keys()
    for key, ours in gradients.items():
        d = theirs[key].flatten(0, 1)
        assert difference(ours, d) < 1e-5, key
        assert hessians[key].tokens == ROWS * COLS
        assert difference(hessians[key].mean(), d.T @ d / len(d)) < 1e-5, key


def test_a_tied_head(tmp_path):
    save_tiny("llama", tmp_path / "model", tied=True)
    rows = tiny_rows(2, COLS)
    theirs = stock_gradients(tmp_path / "model", rows, SEED)
    model = StreamedModel(tmp_path / "model")
    for key, ours in all_gradients(model, fill(tmp_path / "boundaries", model, rows)).items():
        assert difference(ours, theirs[key].flatten(0, 1)) < 1e-5, key


def test_parts_of_a_fused_linear_have_their_share_of_its_gradient(tmp_path):
    save_tiny("phi3", tmp_path / "model")
    rows = tiny_rows(2, COLS)
    theirs = stock_gradients(tmp_path / "model", rows, SEED)
    model = StreamedModel(tmp_path / "model")
    ours = all_gradients(model, fill(tmp_path / "boundaries", model, rows))
    for i in range(BLOCKS):
        around = f"model.layers.{i}.self_attn."
        qkv = torch.cat([ours[f"{around}{part}_proj"] for part in "qkv"], dim=-1)
        assert difference(qkv, theirs[f"{around}qkv_proj"].flatten(0, 1)) < 1e-5


def test_eager_attention(tmp_path):
    save_tiny("mistral", tmp_path / "model")
    rows = tiny_rows(2, COLS)
    theirs = stock_gradients(tmp_path / "model", rows, SEED)
    model = StreamedModel(tmp_path / "model", attn_implementation="eager")
    for key, ours in all_gradients(model, fill(tmp_path / "boundaries", model, rows)).items():
        assert difference(ours, theirs[key].flatten(0, 1)) < 1e-5, key


def test_runs_without_gradients_are_as_before(tmp_path):
    save_tiny("llama", tmp_path)
    model = StreamedModel(tmp_path)
    model.load_embedding()
    model.load_block(0)
    rows = tiny_rows(2, COLS)
    entered, output = model.block_graph(0, rows, None)
    assert output.requires_grad and entered.shape == output.shape == (2, COLS, HIDDEN)
    plain = model.run_block(0, rows, None)
    assert not plain.requires_grad
    assert torch.equal(plain, output.detach())


# -- Sampled targets -----------------------------------------------------------------------------


def test_targets_by_hand():
    probabilities = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).expand(6, 4)
    uniforms = torch.tensor([0.0, 0.2, 0.25, 0.7, 0.75, 1 - 2**-24])
    assert sample_targets(probabilities, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


def test_targets_are_as_frequent_as_they_are_likely():
    n = 40_000
    probabilities = torch.rand(VOCAB, generator=torch.Generator().manual_seed(3)) ** 4
    probabilities /= probabilities.sum()
    targets = sample_targets(probabilities.expand(n, VOCAB), token_uniforms(SEED, 0, n))
    found = torch.bincount(targets, minlength=VOCAB) / n
    errors = (found - probabilities).abs() / (probabilities * (1 - probabilities) / n).sqrt()
    assert errors.max() < 4.5
    assert errors.mean() < 1.1


def test_every_row_and_seed_draws_its_own_targets():
    draws = [token_uniforms(seed, row, 8).tolist() for seed in range(3) for row in range(3)]
    assert len({tuple(draw) for draw in draws}) == 9
    assert draws[0] == token_uniforms(0, 0, 8).tolist()


def test_a_rows_gradient_does_not_depend_on_the_rows_beside_it(tmp_path):
    save_tiny("qwen2", tmp_path / "model")
    rows = tiny_rows(ROWS, COLS)
    model = StreamedModel(tmp_path / "model")
    together = fill(tmp_path / "together", model, rows)
    alone = fill(tmp_path / "alone", model, rows[:1])
    first = slice(0, 1)
    for i in range(BLOCKS):
        assert difference(alone.load(GRADIENT, i), together.load(GRADIENT, i, first)) < 1e-5


# -- The same bytes ------------------------------------------------------------------------------


def test_any_number_of_threads_gives_the_same_bytes(tmp_path, small_batches, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    model = StreamedModel(tmp_path / "model")
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(parallel, "_THREADS", threads)
        folder = tmp_path / str(threads)
        boundaries = fill(folder, model, tiny_rows(ROWS, COLS))
        save_output_hessians(folder, all_hessians(model, boundaries), boundaries.identity)
        results.append(contents(folder))
    assert len(results[0]) == 2 * BLOCKS + 7 * BLOCKS
    assert results[0] == results[1]


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, small_batches, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    model = StreamedModel(tmp_path / "model")
    rows = tiny_rows(ROWS, COLS)
    fill(tmp_path / "whole", model, rows)
    write, left = boundaries_module.write_safetensors, [0]

    def write_until_killed(*args):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        write(*args)

    monkeypatch.setattr(boundaries_module, "write_safetensors", write_until_killed)
    for saves in range(2 * BLOCKS):
        folder = tmp_path / f"killed after {saves}"
        left[0] = saves
        with pytest.raises(KeyboardInterrupt):
            fill(folder, model, rows)
        assert len(contents(folder)) == saves
        left[0] = 2 * BLOCKS - saves  # what is there is not made again
        fill(folder, model, rows)
        assert contents(folder) == contents(tmp_path / "whole")


def test_progress_adds_up_anew_and_resumed(tmp_path):
    save_tiny("llama", tmp_path / "model")
    model = StreamedModel(tmp_path / "model")
    rows = tiny_rows(ROWS, COLS)
    model.load_embedding()
    for _ in range(2):
        progress = Progress(boundary_work(model, ROWS), "", quiet=True)
        boundary_gradients(model, Boundaries(tmp_path / "files", model, rows, SEED), progress)
        assert progress.done == pytest.approx(progress.total)


def test_sizes_are_those_foretold(tmp_path):
    save_tiny("llama", tmp_path / "model")
    model = StreamedModel(tmp_path / "model")
    boundaries = fill(tmp_path / "files", model, tiny_rows(ROWS, COLS))
    data = 2 * BLOCKS * ROWS * COLS * HIDDEN * 4
    assert boundary_bytes(model, ROWS, COLS) == data
    assert data < sum(map(len, contents(tmp_path / "files").values())) < data + 2 * BLOCKS * 1000

    save_output_hessians(tmp_path / "saved", all_hessians(model, boundaries), boundaries.identity)
    linears = {k: m for i in range(BLOCKS) for k, m in model.block_linears(i).items()}
    data = output_hessian_bytes(model, range(BLOCKS), ROWS * COLS)
    assert data < sum(map(len, contents(tmp_path / "saved").values())) < data + len(linears) * 1000


def test_neither_blocks_nor_hooks_stay(tmp_path):
    save_tiny("llama", tmp_path / "model")
    model = StreamedModel(tmp_path / "model")
    boundaries = fill(tmp_path / "files", model, tiny_rows(ROWS, COLS))
    assert all(m.weight.is_meta for i in range(BLOCKS) for m in model.block_linears(i).values())
    model.load_block(1)
    block_output_hessians(model, 1, model.block_linears(1), boundaries)
    assert not any(m._forward_hooks for m in model.block_linears(1).values())


# -- What enters no sum --------------------------------------------------------------------------


def test_a_linear_without_a_gradient_is_known_to_have_none(tmp_path):
    save_tiny("llama", tmp_path / "model")
    model = StreamedModel(tmp_path / "model")
    boundaries = fill(tmp_path / "files", model, tiny_rows(ROWS, COLS))
    module = model.load_block(0)
    aside = nn.Linear(HIDDEN, 3).requires_grad_(False)  # called, but of no consequence

    def call_aside(mlp, args):
        aside(args[0])

    module.mlp.register_forward_pre_hook(call_aside)
    linears = {**model.block_linears(0), "aside": aside, "unused": nn.Linear(2, 2)}
    found = block_output_hessians(model, 0, linears, boundaries)
    assert {key for key, seen in found.items() if not seen.tokens} == {"aside", "unused"}
    save_output_hessians(tmp_path / "saved", found, boundaries.identity)
    assert all_saved(tmp_path / "saved", linears)
    assert (
        load_output_hessians(tmp_path / "saved", linears, boundaries.identity)["aside"].tokens == 0
    )


def test_huge_linears_have_none(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(output_hessians, "MOST_OUTPUTS", 80)  # the MLP has 96
    model = StreamedModel(tmp_path / "model")
    linears = model.block_linears(0)
    assert not with_hessians(linears).keys() & {
        f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up")
    }
    boundaries = Boundaries(tmp_path / "files", model, tiny_rows(ROWS, COLS), SEED)
    known = Sensitivities(tmp_path, boundaries.identity, BLOCKS)
    model.load_embedding()
    boundary_gradients(model, boundaries, survey=Survey(known, ROWS * COLS, tmp_path / "saved"))
    saved = {path.stem for path in (tmp_path / "saved").glob("model.layers.0.*")}
    assert saved == with_hessians(linears).keys()
    assert known.complete and known.by_key()["model.layers.0.mlp.up_proj"] > 0


def test_of_experts_a_share_of_the_tokens_is_expected(tmp_path):
    save_tiny("mixtral", tmp_path / "model", num_local_experts=4)
    model = StreamedModel(tmp_path / "model")
    linears, experts = model.block_linears(0), model.expert_linears(0)
    tokens = 24  # fewer than any linear has outputs; an expert sees half of them
    total = sum(4 * m.out_features * (12 if k in experts else 24) for k, m in linears.items())
    assert output_hessian_bytes(model, [0], tokens) == total


@pytest.mark.parametrize(
    "kind, cols, given, rows, expected",
    [
        ("llama", 512, None, 100, 16),
        ("llama", 512, None, 9, 9),
        ("mixtral", 512, None, 100, 64),  # as many tokens as 16 rows of 2048 have
        ("mixtral", 1024, None, 100, 32),
        ("mixtral", 2048, None, 100, 16),
        ("mixtral", 8192, None, 100, 16),
        ("mixtral", 64, None, 100, 64),
        ("mixtral", 512, None, 40, 40),
        ("mixtral", 512, 5, 100, 5),
        ("llama", 512, 80, 100, 80),
    ],
)
def test_rows_that_go_back_through_the_original(tmp_path, kind, cols, given, rows, expected):
    sizes = {"num_local_experts": 4} if kind == "mixtral" else {}
    save_tiny(kind, tmp_path, **sizes)
    settings = Settings("/in", "/out", "/work", bits=2, cal_cols=cols, hessian_rows=given)
    assert gradient_rows(settings, StreamedModel(tmp_path), rows) == expected


def test_tokens_that_a_linear_does_not_see_do_not_count(tmp_path, small_batches):
    """A stand-in for an expert: every third token of a batch goes through it once more."""
    save_tiny("llama", tmp_path / "model")
    model = StreamedModel(tmp_path / "model")
    boundaries = fill(tmp_path / "files", model, tiny_rows(ROWS, COLS))
    module = model.load_block(1)
    expert = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)

    def route(mlp, args, output):
        output = output.clone()
        output[:, ::3] += expert(args[0][:, ::3])
        return output

    module.mlp.register_forward_hook(route)
    linears = {**model.block_linears(1), "expert": expert}
    found = block_output_hessians(model, 1, linears, boundaries)

    d = boundaries.load(GRADIENT, 1)[:, ::3].reshape(-1, HIDDEN)  # nothing stands behind it
    assert found["expert"].tokens == len(d) == ROWS * COLS // 3
    assert difference(found["expert"].mean(), d.T @ d / len(d)) < 1e-5


def test_experts_have_the_gradients_of_their_own_tokens(tmp_path):
    save_tiny("mixtral", tmp_path / "model", num_local_experts=6)
    rows = tiny_rows(2, COLS)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, experts_implementation="eager"
    )
    sampled_loss(stock(rows).logits, SEED).backward()
    model = StreamedModel(tmp_path / "model")
    boundaries = fill(tmp_path / "files", model, rows)
    i, state = 1, boundaries.load(STATE, 1)
    model.load_block(i)
    linears = model.block_linears(i)
    inputs = {
        name: group.inputs
        for group in capture_inputs(model, i, linears, rows, state)[1]
        for name in group.names
    }
    with OutputGradients(model, i, linears) as gradients:
        ds = gradients.run(rows, state, boundaries.load(GRADIENT, i)).gradients
    hessians = block_output_hessians(model, i, linears, boundaries)

    theirs = stock.model.layers[i].mlp.experts
    path = f"model.layers.{i}.block_sparse_moe.experts"
    tokens = 0
    for e in range(6):
        gate, up = theirs.gate_up_proj.grad[e].chunk(2)
        for name, weight in (("w1", gate), ("w3", up), ("w2", theirs.down_proj.grad[e])):
            key = f"{path}.{e}.{name}"
            d = ds[key]
            # How the weight's gradient comes about: a check of every d, in its token's place.
            assert difference(d.T @ inputs[key], weight) < 1e-5, key
            assert hessians[key].tokens == len(d)
            assert difference(hessians[key].mean(), d.T @ d / len(d)) < 1e-5, key
        tokens += len(d)
    assert tokens == 2 * rows.numel()
    assert "gradients" in {hessian.content().key for hessian in hessians.values()}


def test_few_tokens_are_kept_as_they_are_and_many_are_summed():
    d = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    hessian = OutputHessian(16)
    for tokens, kept in ((5, "gradients"), (15, "gradients"), (16, "mean"), (40, "mean")):
        hessian.add(d[hessian.tokens : tokens])
        assert hessian.tokens == tokens
        assert hessian.content().key == kept
        mean = hessian.mean()
        assert torch.equal(mean, mean.T)
        assert difference(mean, d[:tokens].T @ d[:tokens] / tokens) < 1e-6


# -- Saved Hessians ------------------------------------------------------------------------------


def test_saved_hessians_come_back_bit_for_bit(tmp_path):
    save_tiny("llama", tmp_path / "model")
    model = StreamedModel(tmp_path / "model")
    rows = tiny_rows(4, 20)  # 80 tokens: more than hidden, fewer than the MLP's 96
    boundaries = fill(tmp_path / "files", model, rows)
    model.load_block(0)
    linears = model.block_linears(0)
    hessians = block_output_hessians(model, 0, linears, boundaries)
    assert {h.content().key for h in hessians.values()} == {"mean", "gradients"}

    del hessians["model.layers.0.self_attn.q_proj"]
    save_output_hessians(tmp_path / "saved", hessians, boundaries.identity)
    before = contents(tmp_path / "saved")
    save_output_hessians(tmp_path / "saved", hessians, boundaries.identity)
    assert contents(tmp_path / "saved") == before
    loaded = load_output_hessians(tmp_path / "saved", linears, boundaries.identity)

    assert loaded.keys() == hessians.keys()
    for key, hessian in hessians.items():
        assert loaded[key].tokens == hessian.tokens == 80
        assert torch.equal(loaded[key].mean(), hessian.mean())


def test_files_of_something_else_are_refused(tmp_path):
    for name, seed in (("model", 0), ("other", 1)):
        save_tiny("llama", tmp_path / name, seed=seed)
    model, other = StreamedModel(tmp_path / "model"), StreamedModel(tmp_path / "other")
    rows = tiny_rows(2, COLS)
    boundaries = fill(tmp_path / "files", model, rows)
    for wrong, its_rows, seed, what in (
        (other, rows, SEED, "model"),
        (model, tiny_rows(2, COLS, seed=9), SEED, "rows"),
        (model, rows, SEED + 1, "seed"),
    ):
        with pytest.raises(UserError, match=f"state.1.safetensors was made with another {what};"):
            fill(tmp_path / "files", wrong, its_rows, seed)

    model.load_block(0)
    linears = model.block_linears(0)
    hessians = block_output_hessians(model, 0, linears, boundaries)
    save_output_hessians(tmp_path / "saved", hessians, boundaries.identity)
    with pytest.raises(UserError, match=r"q_proj.safetensors was made with another model;"):
        load_output_hessians(tmp_path / "saved", linears, identity(other, rows, SEED))
    with pytest.raises(UserError, match="was made with another seed;"):
        save_output_hessians(tmp_path / "saved", hessians, {**boundaries.identity, "seed": "0"})


def test_damaged_files_are_refused(tmp_path):
    save_tiny("llama", tmp_path / "model")
    model = StreamedModel(tmp_path / "model")
    boundaries = fill(tmp_path / "files", model, tiny_rows(2, COLS))
    model.load_block(0)
    linears = model.block_linears(0)
    hessians = block_output_hessians(model, 0, linears, boundaries)
    save_output_hessians(tmp_path / "saved", hessians, boundaries.identity)

    path = tmp_path / "saved" / "model.layers.0.self_attn.q_proj.safetensors"
    whole, metadata = load_file(path), metadata_of(path)
    rewrite(path, {"gradients": torch.zeros(3, 5)}, metadata)
    with pytest.raises(UserError, match=f"q_proj.safetensors is not the Hessian of {HIDDEN}"):
        load_output_hessians(tmp_path / "saved", linears, boundaries.identity)
    rewrite(path, whole, {**metadata, "tokens": "many"})
    with pytest.raises(UserError, match="is not the Hessian of"):
        load_output_hessians(tmp_path / "saved", linears, boundaries.identity)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"q_proj.safetensors cannot be read"):
        load_output_hessians(tmp_path / "saved", linears, boundaries.identity)

    path = boundaries.path(STATE, 1)
    metadata = metadata_of(path)
    rewrite(path, {STATE: torch.zeros(2, COLS, HIDDEN + 1)}, metadata)
    with pytest.raises(UserError, match=r"state.1.safetensors has another shape"):
        fill(tmp_path / "files", model, boundaries.rows)
    path.write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match=r"state.1.safetensors cannot be read"):
        fill(tmp_path / "files", model, boundaries.rows)


def test_a_gradient_that_is_not_finite_ends_the_job(tmp_path):
    save_tiny("llama", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("inf")
    rewrite(path, tensors, {"format": "pt"})
    model = StreamedModel(tmp_path / "model")
    with pytest.raises(JobError, match=r"output of model\.layers\.2 is not finite"):
        fill(tmp_path / "files", model, tiny_rows(2, COLS))
    assert not any(name.startswith(GRADIENT) for name in contents(tmp_path / "files"))


# -- The head's ------------------------------------------------------------------------------------


def test_the_heads_is_known_without_sampling(tmp_path, monkeypatch):
    save_tiny("llama", tmp_path / "model", vocab_size=300)
    model, rows = StreamedModel(tmp_path / "model"), torch.randint(3, 300, (5, 80))
    entered = streams.Streams(rows, paired=False, original=torch.randn(5, 80, 64))
    model.load_embedding()
    model.load_tail()
    p = model.run_tail(rows[[0, 2, 4]], entered.original[[0, 2, 4]]).softmax(-1).flatten(0, 1)
    expected = (torch.diag(p.sum(0)) - p.T @ p) / len(p)
    whole = inputs.head_output_hessian(model, entered, 3)
    assert torch.allclose(whole, expected, atol=1e-6)
    monkeypatch.setattr(inputs, "WHOLE_HEAD", 299)
    blocks = inputs.head_output_hessian(model, entered, 3)
    padded = torch.zeros(384, 384)
    padded[:300, :300] = expected
    assert blocks.shape == (3, 128, 128)
    for i, block in enumerate(blocks):
        part = slice(128 * i, 128 * i + 128)
        assert torch.allclose(block, padded[part, part], atol=1e-6)
