"""The flags of convert.py, in one place: ours, and the other spellings that users know."""

import argparse
import dataclasses

from exl3.cli import Parser
from exl3.errors import UserError
from exl3.format.markers import MULTIPLIERS
from exl3.jobs.settings import CODEBOOKS, HESSIANS, OUT_SCALES, Settings

# Flags of exllamav3's and exllamav2's convert.py that have no meaning here: accepted, and said.
IGNORED = (
    ("-dr", "--device_ratios", 1, "work is shared out by itself"),
    ("-pm", "--parallel_mode", 0, "work is always parallel"),
    ("-mb", "--mtp_bits", 1, "MTP layers are not converted"),
    ("-vb", "--vision_bits", 1, "vision layers are not converted"),
    ("-strat", "--strategy", 1, "bits are shared out by the model's gradients"),
    ("-img", "--image_dump", 0, "no images are drawn"),
    ("-lcpi", "--last_checkpoint_index", 1, "the state is saved to the end"),
    (None, "--max_module", 1, "every module is converted"),
    (None, "--override_anyway", 0, "settings that would mix two results stay refused"),
    ("-ml", "--measurement_length", 1, "util/measure.py measures"),
    ("-mr", "--measurement_rows", 1, "util/measure.py measures"),
)
HELP = {
    "in_dir": "the original model",
    "out_dir": "the quant to write; must not exist or be empty",
    "work_dir": "keeps the job's progress; any folder of its own",
    "bits": "bits per weight, 1 to 8, e.g. 3.5",
    "head_bits": "bits per weight of the head, 1 to 8, or 16 to leave it unquantized",
    "checkpoint_interval": "seconds between saves of the calibration state",
    "cal_file": "calibration text: .txt, .jsonl, .parquet, or the name of a dataset as NAME or "
    "NAME:CONFIG (default: text every machine has)",
    "cal_split": "split of that dataset",
    "cal_column": "its column (default: text, content, or the first of strings)",
    "cal_rows": "calibration rows",
    "cal_cols": "tokens in a calibration row",
    "cal_stride": "tokens from row to row (default: rows are spread over the text)",
    "codebook": "codebook of the trellis",
    "out_scales": "scales of the output channels",
    "no_correction": "no layer makes up for errors before it: for quants whose tensors are to be "
    "mixed with others' (util/optimize.py)",
    "hessian": "kron: errors are also weighed by what outputs do to the model's predictions (one "
    "backward pass of the original); input: by their inputs alone",
    "hessian_rows": "calibration rows of that backward pass, which also shares out the bits "
    "(default: 16; of experts up to 64, if they are short)",
    "save_hessians": "folder for what that pass finds, which jobs with other bits take from there",
    "tune": "steps of tuning scales and norm weights after all else, kept as far as held-out "
    "calibration rows gain by it; try 40",
    "uniform": "a whole -b is the same for all tensors of the decoder, not an average shared out "
    "by the model's own gradients",
    "hq": "one bit more for attention and shared experts, on top of -b",
    "measurement": "what util/measure.py found of this model: shares out the bits of -b",
    "recipe": "bits of every layer, as util/optimize.py --recipe writes them; -b may be left out",
    "shard_size": "largest output file; 0: a single file",
    "devices": "GPUs to use, or cpu",
    "max_memory": "GiB of memory the job may take (default: what is free); with less it is slower, "
    "different with --tune only",
    "seed": "of the random signs and random calibration rows",
    "rope_alpha": "NTK factor on the rotary base, as in exllamav2; also written to the config",
    "rope_scale": "linear rotary scaling, as in exllamav2; also written to the config",
    "check_rows": "held-out rows on which the quant is compared at the end; 0: no check",
    "verbose": "more about the job",
    "trust_remote_code": "run code that the model brings along",
}
# field: (spellings, type, metavar)
VALUES = {
    "in_dir": (("-i",), str, "DIR"),
    "out_dir": (("-o",), str, "DIR"),
    "work_dir": (("-w",), str, "DIR"),
    "bits": (("-b",), float, "BPW"),
    "head_bits": (("-hb",), int, "K"),
    "checkpoint_interval": (("-cpi",), int, "SEC"),
    "cal_file": (("-c", "--cal_dataset"), str, "FILE"),
    "cal_split": ((), str, "NAME"),
    "cal_column": ((), str, "NAME"),
    "cal_rows": (("-cr", "-rows", "--dataset_rows"), int, "N"),
    "cal_cols": (("-cc", "-l", "--length"), int, "N"),
    "cal_stride": ((), int, "N"),
    "codebook": (("-cb",), str, None),
    "measurement": (("-m",), str, "FILE"),
    "recipe": ((), str, "FILE"),
    "shard_size": (("-ss",), int, "MB"),
    "devices": (("-d",), str, "N[,N]"),
    "max_memory": ((), float, "GIB"),
    "seed": ((), int, "N"),
    "rope_alpha": (("-ra",), float, "A"),
    "rope_scale": (("-rs",), float, "F"),
    "check_rows": ((), int, "N"),
    "hessian": ((), str, None),
    "hessian_rows": ((), int, "N"),
    "save_hessians": ((), str, "DIR"),
    "tune": ((), int, "STEPS"),
}
CHOICES = {"codebook": CODEBOOKS, "hessian": HESSIANS}
SWITCHES = {
    "hq": ("-hq",),
    "uniform": (),
    "no_correction": (),
    "verbose": ("-v",),
    "trust_remote_code": (),
}


