"""One linear of the model: quantized, saved, and told about."""

import time
import zlib

import torch
from torch import nn

from exl3.jobs.inputs import Calibration
from exl3.jobs.job import Job, encode_cost
from exl3.quant.linear import quantize_linear


def quantize(
    job: Job,
    key: str,
    linear: nn.Linear,
    weight: torch.Tensor,
    calibration: Calibration | None,
    output_hessian: torch.Tensor | None = None,
) -> None:
    """Quantizes a linear whose original weight is (out, in), saves it, and tells about it.

    output_hessian: (out, out). Nothing is done for a layer that is finished already.
    """
    if job.work.has_layer(key):
        return
    began = time.monotonic()
    job.progress.doing(key)
    bits = job.plan.bits[key]
    result = quantize_linear(
        weight.T,
        calibration and calibration.hessian,
        bits,
        job.settings.codebook,
        zlib.crc32(key.encode()) ^ job.settings.seed,
        out_scales=job.settings.out_scales,
        name=f"{key}.weight",
        target=calibration and calibration.target(weight.T),
        output_hessian=output_hessian,
    )
    report = {
        "bits": bits,
        "proxy_error": result.proxy_error,
        "weight_error": result.weight_error,
        "seconds": time.monotonic() - began,
    }
    job.work.save_layer(key, result.tensors, report)
    job.progress.say(_line(key, report))
    for note in (*(calibration.notes if calibration else ()), *result.notes):
        job.progress.say(f"   note: {note}")
    job.progress.advance(encode_cost(linear))


def _line(key: str, report: dict[str, float]) -> str:
    proxy = report["proxy_error"]
    error = "-" if proxy is None else f"{proxy:.2e}"
    return f" - {key:<44} {report['bits']} bits   error {error}   {report['seconds']:6.1f} s"
