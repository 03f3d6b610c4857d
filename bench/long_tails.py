#!/usr/bin/env python3
"""What long tails cost a head: its KLD alone in the original, with and without their cure.

    python bench/long_tails.py MODEL --text TRAIN --judge TEXT [--bits 6] [--seeds 3]

TEXT must not be part of TRAIN. For every seed of the signs: the Hessian of the inputs alone, and
with the whole Hessian of the outputs.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from fidelity import long_tails
from transformers import AutoModelForCausalLM

from exl3 import parallel, quantize_linear
from exl3.data.rows import TextSource, calibration_rows, evaluation_rows
from exl3.data.tokenizer import load_tokenizer

CALIBRATION, JUDGED, LENGTH = 32, 8, 512  # rows, rows, tokens


@torch.no_grad()
def head_inputs(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What enters the head, (tokens, hidden)."""
    return torch.cat([model.model(row[None]).last_hidden_state[0] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    weight = model.lm_head.weight.data.T.contiguous()
    text, vocab = TextSource(str(args.text)), weight.shape[1]
    x = head_inputs(model, calibration_rows(tokenizer, CALIBRATION, LENGTH, text, 0, vocab))
    judged = evaluation_rows(tokenizer, args.judge.read_text(), LENGTH, JUDGED)
    entering = head_inputs(model, judged).double()
    expected = torch.log_softmax(entering @ weight.double(), -1)
    p = torch.softmax(x[::4] @ weight, -1)
    outputs = torch.diag(p.mean(0)) - p.T @ p / len(p)

    def kld(found: torch.Tensor) -> float:
        q = torch.log_softmax(entering @ found.double(), -1)
        return float((expected.exp() * (expected - q)).sum(-1).mean())

    with parallel.one_thread_per_op():
        for name, hessian in (("inputs alone", None), ("H_out whole", outputs)):
            for way, cured in (("long tails", long_tails()), ("now", contextlib.nullcontext())):
                with cured:
                    found = [
                        quantize_linear(weight, x.T @ x / len(x), args.bits, "mul1", seed,
                                        output_hessian=hessian).weight
                        for seed in range(args.seeds)
                    ]  # fmt: skip
                print(f"{name:12}  {way:10}", *(f"{kld(w):.6f}" for w in found), flush=True)


if __name__ == "__main__":
    main()
