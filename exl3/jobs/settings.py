"""What a conversion is asked for: its settings, their limits, and what may change on resume."""

import argparse
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from exl3.cli import read_devices
from exl3.errors import UserError
from exl3.files import PARTIAL, write_json
from exl3.measurement import read_measurement
from exl3.recipe import Recipe, read_recipe

CODEBOOKS = ("mul1", "mcg", "3inst")
OUT_SCALES = ("always", "never", "auto")
HESSIANS = ("kron", "input")


@dataclass
class Settings:
    """A conversion's settings; `work_dir/job.json` keeps them."""

    in_dir: str
    out_dir: str
    work_dir: str
    bits: float
    head_bits: int = 6
    codebook: str = "mul1"
    out_scales: str = "always"
    hq: bool = False
    uniform: bool = False
    no_correction: bool = False
    hessian: str = "kron"
    hessian_rows: int | None = None  # None: `gradient_rows`
    save_hessians: str | None = None
    tune: int = 0  # steps; 0: scales stay as they are found
    cal_rows: int = 250
    cal_cols: int = 2048
    cal_file: str | None = None  # a file, or the name of a dataset
    cal_split: str = "train"
    cal_column: str | None = None
    cal_stride: int | None = None
    rope_alpha: float | None = None
    rope_scale: float | None = None
    seed: int = 0
    check_rows: int = 8
    measurement: str | None = None  # a file, as its hash in the next line
    measurement_hash: str | None = None
    recipe: str | None = None  # likewise
    recipe_hash: str | None = None
    shard_size: int = 8192  # MiB; 0: no limit
    devices: str = "0"
    max_memory: float | None = None  # GiB; None: what is free
    checkpoint_interval: int = 60  # seconds
    verbose: bool = False
    trust_remote_code: bool = False


# What the bytes of the result do not depend on, and so may change on resume. The source may move;
# that it is the same is found by its hash.
HARMLESS = (
    "in_dir",
    "out_dir",
    "work_dir",
    "check_rows",
    "measurement",
    "recipe",
    "shard_size",
    "devices",
    "max_memory",
    "save_hessians",
    "checkpoint_interval",
    "verbose",
    "trust_remote_code",
)
DEFINING = tuple(f.name for f in dataclasses.fields(Settings) if f.name not in HARMLESS)
JOB_NAMES = (
    *("job.json", "identity.json", "check.json", "lock", "layers", "routers", "experts"),
    *("calibration.safetensors", "states.safetensors", "gradients", "tuned"),
    "sensitivities.json",
)
FORGOTTEN = (  # with a job
    *("calibration.safetensors", "states.safetensors", "layers/*.safetensors"),
    *("routers/*.safetensors", "experts/*.json", "gradients/*.safetensors"),
    *("tuned/*.safetensors", "tuned/way.json"),
)
FOLDERS = ("in_dir", "out_dir", "work_dir")
SHORT = {
    "in_dir": "-i",
    "out_dir": "-o",
    "work_dir": "-w",
    "bits": "-b",
    "head_bits": "-hb",
    "codebook": "-cb",
    "cal_rows": "-cr",
    "cal_cols": "-cc",
    "cal_file": "-c",
    "measurement": "-m",
    "measurement_hash": "-m",
    "recipe_hash": "--recipe",
    "shard_size": "-ss",
    "devices": "-d",
    "checkpoint_interval": "-cpi",
    "rope_alpha": "-ra",
    "rope_scale": "-rs",
}
LIMITS = {
    "bits": (1, 8),
    "cal_rows": (1, 1_000_000),
    "cal_cols": (8, 1_000_000),
    "cal_stride": (1, 1_000_000_000),
    "shard_size": (0, 1_000_000_000),
    "checkpoint_interval": (0, 1_000_000_000),
    "check_rows": (0, 100_000),
    "hessian_rows": (1, 100_000),
    "tune": (0, 100_000),
    "max_memory": (0.1, 1_000_000),
    "rope_alpha": (0.01, 1000),
    "rope_scale": (0.01, 1000),
    "seed": (0, 2**63 - 1),
}
AGREE = 0.005  # bits: how near -b must be to what a recipe says
DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
TEXT_FILES = (".txt", ".jsonl", ".parquet")


