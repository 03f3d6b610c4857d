"""What is learned of every linear while the original's gradients pass through its block."""

from pathlib import Path

from torch import nn

from exl3.jobs.output_hessians import (
    OutputHessian,
    output_hessian_bytes,
    save_output_hessians,
    with_hessians,
)
from exl3.jobs.plan import shared_by_gradients
from exl3.jobs.sensitivities import Sensitivities
from exl3.jobs.settings import Settings
from exl3.jobs.workdir import GRADIENTS
from exl3.model.gradients import Passed
from exl3.model.streamed import StreamedModel
from exl3.sensitivity import Scales, channel_scales, rounding_kld

KEPT_BYTES = 2**30  # of output-side Hessians that are kept here; more are made block by block


class Survey:
    """Sensitivities and, into a folder where they are to be kept, output-side Hessians."""

    def __init__(self, sensitivities: Sensitivities, tokens: int, folder: Path | None = None):
        """tokens: of all rows."""
        self.sensitivities, self.tokens, self.folder = sensitivities, tokens, folder
        self._scales: dict[str, Scales] = {}
        self._klds: dict[str, float] = {}
        self._hessians: dict[str, OutputHessian] = {}

    def has(self, i: int) -> bool:
        return self.sensitivities.has(i)

    def begin(self, linears: dict[str, nn.Linear]) -> None:
        self._scales = {key: channel_scales(linear.weight) for key, linear in linears.items()}
        self._klds = dict.fromkeys(linears, 0.0)
        wanted = {} if self.folder is None else with_hessians(linears)
        self._hessians = {key: OutputHessian(m.out_features) for key, m in wanted.items()}

    def add(self, passed: Passed) -> None:
        for key, d in passed.gradients.items():
            kld = rounding_kld(passed.inputs[key], d, self._scales[key])
            self._klds[key] += kld / self.tokens
            if key in self._hessians:
                self._hessians[key].add(d)

    def save(self, i: int) -> None:
        if self.folder is not None:
            save_output_hessians(self.folder, self._hessians, self.sensitivities.identity)
        self.sensitivities.save(i, self._klds)  # last: it tells that the block was seen


def survey_folder(settings: Settings, model: StreamedModel, tokens: int) -> Path | None:
    """Where a survey of so many tokens keeps output-side Hessians; None: they would take too much,
    or are not wanted."""
    if settings.hessian != "kron" or not shared_by_gradients(settings):
        return None
    if settings.save_hessians is not None:
        return Path(settings.save_hessians)
    total = output_hessian_bytes(model, range(model.num_blocks), tokens)
    return Path(settings.work_dir) / GRADIENTS if total <= KEPT_BYTES else None
