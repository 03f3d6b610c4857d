"""Second moments of the gradients at the outputs of a block's linears.

Those of all blocks at once would fill disks: each block's are made while it is loaded, from what
`exl3.jobs.boundaries` keeps.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exl3 import parallel
from exl3.devices import CPU
from exl3.errors import UserError
from exl3.jobs.boundaries import GRADIENT, WAY_OUT, Boundaries, expect
from exl3.jobs.streams import batches, waves
from exl3.model.gradients import OutputGradients
from exl3.model.streamed import StreamedModel
from exl3.quant.hessian import Hessian
from exl3.sensitivity import share_of_tokens
from exl3.tensor_files import LazyTensor, opened, write_safetensors

MOST_OUTPUTS = 20480  # of a linear with an output-side Hessian, which takes up to 13 GB for these
WHOLE_HEAD = 8192  # outputs of a head whose output-side Hessian is more than its blocks


class OutputHessian:
    """Mean of d d^T over tokens, where d (features,) is the gradient at a linear's output.

    Of fewer tokens than features (a rare expert's) the gradients are kept, which takes less.
    """

    def __init__(self, features: int) -> None:
        self.features, self.tokens = features, 0
        self._few: list[torch.Tensor] = []
        self._many: Hessian | None = None

    def add(self, d: torch.Tensor) -> None:
        """Adds the gradients d (tokens, features)."""
        self.tokens += len(d)
        if self._many is None and self.tokens < self.features:
            # A copy: this may be a part of something large.
            self._few.append(d.to(torch.float32, copy=True))
            return
        if self._many is None:
            self._many = Hessian(self.features, d.device)
            if self._few:
                self._many.add(torch.cat(self._few))
                self._few.clear()
        self._many.add(d)

    def mean(self, device: torch.device = CPU) -> torch.Tensor:
        """float32 (features, features), symmetric; it was seen on this device."""
        if self._many is None:
            return _mean(torch.cat(self._few).to(device))
        return self._many.mean()

    def content(self) -> LazyTensor:
        """What stands for it in a file: few tokens' gradients (tokens, features), or the mean."""
        if self._many is None:
            few = torch.cat(self._few) if self._few else torch.empty(0, self.features)
            return LazyTensor.of("gradients", few)
        return LazyTensor("mean", (self.features, self.features), torch.float32, self._many.mean)


def _mean(gradients: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(gradients.shape[1], gradients.device)
    hessian.add(gradients)
    return hessian.mean()


def block_output_hessians(
    model: StreamedModel, i: int, linears: dict[str, nn.Linear], boundaries: Boundaries
) -> dict[str, OutputHessian]:
    """Output-side Hessians of linears of block i, which computes with its original weights.

    linears: key → module, as `model.block_linears(i)` gives them. Tokens that an expert did not see
    do not count for it.
    """
    hessians = {key: OutputHessian(linear.out_features) for key, linear in linears.items()}

    def gradients(part: slice) -> dict[str, torch.Tensor]:
        state, gradient = boundaries.state(i, part), boundaries.load(GRADIENT, i, part)
        return watched.run(boundaries.rows[part], state, gradient).gradients

    with OutputGradients(model, i, linears) as watched:
        for wave in waves(batches(boundaries.rows)):
            for found in parallel.each(gradients, wave):
                for key, d in found.items():
                    hessians[key].add(d)
    return hessians


def with_hessians(linears: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Those of some linears that get output-side Hessians."""
    return {key: m for key, m in linears.items() if m.out_features <= MOST_OUTPUTS}


def output_hessian_bytes(model: StreamedModel, blocks: Iterable[int], tokens: int) -> int:
    """Of the Hessians of some blocks, in memory or saved: 4 x out x the lesser of out and tokens
    for each linear, of experts the tokens that they see if all get the same, which is the most."""
    seen = ceil(share_of_tokens(model.config.get_text_config(decoder=True)) * tokens)
    total = 0
    for i in blocks:
        experts = model.expert_linears(i)
        for key, m in with_hessians(model.block_linears(i)).items():
            total += 4 * m.out_features * min(m.out_features, seen if key in experts else tokens)
    return total


# -- Saved -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedHessian:
    """An output-side Hessian in a file, read when its mean is wanted."""

    path: Path
    features: int
    tokens: int

    def mean(self, device: torch.device = CPU) -> torch.Tensor:
        """float32 (features, features), symmetric, computed on a device."""
        with opened(self.path, WAY_OUT) as file:
            if "mean" in file.keys():  # noqa: SIM118
                return file.get_tensor("mean").to(device)
            return _mean(file.get_tensor("gradients").to(device))


def save_output_hessians(
    folder: str | Path, hessians: dict[str, OutputHessian], identity: dict[str, str]
) -> None:
    """One file for each linear, KEY.safetensors; those that are there already stay.

    identity: `boundaries.identity`. UserError for a file of another model, rows or seed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for key, hessian in hessians.items():
        path = folder / f"{key}.safetensors"
        if path.exists():
            with opened(path, WAY_OUT) as file:
                expect(path, file.metadata(), identity)
        else:
            metadata = {**identity, "tokens": str(hessian.tokens)}
            write_safetensors(path, [hessian.content()], metadata)


def all_saved(folder: str | Path, linears: dict[str, nn.Linear]) -> bool:
    """Whether a folder has the Hessians of all linears that get any."""
    return all((Path(folder) / f"{key}.safetensors").is_file() for key in with_hessians(linears))


def load_output_hessians(
    folder: str | Path, linears: dict[str, nn.Linear], identity: dict[str, str]
) -> dict[str, SavedHessian]:
    """The saved Hessians of these linears (key → module), as far as there are any.

    UserError for files that are damaged, or of another model, rows or seed (`identity`).
    """
    found = {}
    for key, linear in linears.items():
        path = Path(folder) / f"{key}.safetensors"
        if path.exists():
            with opened(path, WAY_OUT) as file:
                expect(path, file.metadata(), identity)
                found[key] = SavedHessian(path, linear.out_features, _tokens(path, file, linear))
    return found


def _tokens(path: Path, file: Any, linear: nn.Linear) -> int:
    """How many tokens a saved Hessian is of; UserError unless it fits the linear."""
    features, tokens = linear.out_features, file.metadata().get("tokens", "")
    shapes = {key: (file.get_slice(key).get_shape(), _dtype(file, key)) for key in file.keys()}  # noqa: SIM118
    whole = {"mean": ([features, features], "F32")}
    few = {"gradients": ([int(tokens) if tokens.isdecimal() else -1, features], "F32")}
    if not tokens.isdecimal() or shapes not in (whole, few):
        raise UserError(f"{path} is not the Hessian of {features} outputs; delete it and try again")
    return int(tokens)


def _dtype(file: Any, key: str) -> str:
    return file.get_slice(key).get_dtype()
