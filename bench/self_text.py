#!/usr/bin/env python3
"""Text that a model wrote itself, to calibrate on: what it samples from its own predictions.

python bench/self_text.py MODEL --out self.txt [--rows 96] [--length 512] [--seed 0]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    first = torch.randint(2, vocab, (args.rows, 1))  # a random word each
    ids = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        top_k=0,
        min_new_tokens=args.length,
        max_new_tokens=args.length,
        pad_token_id=0,
    )
    args.out.write_text("\n\n".join(tokenizer.batch_decode(ids, skip_special_tokens=True)))


if __name__ == "__main__":
    main()
