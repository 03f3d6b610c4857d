"""A tiny model, its quants at 2, 3 and 4 bits, and a measurement of them made by hand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs_helpers import flags, run
from tiny_models import save_tiny, save_tokenizer

from exl3.errors_by_bits import relative_error
from exl3.groups import Group, group
from exl3.measurement import (
    Candidate,
    MeasuredGroup,
    Measurement,
    Original,
    Part,
    Quant,
    write_measurement,
)
from exl3.model.checkpoint import Checkpoint
from exl3.splice import Quant as SpliceQuant

BITS = (2, 3, 4)


@dataclass(frozen=True)
class Tiny:
    """Folders."""

    model: Path
    quants: tuple[Path, ...]


def make_tiny(folder: Path) -> Tiny:
    model = save_model(folder / "model")
    quants = tuple(convert(model, folder / f"q{bits}", bits) for bits in BITS)
    return Tiny(model, quants)


def save_model(folder, **sizes) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2} | sizes
    save_tiny("llama", folder, vocab_size=300, max_position_embeddings=128, **sizes)
    save_tokenizer(folder)
    return folder


def convert(model: Path, out: Path, bits: int, *more: str, head_bits: int | None = None) -> Path:
    """A plain quant; its head has twice the bits unless told."""
    work = out.with_name(f"{out.name}-work")
    given = flags(model, out, work, str(bits), **{"-cr": 3, "-cc": 32})
    run(*given, "-hb", str(head_bits or 2 * bits), "--no_correction", "--hessian", "input", *more)
    return out


def worth(key: str) -> float:
    """What was 'measured': down projections and the last block matter most."""
    return (3 if "down" in key else 1) * (2 if ".1." in key else 1) * 0.01


def measurement(
    tiny: Tiny, numbers=(0, 1, 2), level: int = 4, method="isolate", parts=False
) -> Measurement:
    """What a measurement of these quants could be; with parts, gradients tell the very truth."""
    quants = [SpliceQuant(tiny.quants[i]) for i in numbers]
    bits = [BITS[i] for i in numbers]
    keys = [[n for n in quants[0].decoder if f".{block}." in n] for block in range(2)]
    groups = []
    for idx, own in enumerate(group(keys, level)):
        klds = [sum(worth(k) for k in own.keys) * relative_error({b: 1}, None) for b in bits]
        stored = [sum(q.module_bits(key) for key in own.keys) for q in quants]
        candidates = tuple(
            Candidate(klds[i] - klds[0], stored[i] - stored[0], 0.0, None, (bits[i],))
            for i in range(1, len(quants))
        )
        isolated = (klds[0], 0.0) if method == "isolate" else (None, None)
        n = sum(quants[0].layers[key].weights for key in own.keys)
        parts_known = parts_of(own, quants, bits) if parts else ()
        groups.append(
            MeasuredGroup(
                *(idx, own.keys, candidates, own.block, own.name, n, *isolated, stored[0]),
                k=(bits[0],),
                parts=parts_known,
                sensitivity=sum(map(worth, own.keys)) if parts else None,
            )
        )
    described = [Quant(str(q.folder), q.bpw, 0.1 / b) for q, b in zip(quants, bits, strict=True)]
    return Measurement(
        "LlamaForCausalLM",
        described[0],
        tuple(described[1:]),
        tuple(groups),
        method=method,
        level=level,
        model=Original(str(tiny.model), Checkpoint(tiny.model).fingerprint(), "mul1"),
        base_kld=described[0].kld,
    )


def parts_of(own: Group, quants: Sequence[SpliceQuant], bits: Sequence[int]) -> tuple[Part, ...]:
    """The tensors of a group."""
    total = sum(map(worth, own.keys))
    return tuple(
        Part(
            key.rpartition(".")[2],
            (key,),
            quants[0].layers[key].weights,
            worth(key) / total,
            tuple(quant.module_bits(key) for quant in quants),
            tuple((b,) for b in bits),
        )
        for key in own.keys
    )


def save_measurement(path: Path, tiny: Tiny, **kind) -> Path:
    write_measurement(path, measurement(tiny, **kind))
    return path
