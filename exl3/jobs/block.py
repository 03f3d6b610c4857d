"""One block while it is being quantized: the original's weights and the quantized ones, in turn."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from exl3 import parallel
from exl3.format.layer import decode_layer
from exl3.jobs.output_hessians import OutputHessian, SavedHessian
from exl3.jobs.streams import Streams, enter
from exl3.jobs.workdir import WorkDir
from exl3.model.experts import LinearExperts
from exl3.model.replay import Replay
from exl3.model.streamed import StreamedModel
from exl3.quant.correction import shrink

Run = Callable[[torch.Tensor, torch.Tensor | None], Any]  # of ids (rows, cols) and states


@dataclass
class Block:
    """A loaded block. Its module computes with one of two sets of weights: as it was loaded, or
    with everything quantized so far."""

    model: StreamedModel
    i: int
    module: nn.Module
    linears: dict[str, nn.Linear]  # key → module, those of experts too
    experts: dict[str, LinearExperts]  # path in the block → module
    routers: dict[str, tuple[str, nn.Module]]  # of these experts: key of the weight, module
    loaded: dict[str, torch.Tensor] = field(default_factory=dict)  # weights (out, in)
    quantized: dict[str, torch.Tensor] = field(default_factory=dict)
    output_hessians: dict[str, OutputHessian | SavedHessian] = field(default_factory=dict)
    replay: Replay = field(default_factory=Replay)

    @classmethod
    def load(cls, model: StreamedModel, i: int) -> "Block":
        module = model.load_block(i)
        parts = model.block_linears(i), model.block_experts(i), model.block_routers(i)
        block = cls(model, i, module, *parts)
        block.loaded = {key: m.weight.data for key, m in block._weighted().items()}
        return block

    def free(self) -> None:
        self.replay.clear()
        self.loaded.clear()
        self.quantized.clear()
        self.model.free_block(self.i)

    @property
    def name(self) -> str:
        return self.model.block_name(self.i)

    def _weighted(self) -> dict[str, nn.Module]:
        """Everything with two sets of weights: linears, and routers by the key of their weight."""
        return self.linears | dict(self.routers.values())

    def plain_linears(self) -> dict[str, nn.Linear]:
        """The linears that are no experts'."""
        experts = self.model.expert_linears(self.i)
        return {key: linear for key, linear in self.linears.items() if key not in experts}

    def keys(self) -> dict[nn.Module, str]:
        """The key of every linear."""
        return {linear: key for key, linear in self.linears.items()}

    def output_hessian(self, key: str) -> torch.Tensor | None:
        """Second moments of the loss's gradient at a linear's output (out, out), if there are any.

        Those of few tokens are moved toward what knows nothing, a multiple of the identity.
        """
        seen = self.output_hessians.pop(key, None)
        if seen is None or not seen.tokens:
            return None
        mean = seen.mean(self.model.device)
        return shrink(mean, seen.tokens, torch.eye(seen.features, device=mean.device))

    def settle(self, key: str, work: WorkDir) -> None:
        """Takes over a finished layer: the quantized block computes with it."""
        stored = work.load_layer(key)
        weight = decode_layer({leaf: t.to(self.model.device) for leaf, t in stored.items()})
        linear = self.linears[key]
        weight = weight[: linear.in_features, : linear.out_features].T.contiguous()
        self.quantized[key] = linear.weight.data = weight

    def settle_router(self, key: str, weight: torch.Tensor) -> None:
        """Takes over a corrected router's weight: the quantized block computes with it."""
        self.quantized[key] = weight.to(self.loaded[key])

    def replay_last(self, key: str) -> None:
        """Before a linear is quantized: remembers what enters it, where all others of its part of
        the block are quantized already; if that takes no more than the part's output."""
        linear = self.linears[key]
        missing = [own - self.quantized.keys() for own in self._parts().values()]
        if {key} in missing and linear.in_features <= linear.out_features:
            self.replay.watch(linear)

    def replay_settled(self) -> None:
        """Spares further runs the parts of the block whose linears are all quantized."""
        for child, own in self._parts().items():
            if own <= self.quantized.keys():
                self.replay.settle(child)

    def _parts(self) -> dict[nn.Module, set[str]]:
        """The children of the block that have linears, and the keys of these."""
        keys = self.keys()
        found = {c: {keys[m] for m in c.modules() if m in keys} for c in self.module.children()}
        return {child: own for child, own in found.items() if own}

    def forget(self, key: str) -> None:
        """Gives back the memory of an original weight that nobody needs any more."""
        self.loaded.pop(key, None)

    def run_original(self, streams: Streams, parts: list[slice], run: Run) -> list[Any]:
        """`run(ids, states)` of batches of the original's stream, with the weights as loaded."""
        self.compute_original()
        return self._run("original", streams.rows, streams.original, parts, run)

    def run_quantized(self, streams: Streams, parts: list[slice], run: Run) -> list[Any]:
        """`run(ids, states)` of batches of the quantized model's stream, with what is quantized so
        far, and else the weights as loaded."""
        self.compute_quantized()
        return self._run("quantized", streams.rows, streams.quantized, parts, run)

    def advance_original(self, streams: Streams) -> None:
        """Moves the original's stream behind the block."""
        streams.original = self._advance(streams, streams.original, self.run_original)

    def advance_quantized(self, streams: Streams) -> None:
        """Moves the quantized model's stream behind the block."""
        streams.quantized = self._advance(streams, streams.quantized, self.run_quantized)

    def behind(self, streams: Streams, states: torch.Tensor | None) -> torch.Tensor:
        """Where a stream's states behind the block go: in the place of those before it."""
        hidden = self.model.config.get_text_config(decoder=True).hidden_size
        return streams.empty(*streams.rows.shape, hidden) if states is None else states

    def _advance(
        self, streams: Streams, states: torch.Tensor | None, run: Callable[..., list[Any]]
    ) -> torch.Tensor:
        out = self.behind(streams, states)
        for wave in streams.waves():
            outputs = run(streams, wave, partial(self.model.run_block, self.i))
            for part, output in zip(wave, outputs, strict=True):
                out[part] = output
        return out

    def _run(
        self,
        name: str,
        rows: torch.Tensor,
        states: torch.Tensor | None,
        parts: list[slice],
        run: Run,
    ) -> list[Any]:
        def one(part: slice) -> Any:
            with self.replay.of((name, part.start)):
                return run(rows[part], enter(states, part))

        return parallel.each(one, parts)

    def compute_original(self, keys: Iterable[str] | None = None) -> None:
        """Lets the module, or some of its linears, compute with the weights that were loaded."""
        self._compute(self.loaded, keys)

    def compute_quantized(self, keys: Iterable[str] | None = None) -> None:
        """Lets the module compute with what is quantized so far, and else as it was loaded."""
        self._compute(self.loaded | self.quantized, keys)

    def _compute(self, weights: dict[str, torch.Tensor], keys: Iterable[str] | None) -> None:
        weighted = self._weighted()
        for key in weights if keys is None else keys:
            weighted[key].weight.data = weights[key]
