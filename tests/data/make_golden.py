"""Cuts tests/data/golden.safetensors (under 300 kB) out of the full golden file.

    python tests/data/make_golden.py FULL_GOLDEN.safetensors

Kept: of every codebook and K the first 128 columns of the layer (its Hadamard blocks make them a
layer of their own), the states of its first tile, one row of its weights, and SHA-256 sums of the
inner matrix and of the codebooks.
"""

import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

COLUMNS = 128


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def main(full: str) -> None:
    golden = load_file(full)
    kept, sums = {}, {}
    for name in ("3inst", "mcg", "mul1"):
        sums[f"codebook.{name}"] = digest(golden[f"codebook.{name}"])
        for bits in range(1, 9):
            layer = f"{name}.k{bits}"
            kept[f"{layer}.trellis"] = golden[f"{layer}.trellis"][:, : COLUMNS // 16].contiguous()
            kept[f"{layer}.suh"] = golden[f"{layer}.suh"]
            kept[f"{layer}.svh"] = golden[f"{layer}.svh"][:COLUMNS].contiguous()
            kept[f"{layer}.states0"] = golden[f"{layer}.states0"]
            kept[f"{layer}.row"] = golden[f"{layer}.weight"][bits, :COLUMNS].contiguous()
            sums[f"{layer}.inner"] = digest(golden[f"{layer}.inner"][:, :COLUMNS])
    save_file(kept, Path(__file__).with_name("golden.safetensors"), sums)


if __name__ == "__main__":
    main(sys.argv[1])
