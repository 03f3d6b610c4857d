"""A part of a streamed model whose scales and norm weights autograd follows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Gradients = dict[str, torch.Tensor]


class TunablePart:
    """A loaded part that computes with decoded layers, times gains on both sides (see
    `exl3.quant.tuning`), and with norm weights times gains; or as it was loaded.

    weights: key → what a linear's layer decodes to, (out, in); norm_weights: key → stored weight;
    fixed: other weights of the tuned part, which stay as they are. The hooks stay until `close`.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        weights: Mapping[str, torch.Tensor],
        norms: Mapping[str, nn.Module],
        norm_weights: Mapping[str, torch.Tensor],
        fixed: Mapping[nn.Module, torch.Tensor],
    ) -> None:
        self.leaves: dict[str, torch.Tensor] = {}
        device = next(linear.weight.device for linear in (*linears.values(), *norms.values()))
        self._bases = {key: weight.float().to(device) for key, weight in norm_weights.items()}
        self._weights: list[tuple[nn.Module, nn.Parameter | None, nn.Parameter]] = []
        self._hooks: list[Any] = []
        self._tuned = True
        for key, linear in linears.items():
            own = nn.Parameter(weights[key].to(device), requires_grad=False)
            self._weights.append((linear, linear.weight, own))
            self._hook(key, linear)
        for module, weight in fixed.items():
            own = nn.Parameter(weight.to(module.weight), requires_grad=False)
            self._weights.append((module, module.weight, own))
        for key, norm in norms.items():
            self.leaves[key] = nn.Parameter(self._bases[key].clone())
            self._weights.append((norm, norm.weight, self.leaves[key]))
        self.compute_tuned()

    def _hook(self, key: str, linear: nn.Linear) -> None:
        u, v = (
            torch.ones(n, device=linear.weight.device, requires_grad=True)
            for n in (linear.in_features, linear.out_features)
        )
        self.leaves |= {f"{key}.suh": u, f"{key}.svh": v}

        def enter(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (args[0] * u, *args[1:]) if self._tuned else None

        def leave(module: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> Any:
            if not self._tuned:
                return None
            return y * v if linear.bias is None else (y - linear.bias) * v + linear.bias

        self._hooks.append(linear.register_forward_pre_hook(enter))
        self._hooks.append(linear.register_forward_hook(leave))

    def close(self) -> None:
        """Gives back what only tuning needs."""
        while self._hooks:
            self._hooks.pop().remove()
        self._weights.clear()
        self.leaves.clear()

    def compute_original(self) -> None:
        """Lets the part compute as it was loaded. For one thread, like the next ones."""
        self._tuned = False
        for module, loaded, _ in self._weights:
            module.weight = loaded

    def compute_tuned(self) -> None:
        self._tuned = True
        for module, _, own in self._weights:
            module.weight = own

    def forget_original(self) -> None:
        """Gives back the weights that were loaded."""
        self._weights = [(module, None, own) for module, _, own in self._weights]

    def set(self, gains: Mapping[str, torch.Tensor]) -> None:
        """Takes over the part's own of some gains."""
        for key, leaf in self.leaves.items():
            own = gains[key].to(leaf.device)
            leaf.data = own * self._bases[key] if key in self._bases else own

    def gradients(
        self, output: torch.Tensor, entered: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, Gradients]:
        """Gradients at what entered, and of gains: key → those that the output depends on.

        output: autograd's function of `entered` and of the gains; gradient: at the output. May be
        called from several threads at once.
        """
        wanted = [entered, *self.leaves.values()]
        gradient = gradient.to(output.device)
        first, *others = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
        found = {}
        for key, g in zip(self.leaves, others, strict=True):
            if g is not None:
                found[key] = g * self._bases[key] if key in self._bases else g
        return first, found
