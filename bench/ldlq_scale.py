#!/usr/bin/env python3
"""What searching the scale under feedback is worth: proxy error and time with it over without.

    python bench/ldlq_scale.py MODEL --text FILE [--rows 32] [--length 512] [--blocks 2]

Here at every K; `exl3.quant.linear.WIDENED` says where it is done. Both ways on the same linears
and Hessians of the model's first blocks; geometric means.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from exl3 import parallel, quantize_linear
from exl3.data.rows import calibration_rows
from exl3.data.tokenizer import load_tokenizer
from exl3.jobs.block import Block
from exl3.jobs.inputs import block_hessians
from exl3.jobs.streams import Streams, run_block
from exl3.model.quantized import open_model
from exl3.quant import linear as quant_linear


def layers(args: argparse.Namespace) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weight and Hessian of every linear of the first blocks."""
    model = open_model(args.model)
    rows = calibration_rows(load_tokenizer(args.model), args.rows, args.length, args.text)
    model.load_embedding()
    streams = Streams(rows, paired=False)
    for i in range(args.blocks):
        block = Block.load(model, i)
        for keys, hessian in block_hessians(block, list(block.linears), streams):
            for key in keys:
                yield block.loaded[key].T.clone(), hessian.mean()
        streams.original = run_block(model, i, rows, streams.original)
        block.free()


def tried(quantize: Callable[[], object]) -> tuple[float, float]:
    """Proxy error and seconds."""
    began = time.monotonic()
    return quantize().proxy_error, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=2)
    args = parser.parse_args()
    with parallel.one_thread_per_op():
        pairs = list(layers(args))
    for bits in range(1, 9):
        errors, times = [], []
        for weight, hessian in pairs:
            quantize = partial(quantize_linear, weight, hessian, bits)
            with mock.patch.object(quant_linear, "WIDENED", range(1, 9)):
                new = tried(quantize)
            with mock.patch.object(quant_linear, "WIDENED", ()):
                old = tried(quantize)
            errors.append(math.log(new[0] / old[0]))
            times.append((new[1], old[1]))
        ratio = math.exp(sum(errors) / len(errors))
        cost = sum(new for new, _ in times) / sum(old for _, old in times)
        print(f"K={bits}  proxy error {ratio:.3f}  time {cost:.2f}", flush=True)


if __name__ == "__main__":
    main()
