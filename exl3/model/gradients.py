"""Gradients of a streamed model: of its loss on targets it sampled itself, back through its parts.

The mean of d d^T, where d is this gradient with respect to a linear's output, is the output side
of the Fisher information's Kronecker factors (K-FAC, arXiv 1503.05671; for quantization
YAQA, arXiv 2505.22988).
"""

import threading
import zlib
from typing import Any

import torch
from torch import nn

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
    error[torch.arange(len(targets)), targets] -= 1  # softmax - one-hot: the loss's own gradient
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


class OutputGradients:
    """Runs block i forwards and backwards and keeps the gradients at its linears' outputs.

    linears: name → module of block i, as `model.block_linears(i)` gives them. The hooks are there
    inside the `with` only; `run` may be called from several threads at once.
    """

    def __init__(self, model: StreamedModel, i: int, linears: dict[str, nn.Linear]):
        self.model, self.i, self.linears = model, i, linears
        self._local = _Local()
        self._hooks: list[Any] = []

    def __enter__(self) -> "OutputGradients":
        for name, linear in self.linears.items():
            self._hooks.append(linear.register_forward_hook(self._keep(name)))
        return self

    def __exit__(self, *error: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _keep(self, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if self._local.calls is None or not output.requires_grad:
                return
            call: list[torch.Tensor] = []  # in the order of the forward; filled by the backward
            self._local.calls.setdefault(name, []).append(call)
            # Registered on the tensor now, it gets the gradient of what the linear gave, even if
            # that is overwritten later.
            output.register_hook(call.append)

        return keep

    def run(
        self, input_ids: torch.Tensor, state: torch.Tensor | None, gradient: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Gradients at the linears' outputs: name → (tokens, out_features), every call's tokens.

        Arguments as for `block_gradient`. Calls that the block's output does not depend on are
        left out; a linear of which that is true of all is not in it.
        """
        calls = self._local.calls = {}
        try:
            block_gradient(self.model, self.i, input_ids, state, gradient)
        finally:
            self._local.calls = None
        found = {
            name: [d.reshape(-1, d.shape[-1]) for call in of for d in call]
            for name, of in calls.items()
        }
        return {name: ds[0] if len(ds) == 1 else torch.cat(ds) for name, ds in found.items() if ds}


class _Local(threading.local):
    calls: dict[str, list[list[torch.Tensor]]] | None = None
