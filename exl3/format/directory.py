"""A model directory: which tensor goes into which shard, and what the configs say of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from exl3.errors import UserError
from exl3.files import copy_file, write_json
from exl3.format.codebook import CODEBOOKS
from exl3.tensor_files import LazyTensor, write_safetensors

FORMAT_VERSION = "1.0.0"  # of the format's readers
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class StoredModule:
    """A leaf module's tensors, which stay in one shard."""

    name: str
    tensors: tuple[LazyTensor, ...]
    bits: int | None = None  # K where it is quantized
    codebook: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


def plan_shards(modules: list[StoredModule], limit: int) -> list[list[StoredModule]]:
    """Cuts modules, in order, into shards of at most `limit` bytes (a larger module: its own)."""
    shards: list[list[StoredModule]] = [[]]
    size = 0
    for module in modules:
        if shards[-1] and size + module.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(module)
        size += module.nbytes
    return shards


def write_weights(
    folder: Path,
    modules: list[StoredModule],
    shard_bytes: int,
    done: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes the shards, and their index where there are several. `done` hears of bytes."""
    shards = plan_shards(modules, shard_bytes)
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = [t for module in shard for t in module.tensors]
        path = folder / ("model.safetensors" if single else name)
        write_safetensors(path, tensors, {"format": "pt"})
        weight_map |= {t.key: name for t in tensors}
        done(sum(module.nbytes for module in shard))
    if not single:
        total = sum(m.nbytes for m in modules)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_configs(
    folder: Path, source_config: dict, quantization: dict, modules: list[StoredModule]
) -> None:
    """config.json with the quantization config, and quantization_config.json with all tensors."""
    config = dict(source_config)
    if before := config.pop("quantization_config", None):
        quantization = {**quantization, "original_quantization_config": before}
    write_json(folder / "config.json", {**config, "quantization_config": quantization})
    storage = {module.name: _storage(module) for module in modules}
    write_json(folder / "quantization_config.json", {**quantization, "tensor_storage": storage})


def _storage(module: StoredModule) -> dict:
    entry: dict[str, object] = {
        "stored_tensors": {
            t.key: {"shape": list(t.shape), "n_bytes": t.nbytes, "dtype": str(t.dtype)}
            for t in module.tensors
        }
    }
    if module.bits is not None:
        entry |= {"quant_format": "exl3", "bits_per_weight": module.bits}
        if (multiplier := CODEBOOKS[module.codebook].multiplier) is not None:
            entry[f"{module.codebook}_multiplier"] = multiplier
    return entry


def copy_small_files(source: Path, folder: Path) -> None:
    """Copies tokenizer, chat templates, generation config and the like; no weights, no configs."""
    for path in small_files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        copy_file(path, target)


def small_files(source: Path) -> Iterator[Path]:
    ours = ("config.json", "quantization_config.json")
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name == "additional_chat_templates":
            yield from sorted(p for p in path.iterdir() if p.is_file())
        elif (
            path.is_file()
            and path.name not in ours
            and path.suffix not in WEIGHT_FILES
            and not path.name.endswith(".index.json")
            and not path.name.startswith(".")
        ):
            yield path


def read_config(folder: Path) -> dict:
    """config.json of a model folder; UserError if it is missing or no JSON object."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json; give the folder of a model") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    return config


def stored_dtype(key: str, dtype: torch.dtype, embedding: bool) -> torch.dtype:
    """The dtype of a tensor that is not quantized, as readers expect it.

    Embeddings and norms keep bfloat16; all else is float16.
    """
    leaf = key.rpartition(".")[0].rpartition(".")[2]
    if dtype == torch.bfloat16 and (embedding or "norm" in leaf or leaf.startswith("ln")):
        return torch.bfloat16
    return torch.float16 if dtype.is_floating_point else dtype
