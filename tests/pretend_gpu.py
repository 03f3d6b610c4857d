"""GPUs for machines without: tensors that say they are on `cuda:N`, and keep to the rules of one.

Their data lies in main memory and CPU kernels work on it, so results are the CPU's, bit for bit.
What a GPU refuses raises here too: tensors of two devices in one op, numpy's view of what is on a
card. What passes between the devices is counted (`Traffic`). What a GPU computes otherwise, and
what its kernels do, is not seen.
"""

import contextlib
import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from exl3 import ops

aten = torch.ops.aten
INDEXED = {  # indices may be in main memory: they are sent to the card
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._unsafe_index.Tensor, aten._index_put_impl_.default),
}
WAITS = {  # the shape of what comes out, or a decision, depends on values: the CPU waits for it
    *(aten.nonzero.default, aten.masked_select.default, aten.equal.default),
    *(aten.is_nonzero.default, aten.repeat_interleave.Tensor),
}
# c10::DeviceType. To C++ the tensors are on an IPU, a device that every build of torch knows and
# none has code for: with CUDA's name autograd would ask the driver for streams.
CUDA, META, IPU = 1, 14, 18
MEMORY = 80 * 2**30
LIBRARY = Path(torch.__file__).parent / "lib" / "libc10.so"
REAL = torch.cuda.is_available()


@dataclass
class Traffic:
    """What passed between main memory and the cards: bytes, in order."""

    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    waits: int = 0

    def clear(self) -> None:
        self.up.clear()
        self.down.clear()
        self.waits = 0


class PretendTensor(torch.Tensor):
    """A tensor in main memory, `held`, that claims to be on a GPU."""

    traffic: Traffic | None = None  # of the pretence that is going on

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("ipu", _named(device).index),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda", torch.Tensor.device.__get__(self).index))
    is_cuda = True
    is_cpu = False

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = _common_device(func, args, leaves)
        target = kwargs.get("device")
        target = device if target is None else _named(target)
        _count(func, args, device, target)
        if "device" in kwargs:
            kwargs["device"] = "meta" if target.type == "meta" else "cpu"
        kwargs.pop("pin_memory", None)
        kwargs.pop("non_blocking", None)
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if func._schema.is_mutable:
            return _given_back(func, args, kwargs)
        if target.type != "cuda":
            return found
        return tree_map(lambda x: _on(x, target), found)

    # `.data` exchanges what a tensor is in place, which autograd's own way does not do for `held`.

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, PretendTensor) or other.device != self.device:
            raise RuntimeError(f"data on {other.device} in the place of a tensor on {self.device}")
        if other.shape != self.shape or other.dtype != self.dtype:
            raise RuntimeError(f"data {other.shape} in the place of {self.shape}")
        self.held = other.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"PretendTensor({self.held}, device={self.device})"


def _named(device: Any) -> torch.device:
    """A device as the tensors claim it."""
    device = torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type in ("cuda", "ipu") else device


def _held(x: Any) -> Any:
    return x.held if isinstance(x, PretendTensor) else x


def _on(x: Any, device: torch.device) -> Any:
    return PretendTensor(x, device) if type(x) is torch.Tensor else x


def _common_device(func: Any, args: tuple[Any, ...], leaves: list[torch.Tensor]) -> torch.device:
    """The card an op runs on; RuntimeError where its tensors are on several devices."""
    if func in INDEXED:
        leaves = [args[0], *(x for x in args[2:] if isinstance(x, torch.Tensor))] + [
            x for x in tree_leaves(args[1]) if isinstance(x, PretendTensor)
        ]
    free = func is aten.copy_.default or func is aten._has_compatible_shallow_copy_type.default
    devices = {x.device for x in leaves if x.device.type != "cpu" or x.dim() > 0}
    if len(devices) > 1 and not free:
        names = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, not {names}")
    return next(x.device for x in leaves if isinstance(x, PretendTensor))


