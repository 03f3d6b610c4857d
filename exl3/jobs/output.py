"""What a conversion writes: the model's files, and what its configs say."""

from pathlib import Path

from exl3 import __version__
from exl3.format.directory import (
    FORMAT_VERSION,
    StoredModule,
    copy_small_files,
    read_config,
    write_configs,
    write_weights,
)
from exl3.format.layer import UNQUANTIZED
from exl3.jobs import out_folder
from exl3.jobs.plan import Plan
from exl3.jobs.routers import corrected_routers
from exl3.jobs.settings import Settings
from exl3.jobs.source import Source
from exl3.jobs.stored import stored_modules, with_made
from exl3.jobs.tune import RESULT
from exl3.jobs.workdir import WorkDir
from exl3.model.rope import with_rope


def write(settings: Settings, work: WorkDir, source: Source, plan: Plan) -> str:
    """Writes the model folder from the source and the finished layers. Returns what it holds."""
    origin = Path(settings.in_dir)
    folder = out_folder.begin(settings.out_dir, source.job_id)
    stored = list(stored_modules(settings, source.model, plan, work.load_layer))
    tuned, tuning = work.load_tuning(RESULT) or ({}, None)
    routers = corrected_routers(source.model, work)
    stored = [with_made(module, routers | tuned) for module in stored]
    write_weights(folder, stored, out_folder.shard_bytes(settings.shard_size))
    config = with_rope(read_config(origin), source.model.rope_parameters)
    quantization = quantization_config(settings, source, plan, stored)
    if tuning is not None:
        quantization["producer"]["tuning"] = tuning
    write_configs(folder, config, quantization, stored)
    copy_small_files(origin, folder)
    out_folder.finish(folder, settings.out_dir)
    size = sum(module.nbytes for module in stored) / 2**20
    head = "unquantized" if settings.head_bits == UNQUANTIZED else f"{settings.head_bits} bits"
    return (
        f"{size:,.1f} MiB; {plan.average:.3f} bits per weight, "
        f"{stored_bits(plan, stored):.3f} with scales; head {head}"
    )


def quantization_config(
    settings: Settings, source: Source, plan: Plan, stored: list[StoredModule]
) -> dict:
    """What the configs say about how the quant was made."""
    rows, cols = source.rows.shape
    return {
        "quant_method": "exl3",
        "version": FORMAT_VERSION,
        "bits": round(plan.average, 2),
        "head_bits": settings.head_bits,
        "calibration": {"rows": rows, "cols": cols},
        "out_scales": settings.out_scales,
        "codebook": settings.codebook,
        "producer": {
            "name": "exl3",
            "version": __version__,
            "job": source.job_id,
            "source": source.identity["source model"],
            "seed": settings.seed,
            "hq": settings.hq,
            "correction": not settings.no_correction,
            "hessian": settings.hessian,
            "calibration_hash": source.identity["calibration rows"],
            "stored_bits": round(stored_bits(plan, stored), 4),
        },
    }


def stored_bits(plan: Plan, stored: list[StoredModule]) -> float:
    """Bits a weight of the decoder's linears, with everything they are stored as."""
    decoder = {module.key for module in plan.modules}
    return 8 * sum(m.nbytes for m in stored if m.name in decoder) / plan.weights