def convert_parser() -> argparse.ArgumentParser:
    """The command line of convert.py. What was not given is None, to tell it apart on resume."""
    defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
    p = Parser(prog="convert.py", description="Converts a Hugging Face model to an EXL3 quant.")
    p.add_argument(
        "-r", "-resume", "--resume", action="store_true", help="go on with the job of -w"
    )
    p.add_argument(
        "-nr", "--no_resume", action="store_true", help="start afresh: forget the job of -w"
    )
    p.add_argument("--dry_run", action="store_true", help="tell size, memory and time; do nothing")
    for name, (spellings, kind, metavar) in VALUES.items():
        default = defaults[name]
        shown = f" (default: {default})" if isinstance(default, int | str | float) else ""
        p.add_argument(
            *spellings,
            f"--{name}",
            dest=name,
            type=kind,
            metavar=metavar,
            choices=CHOICES.get(name),
            help=HELP[name] + shown,
        )
    scales = p.add_mutually_exclusive_group()
    scales.add_argument(
        "--out_scales", nargs="?", const="always", choices=OUT_SCALES, help=HELP["out_scales"]
    )
    scales.add_argument(
        "--no_out_scales", dest="out_scales", action="store_const", const="never",
        help="the same as --out_scales never",
    )  # fmt: skip
    for name, spellings in SWITCHES.items():
        p.add_argument(*spellings, f"--{name}", action="store_true", default=None, help=HELP[name])
    _add_foreign(p)
    return p


def _add_foreign(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("flags of exllamav2 and exllamav3 (docs/convert.md tells more)")
    group.add_argument("-cf", "--compile_full", metavar="DIR", help="as -o; with -o, that is -w")
    group.add_argument("-mcg", "--mcg_multiplier", metavar="X", help="the same as -cb mcg")
    group.add_argument("-mul1", "--mul1_multiplier", metavar="X", help="the same as -cb mul1")
    group.add_argument(
        "-om", "--output_measurement", metavar="FILE", help="refused: util/measure.py measures"
    )
    for short, long, values, reason in IGNORED:
        kind = {"action": "store_true", "default": None} if not values else {"metavar": "X"}
        group.add_argument(*filter(None, (short, long)), help=f"ignored: {reason}", **kind)


def interpret(args: argparse.Namespace) -> tuple[dict[str, object], list[str]]:
    """The settings that were given, other spellings resolved, and lines to tell the user."""
    given = {k: v for k, v in vars(args).items() if v is not None}
    notes = []
    for short, long, _, reason in IGNORED:
        if given.pop(long.lstrip("-"), None) is not None:
            notes.append(f"{short or long} is ignored: {reason}")
    if "output_measurement" in given:
        raise UserError(
            "-om: convert.py does not measure; util/measure.py does, and -m takes what it writes"
        )
    for name, multiplier in MULTIPLIERS.items():
        if value := given.pop(f"{name}_multiplier", None):
            _check_multiplier(name, value, multiplier)
            if given.get("codebook", name) != name:
                raise UserError(f"-{name} and codebook {given['codebook']} contradict each other")
            given["codebook"] = name
            notes.append(f"-{name} {value}: codebook {name}")
    if target := given.pop("compile_full", None):
        notes.append(_place_of_exllamav2(given, target))
    fields = {f.name for f in dataclasses.fields(Settings)}
    return {k: v for k, v in given.items() if k in fields}, notes


def _check_multiplier(name: str, value: str, known: int) -> None:
    try:
        number = int(value, 0)
    except ValueError:
        number = None
    if number != known:
        raise UserError(f"-{name} {value}: readers know {known:#x} only; use -cb {name}")


def _place_of_exllamav2(given: dict[str, object], target: str) -> str:
    """-cf is the output folder; -o beside it, without -w, is exllamav2's working folder."""
    if "out_dir" in given and "work_dir" in given:
        raise UserError("-cf and -o both name the output folder beside -w; leave one of them out")
    if "out_dir" in given:
        given["work_dir"] = given["out_dir"]
        given["out_dir"] = target
        return (
            f"-cf: the output goes to {target}, the work to {given['work_dir']} (as in exllamav2)"
        )
    given["out_dir"] = target
    return f"-cf: the output goes to {target}"
