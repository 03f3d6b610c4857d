"""What a conversion is asked for: the flags of convert.py, in one table, and their checks."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from exl3.errors import UserError
from exl3.files import write_json

CODEBOOKS = ("mul1", "mcg", "3inst")


@dataclass
class Settings:
    """A conversion's settings; `work_dir/job.json` keeps them."""

    in_dir: str
    out_dir: str
    work_dir: str
    bits: float
    head_bits: int = 6
    codebook: str = "mul1"
    cal_rows: int = 250
    cal_cols: int = 2048
    cal_file: str | None = None
    seed: int = 0
    shard_size: int = 8192  # MiB
    devices: str = "0"
    checkpoint_interval: int = 60  # seconds
    verbose: bool = False
    trust_remote_code: bool = False


# Changing one of these while resuming would mix two jobs' results in one model. (So would another
# source model; that is found by its hash, so that a source may be moved.)
DEFINING = (
    "bits",
    "head_bits",
    "codebook",
    "cal_rows",
    "cal_cols",
    "cal_file",
    "seed",
)
FLAG = {
    "in_dir": "-i",
    "out_dir": "-o",
    "work_dir": "-w",
    "bits": "-b",
    "head_bits": "-hb",
    "codebook": "-cb",
    "cal_rows": "-cr",
    "cal_cols": "-cc",
    "cal_file": "-c",
    "seed": "--seed",
    "shard_size": "-ss",
    "devices": "-d",
    "checkpoint_interval": "-cpi",
}


def convert_parser() -> argparse.ArgumentParser:
    """The command line of convert.py. Defaults are None, to tell what was given on resume."""
    default = {f.name: f.default for f in dataclasses.fields(Settings)}
    p = argparse.ArgumentParser(
        prog="convert.py",
        allow_abbrev=False,
        description="Converts a Hugging Face model to an EXL3 quant.",
    )

    def add(*names: str, help: str, **kwargs: object) -> None:
        dest = names[-1].lstrip("-")
        known = isinstance(default[dest], int | str) and "action" not in kwargs
        shown = f" (default: {default[dest]})" if known else ""
        p.add_argument(*names, help=help + shown, **kwargs)

    add("-i", "--in_dir", metavar="DIR", help="the original model")
    add("-o", "--out_dir", metavar="DIR", help="the quant to write; must not exist or be empty")
    add("-w", "--work_dir", metavar="DIR", help="keeps the job's progress; any folder of its own")
    add("-b", "--bits", type=float, metavar="BPW", help="bits per weight, 1 to 8, e.g. 3.5")
    add("-hb", "--head_bits", type=int, metavar="K", help="bits per weight of the head, 1 to 8")
    p.add_argument(
        "-r", "--resume", action="store_true", help="go on with the job of -w; needs no other flag"
    )
    add("-cpi", "--checkpoint_interval", type=int, metavar="SEC", help="seconds between saves")
    text = "calibration text: .txt, .jsonl or .parquet (default: text every machine has)"
    add("-c", "--cal_file", metavar="FILE", help=text)
    add("-cr", "--cal_rows", type=int, metavar="N", help="calibration rows")
    add("-cc", "--cal_cols", type=int, metavar="N", help="tokens in a calibration row")
    add("-cb", "--codebook", choices=CODEBOOKS, help="codebook of the trellis")
    add("-ss", "--shard_size", type=int, metavar="MB", help="largest output file")
    add("-d", "--devices", metavar="N[,N]", help="GPUs to use, or cpu")
    add("--seed", type=int, metavar="N", help="of the random signs and random calibration rows")
    switch = {"action": "store_true", "default": None}
    add("-v", "--verbose", help="more about the job", **switch)
    add("--trust_remote_code", help="run code that the model brings along", **switch)
    return p


