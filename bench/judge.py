#!/usr/bin/env python3
"""Judges quants with plain transformers on the dequantized weights: nothing of our streaming.

    python bench/judge.py ORIGINAL QUANT [QUANT ...] --text FILE [--rows 32] [--length 512]

Prints KLD(original || quant), perplexity and top-1 agreement over all positions of the rows.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from exl3.data.rows import evaluation_rows
from exl3.evaluate.metrics import Scores
from exl3.format import decode_layer
from exl3.format.layer import LAYER_TENSORS


@torch.no_grad()
def dequantize_into(model: torch.nn.Module, folder: Path) -> None:
    """Replaces a stock model's weights by those an EXL3 folder's tensors decode to."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in [k for k in stored if k.endswith(".trellis")]:
        name = key.removesuffix(".trellis")
        leaves = {a: stored.pop(f"{name}.{a}") for a in LAYER_TENSORS if f"{name}.{a}" in stored}
        module = model.get_submodule(name)
        out, into = module.weight.shape
        # A new parameter: a tied head must not write into the embedding.
        module.weight = torch.nn.Parameter(decode_layer(leaves)[:into, :out].T.contiguous())
        if module.bias is not None:
            module.bias.copy_(leaves["bias"][:out])
    for key, tensor in stored.items():
        parameters[key].copy_(tensor)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("original", type=Path)
    parser.add_argument("quants", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(args.original, dtype=torch.float32).eval()

    tokenizer = AutoTokenizer.from_pretrained(args.original)
    rows = evaluation_rows(tokenizer, args.text.read_text(), args.length, args.rows)
    original = load()
    print(f"{'quant':<40} {'KLD':>9} {'PPL':>9} {'top-1':>7}")
    for folder in (args.original, *args.quants):
        model, scores = load(), Scores()
        if folder != args.original:
            dequantize_into(model, folder)
        for row in rows.split(4):
            scores.add(original(row).logits, model(row).logits, row)
        line = f"{scores.kld:>9.5f} {scores.perplexity:>9.4f} {scores.top1:>7.2%}"
        print(f"{folder.name:<40} {line}", flush=True)


if __name__ == "__main__":
    main()
