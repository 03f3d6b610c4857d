"""What tuning makes small: of the whole quant, of one block, of norm and head."""

from typing import Protocol

import torch

from exl3.jobs.job import Job
from exl3.jobs.streams import enter, run_block
from exl3.jobs.tune_parts import Opened, block_pass, open_block, open_tail, tail_pass
from exl3.quant.tuning import Gains


class Fit(Protocol):
    """An error of rows (indices `picked`) as a function of gains, `moved` away from one."""

    gains: Gains

    def gradient(self, picked: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """With respect to the gains, (size,)."""

    def error(self, picked: torch.Tensor, moved: torch.Tensor) -> float:
        """With what is tuned rounded as it is stored."""


class WholeFit:
    """KL(original || quant) of the whole quant, all of which is loaded.

    Backwards block by block: what enters the blocks is kept, what happens inside is done again.
    """

    def __init__(self, job: Job, original: torch.Tensor) -> None:
        """original: what leaves the original's last block, (rows, cols, hidden)."""
        self.model, self.rows, self.original = job.source.model, job.source.rows, original
        self.blocks = []
        for i in range(self.model.num_blocks):
            self.blocks.append(open_block(job, i))
            self.blocks[-1].part.forget_original()
        self.tail = open_tail(job)
        everything = [*self.blocks, self.tail]
        stored = {key: x for opened in everything for key, x in opened.stored.items()}
        used = {key: n for opened in everything for key, n in opened.used.items()}
        self.gains = Gains(stored, used)

    def close(self) -> None:
        for i, opened in enumerate(self.blocks):
            opened.part.close()
            self.model.free_block(i)
        self.tail.part.close()
        self.model.free_tail()

    def gradient(self, picked: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        self._set(self.gains.gains(moved))
        ids, states = self.rows[picked], [None]
        for i in range(self.model.num_blocks):
            states.append(run_block(self.model, i, ids, states[-1]))
        wanted = self.original[picked]
        _, gradient, found = tail_pass(
            self.model, self.tail.part, ids, states[-1], wanted, follow=True
        )
        for i in reversed(range(self.model.num_blocks)):
            states.pop()
            given = self.blocks[i].part, ids, states[-1]
            gradient, own = block_pass(self.model, i, *given, lambda here, _, g=gradient: g[here])
            found |= own
        return self.gains.join(found)

    def error(self, picked: torch.Tensor, moved: torch.Tensor) -> float:
        self._set(self.gains.rounded(moved))
        ids, states = self.rows[picked], None
        for i in range(self.model.num_blocks):
            states = run_block(self.model, i, ids, states, out=states)
        return tail_pass(self.model, self.tail.part, ids, states, self.original[picked])[0]

    def _set(self, gains: dict[str, torch.Tensor]) -> None:
        for opened in (*self.blocks, self.tail):
            opened.part.set(gains)


class BlockFit:
    """|output - target|^2 / |target|^2 of a block, on what enters it in the quant."""

    def __init__(
        self, job: Job, i: int, opened: Opened, states: torch.Tensor | None, target: torch.Tensor
    ) -> None:
        """states, target: (rows, cols, hidden), None before block 0."""
        self.model, self.i, self.part = job.source.model, i, opened.part
        self.rows, self.states, self.target = job.source.rows, states, target
        self.gains = Gains(opened.stored, opened.used)

    def gradient(self, picked: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        self.part.set(self.gains.gains(moved))
        target = self.target[picked]
        scale = 2 / _energy(target)
        _, found = block_pass(
            self.model,
            self.i,
            self.part,
            self.rows[picked],
            enter(self.states, picked),
            lambda here, output: (output - target[here].to(output.device)) * scale,
        )
        return self.gains.join(found)

    def error(self, picked: torch.Tensor, moved: torch.Tensor) -> float:
        self.part.set(self.gains.rounded(moved))
        target = self.target[picked]
        states = enter(self.states, picked)
        output = run_block(self.model, self.i, self.rows[picked], states).to(target.device)
        return _energy(output - target) / _energy(target)


class TailFit:
    """KL(original || quant) of norm and head, on what leaves the quant's last block."""

    def __init__(
        self, job: Job, opened: Opened, states: torch.Tensor, original: torch.Tensor
    ) -> None:
        self.model, self.part, self.rows = job.source.model, opened.part, job.source.rows
        self.states, self.original = states, original
        self.gains = Gains(opened.stored, opened.used)

    def gradient(self, picked: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        self.part.set(self.gains.gains(moved))
        given = self.rows[picked], self.states[picked], self.original[picked]
        return self.gains.join(tail_pass(self.model, self.part, *given, follow=True)[2])

    def error(self, picked: torch.Tensor, moved: torch.Tensor) -> float:
        return self.error_of(picked, self.states[picked], moved)

    def error_of(self, picked: torch.Tensor, states: torch.Tensor, moved: torch.Tensor) -> float:
        """The same with other states of these rows."""
        self.part.set(self.gains.rounded(moved))
        given = self.rows[picked], states, self.original[picked]
        return tail_pass(self.model, self.part, *given)[0]


def _energy(x: torch.Tensor) -> float:
    """|x|^2, summed up row by row: float64 copies of all rows would be large."""
    return sum(float(row.double().square().sum()) for row in x)