def _count(func: Any, args: tuple[Any, ...], device: torch.device, target: torch.device) -> None:
    traffic = PretendTensor.traffic
    if traffic is None:
        raise RuntimeError("a pretended tensor outlived its pretence")
    if func in WAITS or (func in INDEXED and _by_mask(args[1])):
        traffic.waits += 1
    if func in INDEXED:
        traffic.up += [i.nbytes for i in args[1] if i is not None and i.device.type == "cpu"]
    if func is aten._local_scalar_dense.default:
        traffic.down.append(args[0].element_size())
    elif func is aten.copy_.default:
        to, source = args[0], args[1]
        if not isinstance(to, PretendTensor):
            traffic.down.append(source.held.nbytes)
        elif not isinstance(source, PretendTensor):
            traffic.up.append(source.nbytes)
    elif func is aten._to_copy.default and target.type == "cpu":
        traffic.down.append(args[0].held.nbytes)


def _by_mask(indices: list[torch.Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _given_back(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensors that an op has changed, in their own places."""
    changed = []
    for n, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += tree_leaves(args[n] if n < len(args) else kwargs.get(argument.name))
    for x in changed:
        if isinstance(x, PretendTensor) and x.held.shape != x.shape:
            raise RuntimeError(f"{func} changes a shape in place, which is not pretended")
    if not func._schema.returns:
        return None
    return changed[0] if len(func._schema.returns) == 1 else tuple(changed)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention in ops that have a kernel everywhere; torch's own looks for one for CUDA."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.mT * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        attn_mask = ones.tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def _empty(size: Any, dtype: Any = None, device: Any = None, **rest: Any) -> torch.Tensor:
    return PretendTensor(torch.empty(size, dtype=dtype), device)


def _empty_strided(size: Any, stride: Any, dtype: Any = None, device: Any = None, **rest: Any):
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype), device)


def _arange(*numbers: Any, dtype: Any = None, device: Any = None, **rest: Any) -> torch.Tensor:
    return PretendTensor(torch.arange(*numbers, dtype=dtype), device)


def _eye(n: int, dtype: Any = None, device: Any = None, **rest: Any) -> torch.Tensor:
    return PretendTensor(torch.eye(n, dtype=dtype), device)


FACTORIES = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "arange": _arange,
    "arange.start": _arange,
    "arange.start_step": _arange,
    "eye": _eye,
}


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Lets torch find device guards, which it has for devices it has code for: that of the meta
    device, which does nothing."""
    library = ctypes.CDLL(str(LIBRARY))
    name = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
    guards = (ctypes.c_void_p * (IPU + 1)).in_dll(library, name)
    before = guards[CUDA], guards[IPU]
    guards[CUDA] = guards[IPU] = guards[META]
    try:
        yield
    finally:
        guards[CUDA], guards[IPU] = before


@contextlib.contextmanager
def pretend_gpus(count: int = 1, memory: int = MEMORY) -> Iterator[Traffic]:
    """Inside, `cuda:0` and so on seem to be there, with so many bytes each, and kernels for them.

    Attention is computed in plain torch, on the CPU too, so that both compute the same.
    """
    if REAL:
        pytest.skip("there is a GPU: tests/test_cuda_convert.py runs on it")
    if not LIBRARY.exists():
        pytest.skip("GPUs are pretended with torch for Linux only")
    factories = torch.library.Library("aten", "IMPL")
    for name, make in FACTORIES.items():
        for key in ("CUDA", "IPU"):
            factories.impl(name, make, key)
    kernels = torch.library.Library("exl3", "IMPL")
    for schema in ops.SCHEMAS:
        name = schema.partition("(")[0]
        kernels.impl(name, torch.library.fallthrough_kernel, "AutogradIPU")
    traffic = Traffic()
    seen = {
        "is_available": lambda: True,
        "device_count": lambda: count,
        "_lazy_init": lambda: None,
        "get_device_name": lambda device=None: "Pretended GPU",
        "mem_get_info": lambda device=None: (memory, memory),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "current_device": lambda: 0,
    }
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with (
            mock.patch.multiple(torch.cuda, **seen),
            mock.patch.object(PretendTensor, "traffic", traffic),
            mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention),
            mock.patch("exl3.devices._kernels_built", lambda: True),
            _guarded(),
            # A card has a thread of its own in autograd, and there is no card.
            torch.autograd.set_multithreading_enabled(False),
        ):
            yield traffic
    finally:
        torch.use_deterministic_algorithms(deterministic)
        factories._destroy()
        kernels._destroy()