def flag(name: str) -> str:
    """The flag of a setting, as users know it."""
    return SHORT.get(name, f"--{name}")


@dataclass
class Request:
    """A command line understood."""

    settings: Settings
    resumed: bool = False  # a job in the work folder goes on
    dry_run: bool = False
    fresh: bool = False  # what is in the work folder is to be forgotten
    notes: tuple[str, ...] = ()  # lines to tell the user


def read_request(args: argparse.Namespace) -> Request:
    """Settings from the command line and, on resume, from the work folder's job.json.

    A new job's settings are saved at once. UserError for what is missing, out of range, or would
    mix two jobs.
    """
    from exl3.jobs.flags import interpret

    given, notes = interpret(args)
    for name in (*FOLDERS, "save_hessians"):
        if name in given:
            given[name] = _absolute(flag(name), given[name])
    if "cal_file" in given:
        given["cal_file"] = calibration_source(given["cal_file"])
    if {"measurement", "recipe"} & given.keys():
        _read_shares(given)
    if args.dry_run:
        return _dry_run(given, notes)
    if "work_dir" not in given:
        raise UserError("where should the work go? Give -w DIR (a folder for the job's progress)")
    work = Path(given["work_dir"])
    unknown = dict.fromkeys(FOLDERS, "") | {"bits": LIMITS["bits"][0]}
    check_ranges(Settings(**unknown | given))  # before anything is compared with a stored job
    if args.no_resume and args.resume:
        raise UserError("-r and -nr contradict each other; give one of them")
    stored = None if args.no_resume else load_settings(work)
    if stored and not args.resume and not has_progress(work):
        stored = None  # nothing is lost
    if stored is None:
        settings = _new_job(given, args.resume)
    else:
        asked = given if args.resume else dataclasses.asdict(Settings(**_whole(given, stored)))
        settings, changes = _merge(stored, asked, given)
        notes += changes
    check(settings)
    if stored is None and not args.no_resume:
        save_settings(settings)  # at once, so that -r knows the job from its first moment on
    resumed = stored is not None and has_progress(work)
    return Request(settings, resumed, fresh=args.no_resume, notes=tuple(notes))


def _read_shares(given: dict) -> None:
    """Adds what a measurement or a recipe says, and their hashes. UserError for damaged ones."""
    from exl3.format.manifest import file_digest  # here: it takes a second

    if {"measurement", "recipe"} <= given.keys():
        raise UserError("-m and --recipe both share out the bits; give one of them")
    for name, read in (("measurement", read_measurement), ("recipe", read_recipe)):
        if name in given:
            given[name] = _absolute(flag(name), given[name])
            content = read(given[name])
            given[f"{name}_hash"] = file_digest(Path(given[name]))
    if "recipe" in given:
        _add_recipe(given, content)


def _add_recipe(given: dict, recipe: Recipe) -> None:
    """The settings that a recipe brings along; what the user says of them must agree, or wins."""
    if given.get("hq"):
        raise UserError("-hq changes bits that --recipe has settled; leave one of them out")
    told = [bits for bits in (recipe.bits, recipe.target) if bits is not None]
    asked = given.get("bits", recipe.bits)
    if not any(abs(asked - bits) < AGREE for bits in told):
        raise UserError(f"-b {asked:g} contradicts --recipe, which makes {recipe.bits:g} bits")
    given["bits"] = recipe.bits
    for name in ("head_bits", "codebook"):
        if getattr(recipe, name) is not None:
            given.setdefault(name, getattr(recipe, name))


