"""What gradients of the original say of a measurement's tensors: what their errors cost, and so how
a group's KLD divides."""

from collections.abc import Sequence
from functools import cached_property

import torch

from exl3.errors import JobError
from exl3.groups import EVERY_TENSOR, Group, group
from exl3.jobs.boundaries import Boundaries, boundary_bytes, boundary_gradients, boundary_work
from exl3.jobs.measure_files import MeasureFiles
from exl3.jobs.sensitivities import Sensitivities
from exl3.jobs.survey import Survey
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress


class Shares:
    """The sensitivities of all tensors, as far as they are known, kept with the measurement."""

    def __init__(self, model: StreamedModel, rows: torch.Tensor, files: MeasureFiles) -> None:
        """rows: ids (rows, cols) that gradients go back from."""
        self.model, self.rows = model, rows
        self._boundaries = Boundaries(files.gradients, model, self.rows, seed=0)
        self._known = Sensitivities(files.path, self._boundaries.identity, model.num_blocks)

    @property
    def left(self) -> bool:
        """Whether gradients have to go through the model."""
        return not self._known.complete

    @property
    def disk_bytes(self) -> int:
        """Of the work folder, for what passes between the blocks."""
        return boundary_bytes(self.model, *self.rows.shape) if self.left else 0

    def make(self) -> None:
        """What is not there yet; a note, and nothing, where gradients are not finite."""
        if not self.left:
            return
        self.model.load_embedding()
        survey = Survey(self._known, self.rows.numel())
        try:
            with Progress(boundary_work(self.model, len(self.rows)), "Tracing back") as progress:
                boundary_gradients(self.model, self._boundaries, progress, survey)
        except JobError as error:
            print(f"NOTE: {error} Groups are measured only, not divided.")
        self.model.free_embedding()
        self._boundaries.remove()

    def sensitivity(self, keys: Sequence[str]) -> float | None:
        """Of some tensors together: KLD per unit of relative error, None while it is not known."""
        if not self._known.complete:
            return None
        return sum(self._by_key.get(key, 0.0) for key in keys)

    @cached_property
    def _by_key(self) -> dict[str, float]:
        """All sensitivities, once they are complete."""
        return self._known.by_key()


def tensors_of(measured: Group) -> list[Group]:
    """The tensors of a group; its experts of one kind together, for they have one K."""
    return group([measured.keys], EVERY_TENSOR)