def read_settings(args: argparse.Namespace) -> tuple[Settings, bool, list[str]]:
    """Settings from the command line and, on resume, from the work folder's job.json.

    Returns the settings, whether a job in the work folder goes on, and lines to tell the user.
    UserError for what is missing, out of range, or would mix two jobs.
    """
    given = {k: v for k, v in vars(args).items() if v is not None and k != "resume"}
    if "work_dir" not in given:
        raise UserError("where should the work go? Give -w DIR (a folder for the job's progress)")
    for name in ("in_dir", "out_dir", "work_dir", "cal_file"):
        if name in given:
            given[name] = str(Path(given[name]).expanduser().resolve())
    stored = load_settings(Path(given["work_dir"]))
    if stored and not args.resume and not has_progress(Path(given["work_dir"])):
        stored = None  # nothing is lost
    if stored is None:
        if args.resume:
            raise UserError(
                f"there is no job in {given['work_dir']} to resume; "
                f"start one with -i MODEL -o OUTPUT -w {given['work_dir']} -b BITS"
            )
        needed = ("in_dir", "out_dir", "bits")
        if missing := [FLAG[name] for name in needed if name not in given]:
            raise UserError(f"missing: {', '.join(missing)}; try --help")
        settings, notes = Settings(**given), []
    else:
        asked = given if args.resume else dataclasses.asdict(Settings(**_whole(given, stored)))
        settings, notes = _merge(stored, asked)
    _check(settings)
    if not stored:  # at once, so that -r knows the job from its first moment on
        save_settings(settings)
    return settings, has_progress(Path(settings.work_dir)), notes


def has_progress(work_dir: Path) -> bool:
    """Whether the job of a work folder got beyond its settings."""
    return (work_dir / "identity.json").exists()


def load_settings(work_dir: Path) -> Settings | None:
    """The settings of the job in a work folder, None if there is no job."""
    path = work_dir / "job.json"
    if not path.is_file():
        return None
    try:
        return Settings(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); start afresh in another work folder"
        ) from None


def save_settings(settings: Settings) -> None:
    """Writes the work folder's job.json."""
    folder = Path(settings.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "job.json", dataclasses.asdict(settings))


def _whole(given: dict, stored: Settings) -> dict:
    """A command line without -r may still leave out -i, -o and -b, which have no default."""
    return {k: getattr(stored, k) for k in ("in_dir", "out_dir", "bits")} | given


def _merge(stored: Settings, asked: dict) -> tuple[Settings, list[str]]:
    """The stored job with harmless changes taken over; UserError for any other change."""
    changed = {k: v for k, v in asked.items() if v != getattr(stored, k)}
    mixing = [k for k in DEFINING if k in changed]
    if mixing:
        what = "; ".join(f"{FLAG[k]} was {getattr(stored, k)}, now {changed[k]}" for k in mixing)
        raise UserError(
            f"{stored.work_dir} holds a different job ({what}). Resume that one with "
            f"-w {stored.work_dir} -r, or start this one in another work folder"
        )
    notes = [
        f"{FLAG[k]} is now {v} (was {getattr(stored, k)})" for k, v in changed.items() if k in FLAG
    ]
    return dataclasses.replace(stored, **changed), notes


def _check(s: Settings) -> None:
    limits = (
        ("bits", 1, 8),
        ("head_bits", 1, 8),
        ("cal_rows", 1, 1_000_000),
        ("cal_cols", 8, 1_000_000),
        ("shard_size", 1, 1_000_000),
        ("checkpoint_interval", 0, 1_000_000),
        ("seed", 0, 2**63 - 1),
    )
    for name, low, high in limits:
        value = getattr(s, name)
        if not low <= value <= high:  # also refuses NaN
            raise UserError(f"{FLAG[name]} {value} is out of range: {low} to {high}")
    if s.devices != "cpu" and not all(d.strip().isdigit() for d in s.devices.split(",")):
        raise UserError(f"-d {s.devices}: give device numbers like 0 or 0,1, or cpu")
    places = {"-i": s.in_dir, "-o": s.out_dir, "-w": s.work_dir}
    for a, b in (("-i", "-o"), ("-i", "-w"), ("-o", "-w")):
        if places[a] == places[b]:
            raise UserError(f"{a} and {b} are the same folder, {places[a]}; they must differ")
    if not Path(s.in_dir).is_dir():
        raise UserError(f"-i {s.in_dir} is no folder; give the folder of a Hugging Face model")
    if s.cal_file is not None and not Path(s.cal_file).is_file():
        raise UserError(f"-c {s.cal_file} is no file; give a .txt, .jsonl or .parquet file")
