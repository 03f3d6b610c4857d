#!/usr/bin/env python3
"""What nvcc makes of the CUDA kernels: registers, shared memory, spills, for every kind of chip.

    python bench/kernel_table.py [--write]

Needs nvcc and no GPU. Prints the table of docs/kernels.md; --write puts it there.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs/kernels.md"
CHIPS = (80, 86, 89, 90, 120)
# As torch compiles extensions, and stricter.
FLAGS = [
    *("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v"),
    *("-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"),
    *("-D__CUDA_NO_HALF2_OPERATORS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__"),
]
BEGIN, END = "<!-- kernel_table.py writes from here -->", "<!-- to here -->"


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one chip."""

    name: str  # without "_kernel"
    bits: int | None  # its first number, which is K wherever there is one
    chip: int
    registers: int
    shared: int  # static, bytes; what is asked for at the launch is not known here
    stack: int
    spills: int  # bytes, stores and loads


def nvcc() -> str | None:
    """The compiler's path, None if it is not here."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def sources() -> list[Path]:
    return sorted((REPOSITORY / "csrc/cuda").glob("*.cu"))


def known_chips() -> list[int]:
    """Those of `CHIPS` that this nvcc can compile for."""
    listed = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = set(map(int, re.findall(r"compute_(\d+)\b", listed.stdout)))
    return [chip for chip in CHIPS if chip in known]


def compile_kernels(source: Path, chips: Sequence[int]) -> list[Kernel]:
    """Compiles a file for all chips; RuntimeError with the compiler's words if it does not."""
    targets = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]
    with tempfile.TemporaryDirectory() as folder:
        out = ["-c", str(source), "-o", f"{folder}/kernels.o"]
        command = [nvcc(), *FLAGS, *targets, f"-I{REPOSITORY / 'csrc'}", *out]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name}: {done.stdout}{done.stderr}")
    return list(_read(done.stdout + done.stderr))


def _read(log: str) -> Iterable[Kernel]:
    """What `-Xptxas -v` says of every kernel."""
    entries = re.split(r"Compiling entry function '", log)[1:]
    for entry in entries:
        mangled, chip = re.match(r"(\w+)' for 'sm_(\d+)", entry).groups()
        name = re.search(r"\d([a-z][a-z_]*)_kernel", mangled).group(1)
        number = re.search(r"_kernelILi(\d+)E", mangled)
        stack, *spills = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
            ).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", entry).group(1))
        shared = re.search(r"(\d+) bytes smem", entry)
        yield Kernel(
            name,
            int(number.group(1)) if number else None,
            int(chip),
            registers,
            int(shared.group(1)) if shared else 0,
            stack,
            sum(spills),
        )


def table(kernels: Iterable[Kernel]) -> str:
    """Markdown: a row for every kernel and K, the most registers of its variants on each chip."""
    rows: dict[tuple[str, int], dict[int, list[Kernel]]] = defaultdict(lambda: defaultdict(list))
    for kernel in kernels:
        rows[kernel.name, kernel.bits or 0][kernel.chip].append(kernel)
    lines = [
        "| kernel | K | " + " | ".join(f"sm_{chip}" for chip in CHIPS) + " | spills |",
        "|---|---|" + "---|" * (len(CHIPS) + 1),
    ]
    for (name, bits), of_chip in sorted(rows.items()):
        most = [str(max((k.registers for k in of_chip[chip]), default="–")) for chip in CHIPS]
        spills = sum(k.spills for variants in of_chip.values() for k in variants)
        lines.append(f"| `{name}` | {bits or ''} | " + " | ".join(most) + f" | {spills} |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Puts the table into the docs, in place of the old one."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main(to_docs: bool) -> None:
    if nvcc() is None:
        raise SystemExit("There is no nvcc.")
    found = [kernel for file in sources() for kernel in compile_kernels(file, known_chips())]
    print(table(found))
    if to_docs:
        write(table(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    main(parser.parse_args().write)
