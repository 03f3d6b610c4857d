"""A measurement: what the bits of each group of modules are worth, in KL divergence from the
original model.

First gradients back through the original, which foretell what every tensor costs, and so how a
group's KLD divides.
Then the original forwards, every quant as a whole, and every group of every quant by itself, many
side by side in one sweep through the blocks. What is finished is kept, and the file written anew.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from exl3 import parallel
from exl3.data.rows import rows_hash
from exl3.devices import backend, pick_device
from exl3.jobs.measure_files import MeasureFiles
from exl3.jobs.measure_input import Input, Request, open_input
from exl3.jobs.measure_layers import LayerMaker
from exl3.jobs.measure_plan import Plan, Targets, make_targets
from exl3.jobs.measure_report import report
from exl3.jobs.measure_results import Results
from exl3.jobs.measure_shares import Shares
from exl3.jobs.measure_sweep import Stream, Sweep, stream_klds
from exl3.jobs.workdir import BACKEND
from exl3.measurement import Measurement
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress


def measure(request: Request) -> None:
    """Does what is left of a measurement and prints what came of it. UserError for bad input."""
    files = MeasureFiles(request.out)
    files.refuse_strangers()
    device, note = pick_device(request.device)
    if note:
        print(note)
    with parallel.one_thread_per_op(), parallel.work_on(device):
        found = open_input(request, device)
        identity = _identity(request, found)
        job = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        done = files.measured()
        if done is not None and done.job == job and done.complete:
            print(f"{request.out} is complete already")
        else:
            with files.claimed(identity, job):
                done = _measure(request, found, files, job)
        files.remove_work(identity)
    print(report(done, request.out))


def _identity(request: Request, found: Input) -> dict[str, object]:
    """What the numbers depend on."""
    identity = {
        "original": found.original.checkpoint.fingerprint(),
        "quants": [quant.model.checkpoint.fingerprint() for quant in found.quants],
        "rows": rows_hash(found.rows),
        "method": request.method,
        "level": request.level,
    }
    if found.original.rope_parameters:
        identity["rotary embeddings"] = found.original.rope_parameters
    if not found.quants:
        identity |= {
            "bits": request.bits,
            "codebook": request.codebook,
            "rows to quantize with": rows_hash(found.hessian_rows),
            BACKEND: backend(found.original.device),
        }
    return identity


def _measure(request: Request, found: Input, files: MeasureFiles, job: str) -> Measurement:
    """Does what is not done yet."""
    targets = make_targets(request, found, files)
    shares = Shares(found.original, found.gradient_rows, files)
    plan = Plan(request, found, targets, files, shares)
    results = Results(request, found, targets, files, shares, job)
    files.save_out(results.measurement())
    print(plan.text(), flush=True)
    shares.make()
    with Progress(plan.cost(), "Measuring") as progress:
        steps = _Steps(request, found, targets, files, results, progress)
        if plan.original_left:
            steps.original()
        for stream in plan.wholes:
            quant = found.quants[targets.wholes.index(stream)]
            steps.sweep(quant.model, stream.name, [stream], None)
        for n, streams in enumerate(plan.passes):
            following = next((after[0].block for after in plan.passes[n + 1 :]), None)
            steps.sweep(steps.home, "home", streams, following)
    files.save_out(results.measurement())  # also where gradients alone were missing
    return results.measurement()


@dataclass(frozen=True)
class _Steps:
    request: Request
    found: Input
    targets: Targets
    files: MeasureFiles
    results: Results
    progress: Progress

    @property
    def home(self) -> StreamedModel:
        """The model that groups are put into."""
        swap = self.request.method == "swap"
        return self.found.quants[0].model if swap else self.found.original

    def original(self) -> None:
        """What leaves the original's last block; without quants, the layers on the way."""
        model, rows = self.found.original, self.found.rows
        maker = None if self.found.quants else self._maker()
        stream = Stream("original", 0)
        sweep = Sweep(
            model,
            "original",
            torch.cat([rows, self.found.hessian_rows]),
            [stream],
            self.files,
            self.progress,
            before_block=maker and maker.block,
        )
        states = sweep.run()[stream.name].states
        if maker:
            maker.head(states)
        self.files.save_original(states[: len(rows)])
        self.files.drop_states()

    def _maker(self) -> LayerMaker:
        return LayerMaker(
            self.found.original,
            self.found.hessian_rows,
            len(self.found.rows),
            self.request.bits,
            self.request.codebook,
            self.files.work,
            self.progress,
        )

    def sweep(
        self, model: StreamedModel, name: str, streams: Sequence[Stream], following: int | None
    ) -> None:
        """Streams through a model to their ends, and what is known then."""
        rows = self.found.rows
        live = Sweep(model, name, rows, streams, self.files, self.progress, following).run()
        self.progress.doing("comparing")
        klds = stream_klds(
            *(self.found.original, model, rows, self.files.original_row),
            *(streams, live, self.progress),
        )
        for stream in streams:
            self.files.save_kld(stream.name, klds[stream.name], live[stream.name].error)
        self.files.drop_states()
        self.files.save_out(self.results.measurement())
