"""The original's gradients, before a conversion: what they say decides who gets how many bits, and
what they leave on the disk weighs the errors of every linear."""

from exl3.files import one_at_a_time
from exl3.jobs.boundaries import Boundaries, boundary_gradients, boundary_work
from exl3.jobs.output_hessians import all_saved
from exl3.jobs.plan import Plan, gradient_rows, make_plan, shared_by_gradients, traces_back
from exl3.jobs.sensitivities import Sensitivities
from exl3.jobs.settings import Settings
from exl3.jobs.source import Source
from exl3.jobs.streams import spread
from exl3.jobs.survey import Survey, survey_folder
from exl3.jobs.workdir import WorkDir
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress


def trace_back(
    settings: Settings, work: WorkDir, source: Source, plan: Plan
) -> tuple[Plan, Boundaries | None]:
    """One backward pass over some of the rows, as far as it is wanted and not done yet.

    plan: without what the gradients say. Returns the plan with it, and the gradients at the
    boundaries of the blocks, None without output-side Hessians. Nothing is run where all layers are
    finished, or --save_hessians has all that is made of it.
    """
    if not traces_back(settings):
        return plan, None
    with one_at_a_time(settings.save_hessians):
        return _trace_back(settings, work, source, plan)


def _trace_back(
    settings: Settings, work: WorkDir, source: Source, plan: Plan
) -> tuple[Plan, Boundaries | None]:
    rows, model = source.rows, source.model
    picked = rows[spread(rows, gradient_rows(settings, model, len(rows)))]
    boundaries = Boundaries(work.gradients, model, picked, settings.seed)
    sensitivities, survey = None, None
    if shared_by_gradients(settings):
        sensitivities = _sensitivities(settings, work, model, boundaries.identity)
        folder = survey_folder(settings, model, picked.numel())
        survey = Survey(sensitivities, picked.numel(), folder)
    if _wanted(settings, work, source, plan, sensitivities):
        with Progress(boundary_work(model, len(picked)), "Tracing back") as progress:
            boundary_gradients(model, boundaries, progress, survey)
    if sensitivities is not None:
        plan = make_plan(settings, model, sensitivities.by_key())
    if settings.hessian == "kron":
        return plan, boundaries
    work.drop_gradients()
    return plan, None


def _sensitivities(
    settings: Settings, work: WorkDir, model: StreamedModel, identity: dict[str, str]
) -> Sensitivities:
    """Those that the job began with, or in the folder that it shares with others."""
    begun = Sensitivities(work.path, identity, model.num_blocks)
    if begun.complete or settings.save_hessians is None:
        return begun
    return Sensitivities(settings.save_hessians, identity, model.num_blocks, own=False)


def _wanted(
    settings: Settings,
    work: WorkDir,
    source: Source,
    plan: Plan,
    sensitivities: Sensitivities | None,
) -> bool:
    """Whether anything is missing that the gradients tell."""
    if sensitivities is not None and not sensitivities.complete:
        return True
    if settings.hessian != "kron" or all(work.has_layer(m.key) for m in plan.modules):
        return False
    linears = source.model.linears(head=False)
    return not (settings.save_hessians and all_saved(settings.save_hessians, linears))
