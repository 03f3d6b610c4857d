"""What passes at the boundaries between a model's blocks: states forwards, gradients backwards.

Once, before a conversion, `boundary_gradients` sends some rows through the original model and the
loss's gradient all the way back, and keeps both on disk for every boundary. With these files any
block's share of the gradients can be repeated while that block alone is loaded.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from exl3 import parallel
from exl3.data.rows import rows_hash
from exl3.errors import JobError, UserError
from exl3.jobs.streams import TAIL_TOKENS, batches, run_block, waves
from exl3.model.gradients import OutputGradients, Passed, tail_gradient, token_uniforms
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress
from exl3.quant.linear import refuse_non_finite
from exl3.sensitivity import share_of_tokens
from exl3.tensor_files import LazyTensor, opened, write_safetensors

BACK = 2.2  # times a forward: that again, and the gradient of what enters, not of weights

TRACED_ROWS = 16  # that go back through the original, unless --hessian_rows says otherwise
# Of mixtures of experts, each of which sees a part of the tokens, as many as 16 rows of 2048 have.
EXPERT_TOKENS = 2**15
MOST_TRACED_ROWS = 64

WAY_OUT = "delete it and try again"  # of damaged files

STATE, GRADIENT = "state", "gradient"  # that enters a block; at a block's output


def traced_rows(model: StreamedModel, cols: int) -> int:
    """How many rows of so many tokens are enough to go back through a model."""
    if share_of_tokens(model.config.get_text_config(decoder=True)) == 1:
        return TRACED_ROWS
    return min(MOST_TRACED_ROWS, max(TRACED_ROWS, EXPERT_TOKENS // cols))


class Survey(Protocol):
    """Somebody who looks at the linears of the blocks while the gradients pass, from the last block
    to the first."""

    def has(self, i: int) -> bool:
        """Whether it has seen block i."""

    def begin(self, linears: dict[str, nn.Linear]) -> None:
        """The linears of the next block, key → module."""

    def add(self, passed: Passed) -> None:
        """What passed through them, some rows after the other."""

    def save(self, i: int) -> None:
        """That was block i."""


class Boundaries:
    """A folder with what passes between the blocks of the original model, and their rows.

    state.I.safetensors     what enters block I, for I = 1 to the number of blocks
    gradient.I.safetensors  the loss's gradient at the output of block I, from 0 on

    Each is float32 (rows, cols, hidden) and tells in its metadata what it was made of: a file of
    another model, other rows or another seed is a UserError.
    """

    def __init__(
        self, folder: str | Path, model: StreamedModel, rows: torch.Tensor, seed: int
    ) -> None:
        """rows: ids (rows, cols); seed: of the sampled targets. Makes the folder."""
        self.folder, self.rows, self.seed = Path(folder), rows, seed
        self.identity = identity(model, rows, seed)
        self.shape = (*rows.shape, model.config.get_text_config(decoder=True).hidden_size)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, kind: str, i: int) -> Path:
        return self.folder / f"{kind}.{i}.safetensors"

    def has(self, kind: str, i: int) -> bool:
        if not self.path(kind, i).exists():
            return False
        with self._open(kind, i):
            return True

    def load(self, kind: str, i: int, part: slice = slice(None)) -> torch.Tensor:
        """Some rows of a file, (n, cols, hidden), read from the disk alone."""
        with self._open(kind, i) as file:
            return file.get_slice(kind)[part]

    def state(self, i: int, part: slice) -> torch.Tensor | None:
        """What enters block i; None for block 0, which is given ids."""
        return self.load(STATE, i, part) if i > 0 else None

    def save(self, kind: str, i: int, value: torch.Tensor) -> None:
        content = LazyTensor(kind, self.shape, torch.float32, value.float)
        write_safetensors(self.path(kind, i), [content], self.identity)

    def remove(self) -> None:
        """Removes the files."""
        for path in (path for kind in (STATE, GRADIENT) for path in self.folder.glob(f"{kind}.*")):
            path.unlink()

    @contextlib.contextmanager
    def _open(self, kind: str, i: int) -> Iterator[Any]:
        path = self.path(kind, i)
        with opened(path, WAY_OUT) as file:
            expect(path, file.metadata(), self.identity)
            if tuple(file.get_slice(kind).get_shape()) != self.shape:
                raise UserError(f"{path} has another shape than its rows; delete it and try again")
            yield file


def model_identity(model: StreamedModel) -> dict[str, str]:
    """What tells an original model from others."""
    return {
        "model": model.checkpoint.fingerprint(),
        "rotary embeddings": json.dumps(model.rope_parameters or {}, sort_keys=True),
    }


def identity(model: StreamedModel, rows: torch.Tensor, seed: int) -> dict[str, str]:
    """What gradients depend on."""
    device = model.device.type  # another one adds up otherwise
    return {
        **model_identity(model),
        "rows": rows_hash(rows),
        "seed": str(seed),
        "kind of device": device,
    }


def expect(path: Path, metadata: dict[str, str] | None, identity: dict[str, str]) -> None:
    """UserError if a file was made of something else."""
    other = [name for name, value in identity.items() if (metadata or {}).get(name) != value]
    if other:
        raise UserError(
            f"{path} was made with another {' and another '.join(other)}; give another folder"
        )


def boundary_bytes(model: StreamedModel, rows: int, cols: int) -> int:
    """Of a `Boundaries` folder: 2 x blocks x rows x cols x hidden x 4."""
    hidden = model.config.get_text_config(decoder=True).hidden_size
    return 2 * model.num_blocks * rows * cols * hidden * 4


def boundary_memory(model: StreamedModel, rows: int, cols: int) -> int:
    """Bytes of states or gradients that `boundary_gradients` holds at a time (two boundaries of
    all rows at most), besides the embedding and one block or the head."""
    return boundary_bytes(model, rows, cols) // model.num_blocks


def boundary_gradients(
    model: StreamedModel,
    boundaries: Boundaries,
    progress: Progress | None = None,
    survey: Survey | None = None,
) -> None:
    """Fills the folder with what is missing there, and shows a survey what it wants to see; the
    embedding is loaded.

    The loss is the cross-entropy, summed over tokens, of targets that the model samples itself.
    progress: is advanced by `boundary_work` in all. JobError for a gradient that is not finite.
    """
    progress = progress or Progress(0, "", quiet=True)
    _forward(model, boundaries, progress)
    _turn(model, boundaries, progress)
    _backward(model, boundaries, survey, progress)


def boundary_work(model: StreamedModel, rows: int) -> int:
    """Work in `boundary_gradients` as its progress counts it: rows through blocks, and the tail."""
    return rows * (model.num_blocks + 1 + BACK * model.num_blocks)


def _forward(model: StreamedModel, boundaries: Boundaries, progress: Progress) -> None:
    """The states that enter the blocks, and what leaves the last."""
    rows, states = boundaries.rows, None
    for i in range(model.num_blocks):
        if boundaries.has(STATE, i + 1):
            states = None
            progress.skip(len(rows))
            continue
        progress.doing(f"{model.block_name(i)}, forwards")
        if states is None and i > 0:
            states = boundaries.load(STATE, i).to(model.dtype)
        with _loaded_block(model, i):
            states = run_block(model, i, rows, states, out=states)
            if not torch.isfinite(states).all():
                _refuse_damaged(model.block_linears(i))
                raise UserError(
                    f"what leaves {model.block_name(i)} is not finite: the source model is "
                    "damaged; download it again"
                )
        boundaries.save(STATE, i + 1, states)
        progress.advance(len(rows))


def _turn(model: StreamedModel, boundaries: Boundaries, progress: Progress) -> None:
    """The gradient at the last block's output, through norm and head."""
    rows, last = boundaries.rows, model.num_blocks - 1
    if boundaries.has(GRADIENT, last):
        return progress.skip(len(rows))
    progress.doing("norm and head")
    states = boundaries.load(STATE, model.num_blocks)
    gradients = torch.empty(boundaries.shape)

    def piece(place: tuple[int, int]) -> None:
        row, start = place
        part = slice(start, start + TAIL_TOKENS)
        uniforms = token_uniforms(boundaries.seed, row, rows.shape[1])[part]
        here = slice(row, row + 1), part
        gradients[here] = tail_gradient(model, rows[here], states[here], uniforms)

    model.load_tail()
    try:
        starts = range(0, rows.shape[1], TAIL_TOKENS)
        parallel.each(piece, [(row, start) for row in range(len(rows)) for start in starts])
        if not torch.isfinite(gradients).all():
            _refuse_damaged(dict([model.head()]))
    finally:
        model.free_tail()
    _save_gradients(model, boundaries, last, gradients)
    progress.advance(len(rows))


