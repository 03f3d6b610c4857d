"""SHA256SUMS: the hash of every file of a model folder, as `sha256sum -c` reads it."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

from exl3.errors import UserError
from exl3.files import atomic_file

MANIFEST = "SHA256SUMS"
PIECE = 1 << 20  # bytes read at a time
MAX_BYTES = 1 << 24  # of a manifest: far more than any model has files

_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}  # those of sha256sum
_MEANINGS = {escape: character for character, escape in _ESCAPES.items()}

Done = Callable[[int], None]  # hears how many bytes were hashed


def file_names(folder: Path) -> list[str]:
    """The folder's files, sorted, by relative paths; neither hidden ones nor the manifest."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = (path for path in found if not any(part.startswith(".") for part in path.parts))
    return sorted(path.as_posix() for path in visible if path.as_posix() != MANIFEST)


def file_bytes(folder: Path) -> int:
    """Size of the folder's files together."""
    return sum((folder / name).stat().st_size for name in file_names(folder))


def file_digest(path: Path, done: Done = lambda nbytes: None) -> str:
    """SHA-256 (hex) of a file's content, however large."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            done(len(piece))
    return digest.hexdigest()


def write_manifest(folder: Path, done: Done = lambda nbytes: None) -> None:
    """Hashes the folder's files and lists them in its manifest, atomically."""
    lines = [_line(name, file_digest(folder / name, done)) for name in file_names(folder)]
    with atomic_file(folder / MANIFEST) as file:
        file.write("".join(lines).encode(errors="surrogateescape"))


def read_manifest(folder: Path) -> dict[str, str]:
    """File name → hash; UserError for a damaged manifest or a path that leaves the folder."""
    path = folder / MANIFEST
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{MANIFEST} is too large to be a list of hashes; download it again")
    sums = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        text = line.decode(errors="surrogateescape").removesuffix("\r")
        if not text:
            continue
        if not (match := _LINE.fullmatch(text)):
            raise UserError(f"{MANIFEST}: line {number} is no hash and name; download it again")
        escaped, digest, name = match.groups()
        if escaped:
            name = re.sub(r"\\.", lambda m: _MEANINGS.get(m[0], m[0]), name)
        _refuse_outside(name)
        sums[name] = digest
    return sums


def compare_manifest(folder: Path, sums: dict[str, str], done: Done) -> list[str]:
    """What is wrong with the files that a manifest lists, in plain sentences."""
    problems = []
    for name, digest in sums.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing, but {MANIFEST} lists it; download it again")
        elif file_digest(folder / name, done) != digest:
            problems.append(
                f"{name} is not what {MANIFEST} says (SHA-256 differs); download it again, or "
                "update its line there if you changed the file yourself"
            )
    return problems


def _line(name: str, digest: str) -> str:
    escaped = "".join(_ESCAPES.get(c, c) for c in name)
    mark = "\\" if escaped != name else ""
    return f"{mark}{digest}  {escaped}\n"


def _refuse_outside(name: str) -> None:
    # By its text: files may be links to elsewhere, as in Hugging Face's own cache. Windows' rules
    # know every way out: both slashes, drives, roots.
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or "\0" in name:
        raise UserError(
            f"{MANIFEST} lists {name!r}, which is outside the model's folder; do not use this file"
        )
