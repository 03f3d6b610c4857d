"""Every tensor of the finished model, known by its shape before it is made."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from exl3.errors import UserError
from exl3.format.codebook import CODEBOOKS
from exl3.format.directory import StoredModule, stored_dtype
from exl3.format.layer import UNQUANTIZED, padded
from exl3.format.trellis import TILE
from exl3.jobs.plan import Plan
from exl3.jobs.settings import Settings
from exl3.model.streamed import StreamedModel
from exl3.tensor_files import LazyTensor

CHOICE = "e_score_correction_bias"  # added to a router's scores
LoadLayer = Callable[[str], dict[str, torch.Tensor]]  # a finished layer's tensors, by its key


def stored_modules(
    settings: Settings, model: StreamedModel, plan: Plan, load_layer: LoadLayer
) -> Iterator[StoredModule]:
    """Every module of the output in the order of the model."""
    embedding = set(model.embedding_keys())
    parts = (model.block_keys(i) for i in range(model.num_blocks))
    keys = [*model.embedding_keys(), *(key for part in parts for key in part), *model.tail_keys()]
    linears = model.linears()
    names: dict[str, list[str]] = {}
    for key in keys:
        names.setdefault(key.rpartition(".")[0], []).append(key)
    if settings.head_bits != UNQUANTIZED:
        names.setdefault(model.head()[0], [])  # a tied head has no key of its own
    for name, own in names.items():
        if name in plan.bits:
            yield _quantized(settings, model, plan.bits[name], name, linears[name], own, load_layer)
            continue
        tensors = [_plain(model, key, key in embedding) for key in own]
        around, _, leaf = name.rpartition(".")
        if leaf == "gate" and (key := f"{around}.{CHOICE}") in names.get(around, ()):
            # One reader looks for it beside the router's weight, where the source has none.
            tensors.append(replace(_plain(model, key, False), key=f"{name}.{CHOICE}"))
        yield StoredModule(name, tuple(tensors))


def _quantized(
    settings: Settings,
    model: StreamedModel,
    bits: int,
    name: str,
    linear: torch.nn.Linear,
    keys: list[str],
    load_layer: LoadLayer,
) -> StoredModule:
    rows, columns = padded(linear.in_features), padded(linear.out_features)
    shapes = {
        "suh": ((rows,), torch.float16),
        "svh": ((columns,), torch.float16),
        "trellis": ((rows // TILE, columns // TILE, TILE * bits), torch.int16),
    }
    if CODEBOOKS[settings.codebook].marker is not None:
        shapes[settings.codebook] = ((), torch.int32)
    tensors = [
        LazyTensor(f"{name}.{leaf}", shape, dtype, partial(_leaf, load_layer, name, leaf))
        for leaf, (shape, dtype) in sorted(shapes.items())
    ]
    if (bias := f"{name}.bias") in keys:
        load = partial(_padded_bias, model, bias, columns)
        tensors.append(LazyTensor(bias, (columns,), torch.float16, load))
    return StoredModule(name, tuple(tensors), bits, settings.codebook)


def _leaf(load_layer: LoadLayer, name: str, leaf: str) -> torch.Tensor:
    return load_layer(name)[leaf]


def _padded_bias(model: StreamedModel, key: str, size: int) -> torch.Tensor:
    bias = _load(model, key, torch.float16)
    return F.pad(bias, (0, size - len(bias)))


def _plain(model: StreamedModel, key: str, embedding: bool) -> LazyTensor:
    checkpoint = model.checkpoint
    dtype = stored_dtype(key, checkpoint.dtype(key), embedding)
    return LazyTensor(key, tuple(checkpoint.shape(key)), dtype, partial(_load, model, key, dtype))


def _load(model: StreamedModel, key: str, dtype: torch.dtype) -> torch.Tensor:
    tensor = model.checkpoint.tensor(key)
    cast = tensor.to(dtype)
    if tensor.is_floating_point() and not torch.isfinite(cast).all():
        where = f"{model.checkpoint.file(key)}: {key}"
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{where} holds non-finite values: the source model is damaged; download it again"
            )
        raise UserError(
            f"{where} has values up to {float(tensor.abs().max()):.3g}, which {dtype} cannot hold "
            f"(at most {torch.finfo(dtype).max:.3g}); readers want this tensor in that type"
        )
    return cast


def with_made(module: StoredModule, made: dict[str, torch.Tensor]) -> StoredModule:
    """A module with corrected and tuned tensors in the place of those with the same key, shape and
    dtype."""
    tensors = (LazyTensor.of(t.key, made[t.key]) if t.key in made else t for t in module.tensors)
    return replace(module, tensors=tuple(tensors))


def refuse_what_cannot_be_stored(settings: Settings, model: StreamedModel, plan: Plan) -> None:
    """UserError for tensors that would fail at the end, after all the work: all that are stored as
    they are, biases, and a head that is quantized last."""

    def unused(key: str) -> dict[str, torch.Tensor]:
        raise AssertionError(f"{key} is not there yet")

    for module in stored_modules(settings, model, plan, unused):
        for tensor in module.tensors:
            if module.bits is None or tensor.key.endswith(".bias"):
                tensor.load()
    key = f"{model.head()[0]}.weight"
    if model.head()[0] in plan.bits and not model.tied_head:
        _load(model, key, torch.float32)