def _new_job(given: dict, resume: bool) -> Settings:
    if resume:
        raise UserError(
            f"there is no job in {given['work_dir']} to resume; "
            f"start one with -i MODEL -o OUTPUT -w {given['work_dir']} -b BITS"
        )
    if missing := [flag(name) for name in ("in_dir", "out_dir", "bits") if name not in given]:
        raise UserError(f"missing: {', '.join(missing)}; try --help")
    _refuse_other_folders(Path(given["work_dir"]))
    return Settings(**given)


def _refuse_other_folders(work: Path) -> None:
    """UserError if a work folder holds anything that no job of ours has put there."""
    if not work.is_dir():
        return
    for path in work.iterdir():
        if path.name not in JOB_NAMES and not path.name.endswith(PARTIAL) and not has_job(work):
            raise UserError(
                f"-w {work} holds something that is no job ({path.name}); give a new or an empty "
                "folder"
            )


def has_job(work: Path) -> bool:
    """Whether there is a job in a folder, however far it got."""
    return (work / "job.json").exists() or has_progress(work)


def _dry_run(given: dict, notes: list[str]) -> Request:
    """A dry run needs no folders but the model's; those given say which disks to look at."""
    if missing := [flag(name) for name in ("in_dir", "bits") if name not in given]:
        raise UserError(f"missing: {', '.join(missing)}; try --help")
    here = str(Path.cwd())
    settings = Settings(**{"out_dir": f"{here}/out", "work_dir": f"{here}/work"} | given)
    check(settings)
    return Request(settings, dry_run=True, notes=tuple(notes))


def partial_folder(out_dir: str) -> Path:
    """Where the output is put together before it gets its name."""
    out = Path(out_dir)
    return out.with_name(out.name + ".exl3-partial")


def forget_job(work: Path) -> None:
    """Removes what a job left in its work folder, and nothing else; nothing if there was none."""
    if load_settings(work) is None and not has_progress(work):
        return
    for name in ("job.json", "identity.json", "check.json", "sensitivities.json"):
        (work / name).unlink(missing_ok=True)
    for pattern in FORGOTTEN:
        for path in work.glob(pattern):
            path.unlink()


def has_progress(work: Path) -> bool:
    """Whether the job of a work folder got beyond its settings."""
    return (work / "identity.json").exists()


def load_settings(work: Path) -> Settings | None:
    """The settings of the job in a work folder, None if there is no job."""
    path = work / "job.json"
    if not path.is_file():
        return None
    try:
        settings = Settings(**json.loads(path.read_text()))
        check_ranges(settings)
        if not all(isinstance(getattr(settings, name), str) for name in FOLDERS):
            raise TypeError("a folder that is no text")
    except (ValueError, TypeError, UserError) as error:
        raise UserError(
            f"{path} is damaged ({error}); start afresh in another work folder"
        ) from None
    return settings


def save_settings(settings: Settings) -> None:
    """Writes the work folder's job.json."""
    folder = Path(settings.work_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "job.json", dataclasses.asdict(settings))
    except OSError as error:
        raise UserError(
            f"-w {folder} cannot be written to ({error.strerror}); choose another folder"
        ) from None


def _whole(given: dict, stored: Settings) -> dict:
    """A command line without -r may still leave out -i, -o and -b, which have no default."""
    return {k: getattr(stored, k) for k in ("in_dir", "out_dir", "bits")} | given


def _merge(stored: Settings, asked: dict, given: dict) -> tuple[Settings, list[str]]:
    """The stored job with harmless changes taken over; UserError for any other change."""
    changed = {k: v for k, v in asked.items() if v != getattr(stored, k)}
    mixing = [k for k in DEFINING if k in changed]
    if mixing:
        mixing.sort(key=lambda k: k not in given)  # what the user said comes first
        what = "; ".join(
            f"{flag(k)} was {getattr(stored, k)}, now {changed[k]}"
            + ("" if k in given else " by default")
            for k in mixing
        )
        raise UserError(
            f"{stored.work_dir} holds a different job ({what}). Resume that one with "
            f"-w {stored.work_dir} -r, start this one in another work folder, or forget that one "
            f"with -nr"
        )
    told = [f"{flag(k)} is now {v} (was {getattr(stored, k)})" for k, v in changed.items()]
    return dataclasses.replace(stored, **changed), told


