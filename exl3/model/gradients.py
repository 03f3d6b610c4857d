"""Gradients of a streamed model: of its loss on targets it sampled itself, back through its parts.

The mean of d d^T, where d is this gradient with respect to a linear's output, is the output side
of the Fisher information's Kronecker factors (K-FAC, arXiv 1503.05671; for quantization
YAQA, arXiv 2505.22988).
"""

import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from exl3.model.hooks import Hooks
from exl3.model.streamed import StreamedModel


def token_uniforms(seed: int, row: int, cols: int) -> torch.Tensor:
    """What targets of a row are drawn with: float32 (cols,) in [0, 1), whatever runs beside it."""
    own = zlib.crc32(f"{seed} {row}".encode())
    return torch.rand(cols, generator=torch.Generator().manual_seed(own))


def sample_targets(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Tokens (n,) drawn from distributions (n, vocab), by uniforms (n,): the first token up to
    which the probabilities add up to more than that."""
    heap = probabilities.cumsum(-1)
    height = uniforms.to(heap.device)[:, None] * heap[:, -1:]
    found = torch.searchsorted(heap, height, right=True)[:, 0]
    return found.clamp(max=probabilities.shape[-1] - 1)  # where rounding gave the whole height


def tail_gradient(
    model: StreamedModel, input_ids: torch.Tensor, state: torch.Tensor, uniforms: torch.Tensor
) -> torch.Tensor:
    """Gradient (1, n, hidden) at the last block's output of the cross-entropy, summed over tokens.

    input_ids (1, n), state (1, n, hidden), uniforms (n,): any piece of a row, for norm and head
    know no position. Targets are drawn from the model's own distribution.
    """
    entered, logits = model.tail_graph(input_ids, state.to(model.dtype))
    error = logits.detach()[0].float().softmax(-1)
    targets = sample_targets(error, uniforms)
    each = torch.arange(len(targets), device=error.device)
    error[each, targets] -= 1  # softmax - one-hot: the loss's own gradient
    return torch.autograd.grad(logits, entered, error[None].to(logits.dtype))[0]


def block_gradient(
    model: StreamedModel,
    i: int,
    input_ids: torch.Tensor,
    state: torch.Tensor | None,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """Gradient at what enters block i from that at its output, both (rows, cols, hidden).

    input_ids (rows, cols); state: what enters the block, None for block 0.
    """
    state = None if state is None else state.to(model.dtype)
    entered, output = model.block_graph(i, input_ids, state)
    return torch.autograd.grad(output, entered, gradient.to(output))[0]


@dataclass
class Passed:
    """What passed through a block and its linears, forwards and backwards; name → every call's
    tokens. Calls that the block's output does not depend on are left out."""

    entering: torch.Tensor  # the gradient at what enters the block, (rows, cols, hidden)
    inputs: dict[str, torch.Tensor]  # (tokens, in_features)
    gradients: dict[str, torch.Tensor]  # at the linear's output, (tokens, out_features)


class OutputGradients(Hooks):
    """Runs block i forwards and backwards and keeps what enters its linears, and the gradients at
    their outputs.

    linears: name → module of block i, as `model.block_linears(i)` gives them. The hooks are there
    inside the `with` only; `run` may be called from several threads at once.
    """

    def __init__(self, model: StreamedModel, i: int, linears: dict[str, nn.Linear]):
        self.model, self.i, self.linears = model, i, linears
        self._local = _Local()

    def _register(self) -> Iterator[RemovableHandle]:
        for name, linear in self.linears.items():
            yield linear.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if self._local.calls is None or not output.requires_grad:
                return
            call = _Call(args[0].detach())  # in the order of the forward
            self._local.calls.setdefault(name, []).append(call)
            # Registered on the tensor now, it gets the gradient of what the linear gave, even if
            # that is overwritten later.
            output.register_hook(call.gradients.append)

        return keep

    def run(
        self, input_ids: torch.Tensor, state: torch.Tensor | None, gradient: torch.Tensor
    ) -> Passed:
        """Arguments as for `block_gradient`."""
        calls = self._local.calls = {}
        try:
            entering = block_gradient(self.model, self.i, input_ids, state, gradient)
        finally:
            self._local.calls = None
        met = {name: [c for c in of if c.gradients] for name, of in calls.items()}
        met = {name: of for name, of in met.items() if of}
        return Passed(
            entering,
            {name: _tokens([c.inputs for c in of]) for name, of in met.items()},
            {name: _tokens([d for c in of for d in c.gradients]) for name, of in met.items()},
        )


@dataclass
class _Call:
    """Of a linear; the backward fills in the gradient, the only one."""

    inputs: torch.Tensor
    gradients: list[torch.Tensor] = field(default_factory=list)


def _tokens(calls: list[torch.Tensor]) -> torch.Tensor:
    """(tokens, features): all calls, one after another."""
    rows = [x.reshape(-1, x.shape[-1]) for x in calls]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


class _Local(threading.local):
    calls: dict[str, list[_Call]] | None = None
