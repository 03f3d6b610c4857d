"""The best quant for a size: choose, measure for real, write the best; or write a recipe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from exl3 import parallel
from exl3.data.rows import rows_hash
from exl3.devices import pick_device
from exl3.errors import UserError
from exl3.format.manifest import file_digest
from exl3.jobs import out_folder
from exl3.jobs.candidates import Candidate, Problem
from exl3.jobs.optimize_input import (
    ADVICE,
    Request,
    head_number,
    job_of,
    open_quants,
    refuse_corrected,
)
from exl3.jobs.splice_check import (
    TOGETHER,
    Measured,
    Notes,
    held_out_rows,
    measure,
    notes_of,
)
from exl3.measurement import read_measurement
from exl3.splice import write_splice

PATIENCE = 2  # rounds that found nothing better


class NotBetter(Exception):
    """No choice beats a plain quant. The text is one sentence for the user."""


@dataclass(frozen=True)
class Trial:
    """A candidate and what was measured of it."""

    candidate: Candidate
    measured: Measured


def optimize(request: Request) -> None:
    """Writes the best splice. UserError for bad input, NotBetter if a plain quant is as good."""
    with parallel.one_thread_per_op():
        measurement = read_measurement(request.measurement)
        out_folder.refuse_strangers(request.out)
        inputs = [path for path in (*request.quants, request.original) if path is not None]
        out_folder.refuse_overlap(request.out, inputs)
        quants = open_quants(request, measurement)
        head = head_number(request, quants)
        refuse_corrected(request, quants)
        job = job_of(request, quants)
        if out_folder.is_complete(request.out, job):
            print(f"{request.out} is complete already")
            return
        with notes_of(request.out) as notes:
            _optimize(request, Problem(measurement, quants, head), job, notes)


def _optimize(request: Request, problem: Problem, job: str, notes: Notes) -> None:
    _tell_predictions(problem)
    candidates = problem.candidates(request.bitrate)
    best, record = candidates[0], {}
    print(
        f"{best.splice.bpw:.3f} bits per weight as stored ({request.bitrate:g} asked), predicted "
        f"KLD {best.predicted:.5f}, optimality gap {best.gap:.2%}"
    )
    if request.verifies:
        best, record = _best(request, problem, candidates, notes)
    record |= {"target": request.bitrate, "predicted_kld": best.predicted}
    record["measurement"] = file_digest(request.measurement)
    write_splice(best.splice, request.out, request.shard_size, job, record)
    print(
        f"Wrote {request.out}: {best.splice.bpw:.3f} bits per weight as stored, head "
        f"{best.splice.head_bits}"
    )


def _tell_predictions(problem: Problem) -> None:
    """Warns where the measurement knows other bits than these quants have."""
    if problem.measured_share == 1:
        return
    measured, wanted = (
        ", ".join(f"{bpw:.2f}" for bpw in found if bpw is not None)
        for found in (
            [problem.measurement.base.bpw, *(alt.bpw for alt in problem.measurement.alts)],
            [quant.bpw for quant in problem.quants],
        )
    )
    print(
        f"Warning: measured at {measured or 'other'} bits, used for quants of {wanted}: "
        f"{1 - problem.measured_share:.0%} of the KLDs are predicted by the ratio of the trellis "
        "errors. Expect a worse choice the farther these bitrates are apart; --verify (with -r) "
        "tells how good it is."
    )


def _best(
    request: Request,
    problem: Problem,
    candidates: Sequence[Candidate],
    notes: Notes,
) -> tuple[Candidate, dict]:
    """The best candidate by measurement, and what to record of it. NotBetter if there is none."""
    device, note = pick_device(request.device)
    if note:
        print(note)
    rows = held_out_rows(request.original, request.verify, request.text, request.trust_remote_code)
    if problem.measurement.rows and problem.measurement.rows.hash == rows_hash(rows):
        raise UserError("--verify would use the very rows of the measurement; give other text (-c)")

    kept: list[torch.Tensor] = []

    def tried(candidates: Sequence[Candidate]) -> list[Trial]:
        splices = [candidate.splice for candidate in candidates]
        if not splices:
            return []
        given = (request.original, splices, rows, notes, request.trust_remote_code)
        found = measure(*given, device=device, kept=kept)
        return [Trial(c, m) for c, m in zip(candidates, found, strict=True)]

    below = max(i for i, q in enumerate(problem.quants) if q.bpw <= request.bitrate)
    above = min(below + 1, len(problem.quants) - 1)
    plain = {i: problem.plain(i) for i in sorted({0, below, above})}
    trials = tried([*plain.values(), *candidates])
    plain_trials = dict(zip(plain, trials, strict=False))
    trials += taught(problem, trials[len(plain) :], request.bitrate, request.rounds, tried)
    best = _lowest(trials[len(plain) :])
    line = _line(plain_trials[below], plain_trials[above], best.candidate.splice.bpw)
    _print_table(trials, best, rows)
    _judge(request, best, plain_trials[below], line)
    record = {
        "kld": best.measured.kld,
        "kld_error": best.measured.error,
        "straight_line": line,
        "rows": {"rows": len(rows), "cols": rows.shape[1], "hash": rows_hash(rows)},
        "tried": [_told(trial) for trial in trials],
    }
    return best.candidate, record


def taught(
    problem: Problem,
    trials: Sequence[Trial],
    bitrate: float,
    rounds: int,
    tried: Callable[[Sequence[Candidate]], list[Trial]],
) -> list[Trial]:
    """More trials, a few a round, of what the trials before them teach, while that finds better."""
    known, idle = list(trials), 0
    for _ in range(rounds):
        first = len(known) - len(trials) + 1
        names = [f"learned {n}" for n in range(first, first + TOGETHER)]
        klds = [(trial.candidate, trial.measured.kld) for trial in known]
        found = tried(problem.taught(klds, bitrate, names))
        if not found:
            break
        idle = 0 if _lowest(found).measured.kld < _lowest(known).measured.kld else idle + 1
        known += found
        if idle == PATIENCE:
            break
    return known[len(trials) :]


def _lowest(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.measured.kld)


def _line(low: Trial, high: Trial, bpw: float) -> float:
    """KLD at some bits on the straight line between two plain quants."""
    a, b = low.candidate.splice.bpw, high.candidate.splice.bpw
    share = (bpw - a) / (b - a) if b > a else 0.0
    return low.measured.kld + share * (high.measured.kld - low.measured.kld)


def _judge(request: Request, best: Trial, plain: Trial, line: float) -> None:
    """Says how the best compares. NotBetter if it is not worth having, unless that is forced."""
    kld, beats_line = best.measured.kld, best.measured.kld < line
    print(
        f"{best.candidate.name}: KLD {kld:.5f}, {'below' if beats_line else 'NOT below'} the "
        f"straight line between its neighbours ({line:.5f})"
    )
    problem = None
    if not kld < plain.measured.kld:
        problem = (
            f"no choice of {request.bitrate:g} bits beats {plain.candidate.name} (KLD "
            f"{plain.measured.kld:.5f}), which is not larger"
        )
    elif any(quant.corrected for quant in best.candidate.splice.quants) and not beats_line:
        problem = (
            "these quants corrected every layer for the errors before it, and mixed they lose "
            f"more than they win; {ADVICE}"
        )
    if problem is None:
        return
    if not request.force:
        raise NotBetter(f"{problem}; nothing was written (--force writes it all the same)")
    print(f"Warning: {problem}")


def _print_table(trials: Sequence[Trial], best: Trial, rows: torch.Tensor) -> None:
    print(f"On {len(rows)} held-out rows of {rows.shape[1]} tokens:")
    width = max(len(trial.candidate.name) for trial in trials)
    print(f"  {'':{width}}    bits  predicted KLD  measured KLD")
    for trial in trials:
        print(
            f"{'*' if trial is best else ' '} {trial.candidate.name:{width}} "
            f"{trial.candidate.splice.bpw:7.3f}  {trial.candidate.predicted:13.5f}  "
            f"{trial.measured.kld:12.5f} ± {trial.measured.error:.5f}"
        )


def _told(trial: Trial) -> dict:
    """A trial as the record tells it; folders by their names alone."""
    return {
        "name": Path(trial.candidate.name).name,
        "bpw": trial.candidate.splice.bpw,
        "predicted_kld": trial.candidate.predicted,
        "kld": trial.measured.kld,
        "kld_error": trial.measured.error,
    }
