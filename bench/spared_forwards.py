#!/usr/bin/env python3
"""What it spares that attention runs once a stream, and the original moves on with the last stage.

    python bench/spared_forwards.py MODEL --text TRAIN [--bits 3] [--rows 64] [--length 512]

CPU seconds of a conversion with neither, with the first, and with both; the bytes are the same.
"""

import argparse
import contextlib
import hashlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from exl3.jobs import blocks
from exl3.jobs.block import Block
from exl3.jobs.convert import convert
from exl3.jobs.flags import convert_parser
from exl3.jobs.inputs import stage_moments
from exl3.jobs.settings import read_request


@contextlib.contextmanager
def stays() -> Iterator[None]:
    """The original moves on in forwards of its own."""

    def moments(block, stage, streams, advance):
        found = stage_moments(block, stage, streams)
        if advance:
            block.advance_original(streams)
        return found

    with mock.patch.object(blocks, "stage_moments", moments):
        yield


@contextlib.contextmanager
def neither() -> Iterator[None]:
    with stays(), mock.patch.object(Block, "replay_last", lambda self, key: None):
        yield


WAYS = {"neither": neither, "attention once": stays, "both": contextlib.nullcontext}


def run(args: argparse.Namespace, way: str) -> tuple[float, str]:
    """CPU seconds, and a hash of the quant's weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = [
            *("-i", str(args.model), "-o", str(folder / "out"), "-w", str(folder / "work")),
            *("-b", f"{args.bits:g}", "-cr", str(args.rows), "-cc", str(args.length)),
            *("-c", str(args.text), "--check_rows", "0"),
        ]
        request = read_request(convert_parser().parse_args(given))
        began = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), WAYS[way]():
            convert(request)
        seconds = time.process_time() - began
        found = hashlib.sha256()
        for path in sorted((folder / "out").glob("*.safetensors")):
            found.update(path.read_bytes())
        return seconds, found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    results = {way: run(args, way) for way in WAYS}
    first = results["neither"]
    for way, (seconds, digest) in results.items():
        same = "the same bytes" if digest == first[1] else "OTHER BYTES"
        print(f"{way:15} {seconds:6.1f} CPU s  {seconds / first[0]:.3f}  {same}", flush=True)


if __name__ == "__main__":
    main()
