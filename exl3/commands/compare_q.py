"""Compares quants: perplexity, KL divergence from the original, size; as tables and a chart."""

from pathlib import Path

from exl3.cli import Parser
from exl3.errors import UserError


def parser(prog: str | None) -> Parser:
    p = Parser(prog, description=__doc__)
    p.add_argument("-d", "--dataspec", type=Path, required=True, metavar="FILE", help="rows (JSON)")
    p.add_argument(
        "-m", "--modelspec", nargs="+", required=True, metavar="FILE",
        help="models (JSON lists), wildcards too",
    )  # fmt: skip
    p.add_argument(
        "-lf", "--logits_file", type=Path, metavar="FILE",
        help="reference logits of compare_q_logits.py (default: of the model with out_logits)",
    )  # fmt: skip
    p.add_argument("-mask", "--mask", metavar="A;B", help="only labels that contain A or B")
    p.add_argument("-cc", "--clear_cache", action="store_true", help="measure everything again")
    p.add_argument("-dev", "--device", default="0", metavar="N", help="a GPU, or cpu (0)")
    p.add_argument(
        "--reference_rows", type=int, default=10, metavar="N",
        help="rows of reference logits that out_logits makes; 0: all (10)",
    )  # fmt: skip
    p.add_argument("--trust_remote_code", action="store_true", help="run code of the models")
    out = p.add_argument_group("what comes out")
    out.add_argument("-p", "--plot", action="store_true", help="draw a chart")
    out.add_argument(
        "-kld", "--kld", action="store_true", help="KL divergence in the chart; with -p both panels"
    )
    out.add_argument("-o", "--out", type=Path, metavar="FILE", help="the chart: .png, .svg or .pdf")
    out.add_argument("-t", "--title", metavar="TEXT", help="of the chart")
    out.add_argument("-v", "--vram", action="store_true", help="GiB instead of bits on the x axis")
    out.add_argument("-mx", "--max_x", type=float, metavar="X", help="leave out what is beyond")
    out.add_argument("-my", "--max_y", type=float, metavar="Y", help="leave out what is beyond")
    out.add_argument("-dark", "--dark", action="store_true", help="light on dark")
    out.add_argument("--show", action="store_true", help="open a window, where there is a display")
    for kind in ("csv", "json", "markdown"):
        out.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"write a {kind} file")
    return p


def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    args = parser(prog).parse_args(argv)
    if args.reference_rows < 0:
        raise UserError(f"--reference_rows {args.reference_rows}: give a number of rows, 0 for all")
    _refuse_unwritable(args)

    from exl3.jobs.compare import Request, compare_models

    request = Request(
        args.dataspec,
        tuple(args.modelspec),
        args.logits_file,
        args.mask,
        args.clear_cache,
        args.device,
        args.reference_rows,
        args.kld,
        args.trust_remote_code,
    )
    _report(args, compare_models(request))


def _refuse_unwritable(args: object) -> None:
    """Before hours of work: what is to be written has a fitting name, in a folder that is there."""
    from exl3.evaluate.plot import check_path

    if args.out is not None:
        check_path(args.out)
    for path in (args.out, args.csv, args.json, args.markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"{path}: the folder {path.absolute().parent} does not exist")


def _report(args: object, results: list) -> None:
    from exl3.evaluate import report
    from exl3.evaluate.plot import draw_chart
    from exl3.evaluate.table import print_table

    print()
    print_table(results)
    for kind in ("csv", "json", "markdown"):
        if path := getattr(args, kind):
            getattr(report, f"write_{kind}")(path, results)
            print(f"Wrote {path}")
    if args.plot or args.out or args.show:
        chart = args.out or args.dataspec.with_suffix(".png")
        draw_chart(
            chart,
            results,
            title=args.title or "",
            ppl=args.plot or not args.kld,
            kld=args.kld,
            vram=args.vram,
            max_x=args.max_x,
            max_y=args.max_y,
            dark=args.dark,
            show=args.show,
        )
        print(f"Wrote {chart}")