def _absolute(name: str, text: str) -> str:
    """A path without `~`, links and dots."""
    try:
        text.encode()
        return str(Path(text).expanduser().resolve())
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{name} {text!r} is no usable path: {error}") from None


def calibration_source(text: str) -> str:
    """An existing file or folder, made absolute, or the name of a dataset."""
    path = Path(_absolute("-c", text))
    if path.exists():
        return str(path)
    named = Path(text.partition(":")[0]).suffix.lower()
    if DATASET.fullmatch(text) and not {named, path.suffix.lower()} & set(TEXT_FILES):
        return text
    raise UserError(f"-c {text} is no file; give a .txt, .jsonl or .parquet file, or a dataset")


def check_ranges(s: Settings) -> None:
    """UserError for the first setting that is out of range."""
    for name, (low, high) in LIMITS.items():
        value = getattr(s, name)
        if value is not None and not low <= value <= high:  # also refuses NaN
            raise UserError(f"{flag(name)} {value} is out of range: {low} to {high}")
    if s.head_bits not in (*range(1, 9), 16):
        raise UserError(f"-hb {s.head_bits} is out of range: 1 to 8, or 16 (unquantized)")
    read_devices(s.devices)


def _check_shared(s: Settings) -> None:
    """UserError unless --save_hessians is a folder of its own, which no job clears away."""
    if s.hessian == "input":
        raise UserError("--save_hessians: --hessian input makes none; leave one of them out")
    folder = Path(s.save_hessians)
    for name in FOLDERS:
        if folder.is_relative_to(getattr(s, name)):
            raise UserError(
                f"--save_hessians {folder} lies inside {flag(name)}; give a folder of its own"
            )
    if folder.is_relative_to(partial_folder(s.out_dir)) or (
        folder.exists() and not folder.is_dir()
    ):
        raise UserError(f"--save_hessians {folder} can be no folder; give another")


def make_shared(s: Settings) -> None:
    """Makes the folder of --save_hessians. UserError where that cannot be."""
    try:
        if s.save_hessians is not None:
            Path(s.save_hessians).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--save_hessians {s.save_hessians} cannot be made ({error.strerror}); give another"
        ) from None


def check(s: Settings) -> None:
    """UserError for the first setting that is out of range or contradicts another."""
    check_ranges(s)
    for a, b in (("in_dir", "out_dir"), ("in_dir", "work_dir"), ("out_dir", "work_dir")):
        if getattr(s, a) == getattr(s, b):
            raise UserError(f"{flag(a)} and {flag(b)} are the same folder; they must differ")
    for inner, outer in (("work_dir", "out_dir"), ("out_dir", "work_dir"), ("in_dir", "out_dir")):
        if Path(getattr(s, inner)).is_relative_to(getattr(s, outer)):
            raise UserError(
                f"{flag(inner)} {getattr(s, inner)} lies inside {flag(outer)} "
                f"{getattr(s, outer)}; give folders apart from each other"
            )
    partial = partial_folder(s.out_dir)
    for name in ("in_dir", "work_dir"):
        if Path(getattr(s, name)).is_relative_to(partial):
            raise UserError(f"{flag(name)}: the output is put together in {partial}; give another")
    if s.save_hessians is not None:
        _check_shared(s)
    if s.uniform and (s.measurement or s.recipe):
        raise UserError(
            "--uniform: -m and --recipe give tensors different bits; leave one of them out"
        )
    if s.uniform and s.bits != int(s.bits):
        raise UserError(f"-b {s.bits:g} --uniform: only whole bits can be the same for all tensors")
    if not Path(s.in_dir).is_dir():
        raise UserError(f"-i {s.in_dir} is no folder; give the folder of a Hugging Face model")
