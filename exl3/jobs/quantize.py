"""Linears of a model: quantized, saved, and told about."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from exl3 import parallel
from exl3.jobs.inputs import Calibration
from exl3.jobs.job import Job, encode_cost
from exl3.quant.linear import QuantizedLinear, quantize_linear

Report = dict[str, float]


@dataclass(frozen=True)
class Wanted:
    """A linear to quantize: its original weight (out, in), and what makes the output-side Hessian
    when its turn comes."""

    key: str
    linear: nn.Linear
    weight: torch.Tensor
    output_hessian: Callable[[], torch.Tensor | None] = lambda: None


def quantize(job: Job, wanted: Sequence[Wanted], calibration: Calibration | None) -> None:
    """Quantizes linears with the same input, on all devices of the job; saves them and tells about
    them in their order. Nothing is done for layers that are finished already."""
    missing = [w for w in wanted if not job.work.has_layer(w.key)]

    def make(device: torch.device, w: Wanted) -> tuple[QuantizedLinear, Report]:
        weight = w.weight.to(device)
        return quantized(
            w.key,
            weight,
            calibration and calibration.hessian,
            job.plan.bits[w.key],
            job.settings.codebook,
            job.settings.seed,
            out_scales=job.settings.out_scales,
            target=calibration and calibration.target(weight.T),
            output_hessian=w.output_hessian(),
        )

    results = parallel.spread(job.devices, make, missing)
    for w in missing:
        job.progress.doing(w.key)
        made, report = next(results)
        job.work.save_layer(w.key, made.tensors, report)
        job.progress.say(_line(w.key, report))
        for note in (*(calibration.notes if calibration else ()), *made.notes):
            job.progress.say(f"   note: {note}")
        job.progress.advance(encode_cost(w.linear))


def quantized(
    key: str,
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    bits: int,
    codebook: str,
    seed: int = 0,
    **more: object,
) -> tuple[QuantizedLinear, Report]:
    """The linear `key` with the original weight (out, in), quantized on the weight's device, and
    the report that is saved with the layer. more: what else `quantize_linear` takes."""
    began = time.monotonic()
    own = zlib.crc32(key.encode()) ^ seed
    made = quantize_linear(weight.T, hessian, bits, codebook, own, name=f"{key}.weight", **more)
    report = {
        "bits": bits,
        "proxy_error": made.proxy_error,
        "weight_error": made.weight_error,
        "seconds": time.monotonic() - began,
    }
    return made, report


def _line(key: str, report: Report) -> str:
    proxy = report["proxy_error"]
    error = "-" if proxy is None else f"{proxy:.2e}"
    return f" - {key:<44} {report['bits']} bits   error {error}   {report['seconds']:6.1f} s"
