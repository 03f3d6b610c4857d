"""Where a model's files are: a folder, a GGUF file, or several folders with shards."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from exl3.errors import UserError
from exl3.evaluate.gguf_header import gguf_parts
from exl3.files import write_json
from exl3.format.directory import INDEX, WEIGHT_FILES
from exl3.model.checkpoint import SAMPLE, Checkpoint, read_header, read_json


class Place:
    """A model's folder, or GGUF file; several folders look like one.

    UserError if there is nothing.
    """

    def __init__(self, model_dir: str | Path | Sequence[str | Path]) -> None:
        places = [model_dir] if isinstance(model_dir, (str, Path)) else list(model_dir)
        paths = [Path(place) for place in places]
        for path in paths:
            if not path.exists():
                raise UserError(f"{path} does not exist; give the folder of a model")
        self._joined: TemporaryDirectory[str] | None = None
        if all(path.suffix == ".gguf" for path in paths):
            self.path = sorted(paths)[0]  # the first of a split model knows the others
        elif len(paths) == 1:
            self.path = paths[0]
        else:
            self._joined = _join(paths)
            self.path = Path(self._joined.name)
        self.name = str(paths[0])  # for messages

    @property
    def is_exl3(self) -> bool:
        """Whether config.json says so."""
        method = read_json(self.path / "config.json").get("quantization_config")
        return isinstance(method, dict) and method.get("quant_method") == "exl3"

    def fingerprint(self) -> str:
        """Hash (hex) of what the files hold: of configs and headers all, of data the ends."""
        if self.path.is_file():
            return _files_hash(gguf_parts(self.path))
        if any(self.path.glob("*.safetensors")):
            return Checkpoint(self.path).fingerprint()
        files = [f for f in self.path.iterdir() if f.suffix in WEIGHT_FILES]
        return _files_hash([self.path / "config.json", *sorted(files)])

    def close(self) -> None:
        if self._joined is not None:
            self._joined.cleanup()


def _join(folders: Sequence[Path]) -> "TemporaryDirectory[str]":
    """A folder of links to the shards of all folders, and to all else in the first with a config.

    Instead of a folder a single shard may be named.
    """
    main = next((f for f in folders if (f / "config.json").is_file()), None)
    if main is None:
        raise UserError(f"none of {', '.join(map(str, folders))} has a config.json")
    shards = []
    for folder in folders:
        found = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
        if not found or found[0].suffix != ".safetensors":
            raise UserError(
                f"{folder} has no safetensors files; only these may lie in several folders"
            )
        shards += found
    joined = TemporaryDirectory(prefix="exl3-model-")
    target = Path(joined.name)
    homes: dict[str, tuple[str, Path]] = {}  # tensor → the shard's name here, and its path
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _link(target / name, shard)
        for key in read_header(shard):
            if key in homes:
                raise UserError(f"{key} is in {homes[key][1]} and again in {shard}; remove one")
            homes[key] = (name, shard)
    write_json(
        target / INDEX, {"metadata": {}, "weight_map": {k: n for k, (n, _) in homes.items()}}
    )
    for file in main.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX:
            _link(target / file.name, file)
    return joined


def _link(link: Path, file: Path) -> None:
    try:
        os.symlink(file.resolve(), link)
    except OSError as error:
        raise UserError(
            f"{file} cannot be linked ({error.strerror}); put the model's files into one folder"
        ) from None


def _files_hash(files: Sequence[Path]) -> str:
    """sha256 of the files' names, sizes and ends."""
    digest = hashlib.sha256()
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing; give the folder of a model")
        size = path.stat().st_size
        digest.update(f"{len(path.name)} {path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()
