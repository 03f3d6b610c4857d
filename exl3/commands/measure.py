"""Measures what the bits of each group of modules are worth, in KL divergence from the original."""

import os
from pathlib import Path

from exl3.cli import Parser
from exl3.errors import UserError


def parser(prog: str | None) -> Parser:
    p = Parser(prog, description=__doc__)
    p.add_argument(
        "-i", "--in_dir", type=Path, nargs="+", default=[], metavar="QUANT",
        help="two or more EXL3 quants of the original, in rising bitrate (default: every group is "
        "quantized by itself, at --bits)",
    )  # fmt: skip
    p.add_argument(
        "-r", "--ref_dir", type=Path, required=True, metavar="DIR", help="the original model"
    )
    p.add_argument(
        "-o", "--out_file", type=Path, required=True, metavar="FILE", help="the measurement (JSON)"
    )
    p.add_argument(
        "-l", "--level", type=int, choices=range(5), default=2,
        help="groups: 0 a block; 1 attention | MLP; 2 shared experts apart; 3 q | k, v | o | gate, "
        "up | down; 4 every tensor, or kind of experts (2)",
    )  # fmt: skip
    p.add_argument(
        "--method", choices=("isolate", "swap"), default="isolate",
        help="a group alone in the original, or exchanged in the smallest quant (isolate)",
    )  # fmt: skip
    p.add_argument("-d", "--device", default="0", metavar="N", help="a GPU, or cpu (0)")
    p.add_argument(
        "-ms", "--max_sys", type=float, default=8, metavar="GIB",
        help="memory for hidden states; with less there are more passes (8)",
    )  # fmt: skip
    p.add_argument("-cr", "--cal_rows", type=int, default=10, metavar="N", help="rows (10)")
    p.add_argument(
        "-cc", "--cal_cols", type=int, default=1024, metavar="N", help="tokens in a row (1024)"
    )
    p.add_argument(
        "-c", "--cal_file", metavar="FILE",
        help="text: .txt, .jsonl, .parquet, or the name of a dataset (default: text every machine "
        "has)",
    )  # fmt: skip
    p.add_argument("--cal_split", metavar="NAME", help="split of that dataset (train)")
    p.add_argument("--cal_column", metavar="NAME", help="its column")
    p.add_argument("--trust_remote_code", action="store_true", help="run code of the model")
    own = p.add_argument_group("without -i")
    own.add_argument("--bits", type=int, metavar="K", help="bits of each group (2)")
    own.add_argument("-cb", "--codebook", choices=("mul1", "mcg", "3inst"), help="(mul1)")
    own.add_argument(
        "--hessian_rows", type=int, metavar="N",
        help="rows to quantize with, others than those measured on (30)",
    )  # fmt: skip
    return p


def _absolute(path: Path) -> Path:
    """Measurements name folders; they may be read from elsewhere."""
    return Path(os.path.abspath(path.expanduser()))


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parser(prog).parse_args(argv)
    own = {name: getattr(args, name) for name in ("bits", "codebook", "hessian_rows")}
    own = {name: value for name, value in own.items() if value is not None}
    if args.in_dir and own:
        raise UserError(f"--{next(iter(own))} is for measuring without quants; leave out it or -i")
    if args.cal_file is None and (args.cal_split or args.cal_column):
        raise UserError("--cal_split and --cal_column are of a dataset; name it with -c")

    from exl3.data.rows import TextSource
    from exl3.jobs.measure import measure
    from exl3.jobs.measure_input import Request
    from exl3.jobs.settings import calibration_source

    text = None
    if args.cal_file is not None:
        place = calibration_source(args.cal_file)
        text = TextSource(place, args.cal_split or "train", args.cal_column)
    measure(
        Request(
            original=_absolute(args.ref_dir),
            out=_absolute(args.out_file),
            quants=tuple(map(_absolute, args.in_dir)),
            level=args.level,
            method=args.method,
            max_sys=args.max_sys,
            rows=args.cal_rows,
            cols=args.cal_cols,
            text=text,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            **own,
        )
    )