def _backward(
    model: StreamedModel, boundaries: Boundaries, survey: Survey | None, progress: Progress
) -> None:
    """The gradients at the outputs of all blocks but the last, from the back to the front; and
    what they say of the linears on the way."""
    rows, gradients = boundaries.rows, None
    for i in reversed(range(model.num_blocks)):
        wanted = survey is not None and not survey.has(i)
        if not wanted and (i == 0 or boundaries.has(GRADIENT, i - 1)):
            gradients = None
            progress.skip(BACK * len(rows))
            continue
        progress.doing(f"{model.block_name(i)}, backwards")
        if gradients is None:
            gradients = boundaries.load(GRADIENT, i)
        with _loaded_block(model, i):
            _through_block(model, boundaries, i, gradients, survey if wanted else None)
        if i > 0:
            _save_gradients(model, boundaries, i - 1, gradients)
        progress.advance(BACK * len(rows))


def _through_block(
    model: StreamedModel,
    boundaries: Boundaries,
    i: int,
    gradients: torch.Tensor,
    survey: Survey | None,
) -> None:
    """Puts the gradients at what enters block i in the place of those at its output."""
    linears = {} if survey is None else model.block_linears(i)

    def run(part: slice) -> Passed:
        return watched.run(boundaries.rows[part], boundaries.state(i, part), gradients[part])

    if survey is not None:
        survey.begin(linears)
    with OutputGradients(model, i, linears) as watched:
        for wave in waves(batches(boundaries.rows)):
            for part, passed in zip(wave, parallel.each(run, wave), strict=True):
                if survey is not None:
                    survey.add(passed)
                # Only now: a gradient at an output may be the very tensor that was given.
                gradients[part] = passed.entering
    if survey is not None:
        survey.save(i)


def _refuse_damaged(linears: dict[str, nn.Linear]) -> None:
    for key, linear in linears.items():
        refuse_non_finite(linear.weight, f"{key}.weight")


def _save_gradients(
    model: StreamedModel, boundaries: Boundaries, i: int, gradients: torch.Tensor
) -> None:
    if not torch.isfinite(gradients).all():
        raise JobError(
            f"The gradient at the output of {model.block_name(i)} is not finite, so it tells "
            "nothing; other text may help (-c)."
        )
    boundaries.save(GRADIENT, i, gradients)


@contextlib.contextmanager
def _loaded_block(model: StreamedModel, i: int) -> Iterator[None]:
    model.load_block(i)
    try:
        yield
    finally:
        model.free_block(i)
