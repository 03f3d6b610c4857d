"""The steps of one block: what goes in, quantized linears, what comes out."""

import time
import zlib
from collections.abc import Iterator

import torch
from torch import nn

from exl3 import parallel
from exl3.jobs.settings import Settings
from exl3.jobs.workdir import WorkDir
from exl3.model.capture import Capture, Captured, head_inputs
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress
from exl3.quant.hessian import Hessian
from exl3.quant.linear import quantize_linear

BATCH_TOKENS = 2048  # of one forward; part of the result's definition
SAMPLE_ROWS = 16  # rows on which a block's error is measured


def batches(rows: torch.Tensor) -> list[slice]:
    """Slices of rows (rows, cols) for one forward each."""
    size = max(1, BATCH_TOKENS // rows.shape[1])
    return [slice(a, min(a + size, len(rows))) for a in range(0, len(rows), size)]


def _waves(rows: torch.Tensor) -> Iterator[list[slice]]:
    """Batches that run at the same time: few, for what they capture stays in memory."""
    parts, size = batches(rows), parallel.threads()
    return (parts[a : a + size] for a in range(0, len(parts), size))


def _enter(states: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if states is None else states[part]


def block_hessians(
    model: StreamedModel,
    i: int,
    linears: dict[str, nn.Linear],
    rows: torch.Tensor,
    states: torch.Tensor | None,
) -> list[tuple[tuple[str, ...], Hessian]]:
    """Hessians of the inputs of block i's linears, one for those that share their input.

    rows: ids (rows, cols); states: what enters the block, (rows, cols, hidden), None for block 0.
    """
    hessians: dict[tuple[str, ...], Hessian] = {}

    def captured(part: slice) -> list[Captured]:
        return capture.run(rows[part], _enter(states, part))[1]

    with Capture(model, i, linears) as capture:
        for wave in _waves(rows):
            for groups in parallel.each(captured, wave):
                for group in groups:
                    size = group.inputs.shape[-1]
                    hessians.setdefault(group.names, Hessian(size)).add(group.inputs)
    return list(hessians.items())


def head_hessian(model: StreamedModel, rows: torch.Tensor, states: torch.Tensor) -> Hessian:
    """Hessian of what enters the head, from the last block's output (rows, cols, hidden)."""
    hessian = Hessian(states.shape[-1])
    for wave in _waves(rows):
        for x in parallel.each(lambda part: head_inputs(model, rows[part], states[part]), wave):
            hessian.add(x)
    return hessian


def run_block(
    model: StreamedModel,
    i: int,
    rows: torch.Tensor,
    states: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Block i's output for all rows, (rows, cols, hidden). `out` may be `states` itself."""
    if out is None:
        hidden = model.config.get_text_config(decoder=True).hidden_size
        out = torch.empty(*rows.shape, hidden, dtype=model.dtype)

    def run(part: slice) -> None:
        out[part] = model.run_block(i, rows[part], _enter(states, part))

    parallel.each(run, batches(rows))
    return out


def sample(rows: torch.Tensor) -> torch.Tensor:
    """Indices of the rows on which a block's error is measured, evenly spread."""
    return torch.linspace(0, len(rows) - 1, min(SAMPLE_ROWS, len(rows))).long()


def relative_error(reference: torch.Tensor, other: torch.Tensor) -> float:
    """|other - reference| / |reference|, Frobenius norms."""
    return float((other - reference).double().norm() / reference.double().norm())


def quantize_and_save(
    settings: Settings,
    work: WorkDir,
    progress: Progress,
    key: str,
    linear: nn.Linear,
    hessian: Hessian | None,
    bits: int,
) -> None:
    """Quantizes a linear of the model, saves it, and tells about it."""
    began = time.monotonic()
    progress.doing(key)
    result = quantize_linear(
        linear.weight.T,
        None if hessian is None else hessian.mean(),
        bits,
        settings.codebook,
        zlib.crc32(key.encode()) ^ settings.seed,
        out_scales=settings.out_scales,
        name=f"{key}.weight",
    )
    report = {
        "bits": bits,
        "proxy_error": result.proxy_error,
        "weight_error": result.weight_error,
        "seconds": time.monotonic() - began,
    }
    work.save_layer(key, result.tensors, report)
    progress.say(_line(key, report))
    for note in result.notes:
        progress.say(f"   note: {note}")


def _line(key: str, report: dict[str, float]) -> str:
    proxy = report["proxy_error"]
    error = "-" if proxy is None else f"{proxy:.2e}"
    return f" - {key:<44} {report['bits']} bits   error {error}   {report['seconds']:6.1f} s"
