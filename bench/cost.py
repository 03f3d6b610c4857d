#!/usr/bin/env python3
"""Time and memory of conversions of a model with real shapes: the default against plain LDLQ.

    python bench/cost.py --tokenizer MODEL [--hidden 768] [--mlp 3072] [--blocks 11] [--rows 32]

Makes a random Llama (104 million weights in its blocks by default), with the tokenizer of MODEL,
and converts it at `--bits` with each set of flags, in a process of its own. Prints wall seconds,
CPU seconds and peak memory, as numbers and over the first.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "plain LDLQ": ["--no_correction", "--hessian", "input"],
    "correction": ["--hessian", "input", "--uniform"],
    "output Hessians": ["--no_correction"],
    "both": ["--uniform"],
    "default": [],
}


def make_model(args: argparse.Namespace, folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 64 // 3),
        vocab_size=4096,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in args.tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)


def convert(args: argparse.Namespace, folder: Path, flags: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds, peak MiB; measured by a process that does nothing else."""
    given = [
        *("-i", str(folder / "model"), "-o", str(folder / "out"), "-w", str(folder / "work")),
        *("-b", f"{args.bits:g}", "-cr", str(args.rows), "-cc", "512", "--check_rows", "0"),
        *("-d", args.device, *flags),
    ]
    program = (
        "import resource, subprocess, sys, time\n"
        "began = time.monotonic()\n"
        "subprocess.run([sys.executable, *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)\n"
    )
    command = [sys.executable, "-c", program, str(ROOT / "convert.py"), *given]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    for name in ("out", "work"):
        shutil.rmtree(folder / name)
    wall, cpu, memory = map(float, done.stdout.split())
    return wall, cpu, memory


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--mlp", type=int, default=3072)
    parser.add_argument("--blocks", type=int, default=11)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--bits", type=float, default=3)
    parser.add_argument("-d", "--device", default="0", help="a GPU, or cpu (0)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cost-") as name:
        folder = Path(name)
        make_model(args, folder / "model")
        print("| flags | wall s | CPU s | MiB | CPU of the first | memory of the first |")
        print("|---|---|---|---|---|---|")
        first = None
        for way in args.ways:
            wall, cpu, memory = convert(args, folder, WAYS[way])
            first = first or (cpu, memory)
            print(
                f"| {way} | {wall:.0f} | {cpu:.0f} | {memory:.0f} | {cpu / first[0]:.2f} | "
                f"{memory / first[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
