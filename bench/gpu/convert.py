#!/usr/bin/env python3
"""A whole conversion on a GPU: a random Llama of a real shape, made on the spot."""

import contextlib
import io
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from exl3 import parallel
from exl3.commands.convert import main as convert
from exl3.data.builtin import builtin_texts
from exl3.demo_model import train_tokenizer
from exl3.devices import CPU
from exl3.jobs.estimate import estimate
from exl3.jobs.plan import make_plan
from exl3.jobs.settings import Settings
from exl3.jobs.source import open_model

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROWS, COLS, BITS = 16, 1024, 4
TEXTS = 60  # that the tokenizer learns from: a few seconds


def make_model(folder: Path, **shape: int) -> Path:
    """Random weights with a tokenizer of the demo's kind; shape: what differs from `SHAPE`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE | shape)).to(torch.bfloat16)
    model.save_pretrained(folder)
    texts = [text for _, text in builtin_texts("prose")]
    train_tokenizer(texts[:TEXTS]).save_pretrained(folder)
    return folder


def measure(device: torch.device, rows: int = ROWS, cols: int = COLS, **shape: int) -> list[dict]:
    """Seconds and rate of two conversions of one model, with all that is done by default and as
    plain LDLQ, and the most memory of the card beside what --dry_run tells."""
    results = []
    with tempfile.TemporaryDirectory(prefix="exl3-gpu-check-") as folder:
        source = make_model(Path(folder) / "model", **shape)
        for name, more in (
            ("corrected, both sides", {}),
            ("plain LDLQ", {"no_correction": True, "hessian": "input"}),
        ):
            results.append({"conversion": name, **_converted(source, device, rows, cols, more)})
    return results


def _converted(
    source: Path, device: torch.device, rows: int, cols: int, more: dict[str, object]
) -> dict[str, object]:
    where = "cpu" if device.type == "cpu" else str(device.index or 0)
    out, work = (source.with_name(f"{kind}{len(more)}") for kind in ("out", "work"))
    given = {"-i": source, "-o": out, "-w": work, "-b": BITS, "-cr": rows, "-cc": cols}
    flags = [str(x) for pair in {**given, "-d": where, "--check_rows": 0}.items() for x in pair]
    for name, value in more.items():
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    told, began = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(told):
        convert(flags)
    seconds = time.monotonic() - began
    settings = Settings(str(source), str(out), str(work), BITS, cal_rows=rows, cal_cols=cols)
    for name, value in more.items():
        setattr(settings, name, value)
    with parallel.work_on(device):
        model = open_model(settings, device)
        plan = make_plan(settings, model)
        expected = estimate(settings, model, plan)
    weights = plan.weights + model.head()[1].weight.numel()
    found = {
        "weights": weights,
        "bits": BITS,
        "tokens": rows * cols,
        "seconds": round(seconds, 1),
        "seconds told before": round(expected.seconds, 1),
        "weights/s": round(weights / seconds),
        "last relative error": float(re.findall(r"relative error ([\d.]+)", told.getvalue())[-1]),
    }
    if device.type == "cuda":
        found["GiB on the card"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        found["GiB told before"] = round(expected.card / 2**30, 2)
    return found


def main() -> None:
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    small = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024, "rows": 2}
    for row in measure(device, **({} if device.type == "cuda" else small)):
        print(row)


if __name__ == "__main__":
    sys.exit(main())
