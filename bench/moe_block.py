#!/usr/bin/env python3
"""A block of MiniMax-M2.5's shapes through the job that converts it: memory and time.

    python bench/moe_block.py [--experts 4] [--rows 16] [--cols 512] [--bits 2] [--hessian kron]
                              [--max_memory GIB] [--folder DIR]

Random weights, written as a bf16 checkpoint of one block (7.3 GB) and a small vocabulary; with
--folder it stays there for the next run. Then all that `convert.py` does with a block: gradients,
load, flow, attention, experts' inputs, quantization, both streams moved on. Of the experts the
first few are quantized; the others' calibration and search are skipped: a stand-in of random codes
takes the place of their tensors, is decoded and computes in their stead (so the block's error means
nothing). Prints for each step the peak of resident memory (Linux), seconds, and CPU seconds; what
`choose_thrift` expects; and what all blocks with all experts would take.

GPU times are assumptions, none was measured: see GPU_SEARCH and GPU_MATMUL.
"""

import argparse
import contextlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from transformers import MiniMaxM2Config

from exl3 import parallel
from exl3.errors import UserError
from exl3.format.trellis import TILE
from exl3.jobs.blocks import convert_block
from exl3.jobs.boundaries import Boundaries, boundary_gradients
from exl3.jobs.job import Job
from exl3.jobs.plan import make_plan
from exl3.jobs.settings import Settings
from exl3.jobs.source import Source, open_model
from exl3.jobs.streams import Streams
from exl3.jobs.thrift import THRIFTS, Thrift, choose_thrift, memory_limit, peak_bytes
from exl3.jobs.workdir import WorkDir
from exl3.memory import GIB, Spill, resident_now
from exl3.model.checkpoint import SINGLE
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress
from exl3.tensor_files import LazyTensor, write_safetensors

BLOCKS, EXPERTS, ASKED = 62, 256, 8
HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 3072, 1536, 48, 8, 128
VOCAB = 512  # the real one has 200,064: a matter of embedding and head, not of blocks
PREFIX = "model.layers.0"
MOE = f"{PREFIX}.block_sparse_moe"
SHAPES = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}  # (out, in)
BLOCK_BYTES = 4 * 3 * EXPERTS * HIDDEN * INNER  # of the experts in float32, as they are computed

# Assumed, not measured. exllamav3's README: "a few hours" for 70B on an RTX 4090, taken as four.
GPU_SEARCH = 5e6  # weights/s
GPU_MATMUL = 40e12  # FLOP/s: half of what such a card does at best in TF32
DEFAULT_TOKENS = 250 * 2048

# -- The checkpoint --------------------------------------------------------------------------------


def tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Key and shape of everything in a model of one block."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for name, size in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        yield f"{PREFIX}.self_attn.{name}_proj.weight", (size * HEAD, HIDDEN)
    yield f"{PREFIX}.self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
    yield f"{PREFIX}.self_attn.q_norm.weight", (HEADS * HEAD,)
    yield f"{PREFIX}.self_attn.k_norm.weight", (KV_HEADS * HEAD,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{PREFIX}.{name}.weight", (HIDDEN,)
    yield f"{MOE}.gate.weight", (EXPERTS, HIDDEN)
    yield f"{MOE}.e_score_correction_bias", (EXPERTS,)
    for e in range(EXPERTS):
        for name, shape in SHAPES.items():
            yield f"{MOE}.experts.{e}.{name}.weight", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def random_tensor(number: int, key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """bf16: norms are one, a bias zero, the others Gaussian."""
    if len(shape) == 1:
        return torch.full(shape, float("norm" in key), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(number)
    return (0.02 * torch.randn(shape, generator=generator)).bfloat16()


def write_model(folder: Path) -> None:
    """Writes the checkpoint, unless it is there."""
    if (folder / SINGLE).exists():
        return
    size = BLOCK_BYTES // 2
    if shutil.disk_usage(folder).free < 1.1 * size:
        raise SystemExit(f"{folder} has no room for {size / 1e9:.1f} GB; give another --folder")
    config = MiniMaxM2Config(
        **{"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2},
        **{"num_hidden_layers": 1, "rotary_dim": HEAD // 2, "dtype": "bfloat16"},
    )
    config.architectures = ["MiniMaxM2ForCausalLM"]
    config.save_pretrained(folder)
    content = [
        LazyTensor(key, shape, torch.bfloat16, lambda n=n, k=key, s=shape: random_tensor(n, k, s))
        for n, (key, shape) in enumerate(tensors())
    ]
    write_safetensors(folder / SINGLE, content, {"format": "pt"})


# -- What is measured ------------------------------------------------------------------------------


@dataclass
class Step:
    seconds: float = 0.0
    cpu: float = 0.0  # seconds of all threads
    peak: int = 0  # bytes resident


class Steps(Progress):
    """Time and memory of each step that the job names."""

    def __init__(self) -> None:
        super().__init__(0, "", quiet=True)
        self.steps: dict[str, Step] = {}
        self._name = ""
        self.doing("")

    def doing(self, step: str) -> None:
        self._end()
        # All experts' steps of a kind are one.
        self._name = re.sub(r"experts\.\d+", "experts.E", step.removeprefix(f"{PREFIX}."))
        self._began = time.monotonic(), time.process_time()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    def _end(self) -> None:
        if self._name:
            print(f"... {self._name}: {peak() / GIB:.2f} GiB", file=sys.stderr)
            found = self.steps.setdefault(self._name, Step())
            found.seconds += time.monotonic() - self._began[0]
            found.cpu += time.process_time() - self._began[1]
            found.peak = max(found.peak, peak())

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.doing(name)
        yield
        self.doing("")

    def cpu(self, part: str) -> float:
        return sum(step.cpu for name, step in self.steps.items() if part in name)

    def table(self) -> str:
        lines = [f"{'step':<44} {'peak GiB':>9} {'seconds':>8} {'CPU s':>8}"]
        for name, step in self.steps.items():
            lines.append(f"{name:<44} {step.peak / GIB:9.2f} {step.seconds:8.1f} {step.cpu:8.1f}")
        return "\n".join(lines)


def peak() -> int:
    """Bytes resident at most since the peak began anew."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


class SampledWork(WorkDir):
    """A work folder in which, once the first few experts are done, all others seem to be."""

    def __init__(self, path: Path, sample: int, bits: int, steps: Steps) -> None:
        super().__init__(path)
        self.steps = steps
        self.sample = [f"{MOE}.experts.{e}.{name}" for e in range(sample) for name in SHAPES]
        self.stand_ins = {name: random_layer(shape, bits) for name, shape in SHAPES.items()}

    def has_layer(self, key: str) -> bool:
        if super().has_layer(key):
            return True
        return ".experts." in key and all(self.layer_path(k).is_file() for k in self.sample)

    def load_layer(self, key: str) -> dict[str, torch.Tensor]:
        if super().has_layer(key):
            return super().load_layer(key)
        self.steps.doing("the other experts: stand-ins decoded, outputs")
        return self.stand_ins[key.rpartition(".")[2]]


def random_layer(shape: tuple[int, int], bits: int) -> dict[str, torch.Tensor]:
    """A layer of random codes for (out, in) weights; a `3inst` one, which needs no marker."""
    columns, rows = shape
    codes = torch.randint(-(2**15), 2**15, (rows // TILE, columns // TILE, TILE * bits))
    return {
        "trellis": codes.short(),
        "suh": torch.full((rows,), 0.02, dtype=torch.float16),
        "svh": torch.ones(columns, dtype=torch.float16),
    }


# -- The run ---------------------------------------------------------------------------------------


def run(settings: Settings, experts: int, steps: Steps) -> None:
    """What `exl3.jobs.convert.convert` does up to the end of the first block."""
    with steps.within("opening the model"):
        model = open_model(settings, torch.device("cpu"))
        plan = make_plan(settings, model)
    thrift = tell_thrift(settings, model)
    work = SampledWork(Path(settings.work_dir), experts, int(settings.bits), steps)
    generator = torch.Generator().manual_seed(settings.seed)
    rows = torch.randint(VOCAB, (settings.cal_rows, settings.cal_cols), generator=generator)
    with work.locked():
        with steps.within("loading the embedding"):
            model.load_embedding()
        boundaries = None
        if settings.hessian == "kron":
            picked = rows[: settings.hessian_rows]
            boundaries = Boundaries(work.path / "gradients", model, picked, settings.seed)
            boundary_gradients(model, boundaries, steps)
        source = Source(model, rows, {}, "")
        job = Job(settings, work, source, plan, steps, thrift, boundaries)
        streams = Streams(rows, paired=job.corrects)
        if thrift.spill:
            streams.spill = Spill(work.path)
        convert_block(job, 0, streams)
        steps.doing("")


def tell_thrift(settings: Settings, model: StreamedModel) -> Thrift:
    """Prints what the job expects to take, and how it goes about it."""
    plan, before = make_plan(settings, model), resident_now()
    for thrift in THRIFTS:
        need = peak_bytes(settings, model, plan, settings.cal_rows, thrift)
        print(f"expected: {(before + need) / GIB:.2f} GiB with {thrift}")
    thrift = choose_thrift(settings, model, plan, settings.cal_rows)
    print(f"chosen for {memory_limit(settings) / GIB:.1f} GiB: {thrift}")
    return thrift


# -- All blocks ------------------------------------------------------------------------------------


def extrapolate(steps: Steps, experts: int, tokens: int) -> str:
    """What all blocks would take, in words, from CPU seconds of this one."""
    counted = {n: s.cpu for n, s in steps.steps.items() if not n.startswith(("the other", "open"))}
    one = {n: cpu for n, cpu in counted.items() if "experts.E" in n}  # of the sampled experts
    once = {n: cpu for n, cpu in counted.items() if n not in one}
    searches = [sum(cpu for n, cpu in part.items() if is_search(n)) for part in (once, one)]
    others = [sum(part.values()) - s for part, s in zip((once, one), searches, strict=True)]
    times = EXPERTS / experts
    search, by_tokens = (a + times * b for a, b in (searches, others))
    lines = [
        "CPU seconds of a block with all experts:",
        f"  search    {search:,.0f} = {searches[0]:.1f} (attention) "
        f"+ {EXPERTS}/{experts} x {searches[1]:.1f} (sampled experts)",
        f"  by tokens {by_tokens:,.0f} = {others[0]:.1f} (load, gradients, attention, streams) "
        f"+ {EXPERTS}/{experts} x {others[1]:.1f} (sampled experts' calibration)",
        f"{BLOCKS} blocks: {BLOCKS} x (search + by tokens x tokens / {tokens:,}) / cores",
    ]
    for some in (tokens, DEFAULT_TOKENS):
        days = BLOCKS * (search + by_tokens * some / tokens) / 86400
        lines.append(f"  {some:,} tokens: {days:.1f} days on one core, {days / 2:.1f} on two")
    return "\n".join([*lines, gpu_estimate(tokens)])


def is_search(name: str) -> bool:
    """Whether a step is the quantization of a linear, not what it is calibrated on."""
    return name.endswith(("_proj", ".w1", ".w2", ".w3"))


def gpu_estimate(tokens: int) -> str:
    """An estimate from assumed rates and from the products that calibration and forwards need."""
    weights = sum(prod(shape) for key, shape in tensors() if "_proj" in key or ".experts." in key)
    h, f = HIDDEN, INNER
    # An expert's: X^T X (half), X^T (X' - X); hidden states twice; the same of these, and X^T R.
    expert = 3 * h * h + 8 * h * f + 3 * f * f + 2 * h * f
    attention = 2 * 3 * h * h + 3 * (HEADS * HEAD) ** 2
    forwards = 8 * 2 * (ASKED * 3 * h * f + 2 * h * HEAD * (HEADS + KV_HEADS))  # eight, with back
    flops = EXPERTS * expert + attention + forwards
    search = BLOCKS * weights / GPU_SEARCH
    lines = [
        f"a GPU, by assumption {GPU_SEARCH / 1e6:g} million weights/s in the search and "
        f"{GPU_MATMUL / 1e12:g} TFLOP/s in products: {BLOCKS} x ({weights:,} weights / the first "
        f"+ {flops / 1e9:.1f} GFLOP a token / the second):"
    ]
    for some in (tokens, DEFAULT_TOKENS):
        products = BLOCKS * flops * some / GPU_MATMUL
        lines.append(
            f"  {some:,} tokens: {search / 3600:.1f} h + {products / 3600:.1f} h = "
            f"{(search + products) / 3600:.1f} h"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--cols", type=int, default=512)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--hessian", choices=("kron", "input"), default="kron")
    parser.add_argument("--max_memory", type=float)
    parser.add_argument("--folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(args.folder or scratch)
        write_model(folder)
        settings = Settings(
            *(str(folder), f"{scratch}/out", f"{scratch}/work", args.bits),
            hessian=args.hessian,
            hessian_rows=min(16, args.rows),
            cal_rows=args.rows,
            cal_cols=args.cols,
            max_memory=args.max_memory,
        )
        steps = Steps()
        try:
            with parallel.one_thread_per_op():
                run(settings, args.experts, steps)
        except UserError as error:
            raise SystemExit(f"refused: {error}") from None
    print(steps.table())
    print(extrapolate(steps, args.experts, args.rows * args.cols))


if __name__ == "__main__":
    main()
