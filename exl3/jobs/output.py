"""The finished model's folder: it appears whole or not at all."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from exl3 import __version__
from exl3.allocate import Module, average_bits
from exl3.errors import UserError
from exl3.files import PARTIAL, sync_folder
from exl3.format.directory import (
    FORMAT_VERSION,
    StoredModule,
    copy_small_files,
    read_config,
    stored_dtype,
    write_configs,
    write_weights,
)
from exl3.format.layer import padded
from exl3.jobs.settings import Settings
from exl3.jobs.source import Source
from exl3.jobs.workdir import WorkDir
from exl3.tensor_files import LazyTensor


def refuse_strangers(settings: Settings) -> None:
    """UserError if the output folder holds anything that no job of ours wrote."""
    folder = Path(settings.out_dir)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"-o {folder} is a file; give a folder that does not exist yet")
    if any(folder.iterdir()) and _job_of(folder) is None:
        raise UserError(f"-o {folder} is not empty; give a new folder, or empty this one")


def is_complete(settings: Settings, job_id: str) -> bool:
    """Whether the output is there already; UserError if it is that of another job."""
    found = _job_of(Path(settings.out_dir))
    if found not in (None, job_id):
        raise UserError(f"-o {settings.out_dir} holds the result of another job; give a new folder")
    return found == job_id


def _job_of(folder: Path) -> str | None:
    """The job that wrote a model folder, None if it was not one of ours."""
    if not (folder / "config.json").is_file():
        return None
    quantization = read_config(folder).get("quantization_config")
    producer = quantization.get("producer") if isinstance(quantization, dict) else None
    return producer.get("job") if isinstance(producer, dict) else None


def write(
    settings: Settings, work: WorkDir, source: Source, modules: list[Module], bits: dict[str, int]
) -> int:
    """Writes the model folder from the source and the finished layers. Returns its bytes."""
    target = Path(settings.out_dir)
    folder = target.with_name(target.name + PARTIAL)
    if folder.exists():
        shutil.rmtree(folder)  # of a run that was killed
    folder.mkdir(parents=True)
    stored = list(stored_modules(settings, work, source, bits))
    write_weights(folder, stored, settings.shard_size << 20)
    config = quantization_config(settings, source, average_bits(modules, bits))
    write_configs(folder, read_config(Path(settings.in_dir)), config, stored)
    copy_small_files(Path(settings.in_dir), folder)
    if target.exists():
        target.rmdir()  # empty: `refuse_strangers` has looked
    folder.rename(target)
    sync_folder(target.parent)
    return sum(module.nbytes for module in stored)


def quantization_config(settings: Settings, source: Source, bits: float) -> dict:
    """What the configs say about how the quant was made."""
    rows, cols = source.rows.shape
    return {
        "quant_method": "exl3",
        "version": FORMAT_VERSION,
        "bits": round(bits, 2),
        "head_bits": settings.head_bits,
        "calibration": {"rows": rows, "cols": cols},
        "out_scales": "always",
        "codebook": settings.codebook,
        "producer": {
            "name": "exl3",
            "version": __version__,
            "job": source.job_id,
            "seed": settings.seed,
            "calibration_hash": source.identity["calibration rows"],
        },
    }


def stored_modules(
    settings: Settings, work: WorkDir, source: Source, bits: dict[str, int]
) -> Iterator[StoredModule]:
    """Every module of the output in the order of the model."""
    model = source.model
    embedding = set(model.embedding_keys())
    keys = list(model.embedding_keys())
    for i in range(model.num_blocks):
        keys += model.block_keys(i)
    keys += model.tail_keys()
    names = dict.fromkeys(key.rpartition(".")[0] for key in keys)
    names[model.head()[0]] = None  # a tied head has no key of its own
    for name in names:
        plain = [key for key in keys if key.rpartition(".")[0] == name]
        tensors = [_plain(source, key, key in embedding) for key in plain]
        if name in bits:
            tensors = list(_quantized(work, name))
            if f"{name}.bias" in plain:
                tensors.append(_bias(source, f"{name}.bias"))
        is_quantized = name in bits
        yield StoredModule(
            name,
            tuple(tensors),
            bits[name] if is_quantized else None,
            settings.codebook if is_quantized else None,
        )


def _quantized(work: WorkDir, name: str) -> Iterator[LazyTensor]:
    for leaf, tensor in work.load_layer(name).items():
        load = partial(_load_leaf, work, name, leaf)
        yield LazyTensor(f"{name}.{leaf}", tuple(tensor.shape), tensor.dtype, load)


def _load_leaf(work: WorkDir, name: str, leaf: str) -> torch.Tensor:
    return work.load_layer(name)[leaf]


def _plain(source: Source, key: str, embedding: bool) -> LazyTensor:
    checkpoint = source.model.checkpoint
    dtype = stored_dtype(key, checkpoint.dtype(key), embedding)
    load = partial(_load_plain, source, key, dtype)
    return LazyTensor(key, tuple(checkpoint.shape(key)), dtype, load)


def _load_plain(source: Source, key: str, dtype: torch.dtype) -> torch.Tensor:
    tensor = source.model.checkpoint.tensor(key)
    cast = tensor.to(dtype)
    if tensor.is_floating_point() and not torch.isfinite(cast).all():
        raise UserError(f"{key} holds values that {dtype} cannot; the source model is damaged")
    return cast


def _bias(source: Source, key: str) -> LazyTensor:
    """A quantized layer's bias, padded like the layer."""
    (size,) = source.model.checkpoint.shape(key)
    full = padded(size)
    return LazyTensor(
        key,
        (full,),
        torch.float16,
        lambda: F.pad(_load_plain(source, key, torch.float16), (0, full - size)),
    )
