"""Routers, which are not quantized, in a conversion: they make up for what is lost before them."""

import shutil
from pathlib import Path

import pytest
import torch
from jobs_helpers import flags, run
from safetensors.torch import load_file
from tiny_models import save_tiny, save_tokenizer, tiny_rows
from torch import nn

from exl3.jobs.block import Block
from exl3.jobs.inputs import DAMPING
from exl3.jobs.routers import correct_router, corrected_routers
from exl3.jobs.settings import forget_job
from exl3.jobs.streams import Streams
from exl3.jobs.workdir import WorkDir
from exl3.model.experts import is_router
from exl3.model.flow import Stage
from exl3.model.streamed import StreamedModel

EXPERTS = 4
GATE = "model.layers.{}.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    sizes = {"num_hidden_layers": 2, "num_local_experts": EXPERTS, "vocab_size": 300}
    save_tiny("mixtral", folder, **sizes)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    """A folder with a quant, `out`, and the work folder of its job; never to be touched."""
    base = tmp_path_factory.mktemp("converted")
    run(*flags(model, base / "out", base / "work"))
    return base


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def streams_apart(block: Block) -> Streams:
    """Two streams, the quantized model's a little off, as it is in front of a second block."""
    torch.manual_seed(0)
    rows = tiny_rows(24, 64)
    streams = Streams(rows, paired=True)
    streams.original = torch.randn(*rows.shape, 64)
    mixed = streams.original @ (torch.eye(64) + 0.1 * torch.randn(64, 64))
    streams.quantized = mixed + 0.1 * torch.randn(*rows.shape, 64)
    return streams


def entering(block: Block, states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What enters the router, by a hook of its own."""
    seen = []
    _, router = block.routers["mlp.experts"]
    hook = router.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block.model.run_block(1, rows, states)
    hook.remove()
    return seen[0].reshape(-1, 64)


def test_a_corrected_router_gives_the_originals_logits_as_far_as_it_can(model, tmp_path):
    source = StreamedModel(model, dtype=torch.float32)
    source.load_embedding()
    block = Block.load(source, 1)
    work = WorkDir(tmp_path / "work")
    work.path.mkdir()
    streams = streams_apart(block)
    original = block.routers["mlp.experts"][1].weight.data.clone()
    xf = entering(block, streams.original, streams.rows).double()
    xq = entering(block, streams.quantized, streams.rows).double()

    correct_router(block, Stage(("mlp.experts",), experts=True), streams, work)
    block.compute_quantized()
    made = block.routers["mlp.experts"][1].weight.data.clone()

    wanted = xf @ original.double().T
    lost = [float((wanted - xq @ w.double().T).square().sum()) for w in (original, made)]
    assert lost[1] < 0.75 * lost[0]
    # Ridge regression towards the original, believed as far as so many tokens are.
    n = len(xq)
    h = xq.T @ xq / n
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    step = torch.linalg.solve(h, xq.T @ (xf - xq) / n @ original.double().T)
    expected = original.double() + (n / (n + 64) * step).T
    assert torch.allclose(made.double(), expected, atol=2e-3 * float(expected.abs().max()))

    block.compute_original()
    assert torch.equal(block.routers["mlp.experts"][1].weight.data, original)
    assert torch.equal(corrected_routers(source, work)[GATE.format(1)].float(), made)
    assert list(corrected_routers(source, work)) == [GATE.format(1)]


def test_a_quant_has_the_corrected_routers_and_plain_ones_the_originals(model, converted, tmp_path):
    run(*flags(model, tmp_path / "out", tmp_path / "work"), "--no_correction", "--hessian", "input")
    source, made, plain = stored(model), stored(converted / "out"), stored(tmp_path / "out")
    work = WorkDir(converted / "work")
    for key in (GATE.format(0), GATE.format(1)):
        assert torch.equal(made[key], work.load_router(key))
        assert not torch.equal(made[key].float(), source[key].float())
        assert torch.equal(plain[key].float(), source[key].half().float())
    assert not (tmp_path / "work" / "routers").exists()


@pytest.mark.parametrize("lost", ["routers/*.layers.0.*", "layers/model.layers.1.*experts.2*"])
def test_what_is_lost_is_made_again_in_the_same_bytes(model, converted, tmp_path, lost):
    shutil.copytree(converted / "work", tmp_path / "work")
    gone = list((tmp_path / "work").glob(lost))
    assert gone
    for path in gone:
        path.unlink()
    run(*flags(model, tmp_path / "out", tmp_path / "work"))
    before, after = stored(converted / "out"), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_job_is_forgotten_with_them(converted, tmp_path):
    shutil.copytree(converted / "work", tmp_path / "work")
    assert WorkDir(tmp_path / "work").has_router(GATE.format(0))
    forget_job(tmp_path / "work")
    assert not WorkDir(tmp_path / "work").has_router(GATE.format(0))


def test_what_is_a_router():
    class Normed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, EXPERTS, bias=False)
            self.norm = nn.LayerNorm(8)

    assert is_router(nn.Linear(8, EXPERTS), EXPERTS)
    assert is_router(nn.Linear(8, EXPERTS, bias=False), EXPERTS)
    assert not is_router(nn.Linear(8, 1), EXPERTS)  # a gate of shared experts
    assert not is_router(Normed(), EXPERTS)  # what enters it is not what its weight meets
    assert not is_router(nn.Sequential(nn.Linear(8, EXPERTS)), EXPERTS)
    assert not is_router(nn.SiLU(), EXPERTS)
