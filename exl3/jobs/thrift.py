"""How a conversion gets along with the memory there is."""

import resource
import sys
from dataclasses import dataclass
from math import ceil, prod

from torch import nn

from exl3 import parallel
from exl3.errors import UserError
from exl3.format.layer import padded
from exl3.jobs.boundaries import boundary_memory
from exl3.jobs.output_hessians import output_hessian_bytes
from exl3.jobs.plan import Plan
from exl3.jobs.settings import Settings
from exl3.jobs.streams import BATCH_TOKENS, SAMPLE_ROWS
from exl3.memory import GIB, available_bytes, resident_now
from exl3.model.streamed import StreamedModel


@dataclass(frozen=True)
class Thrift:
    """What a conversion does to save memory, for time. The result is the same, bit for bit."""

    replay: bool = True  # parts of a block that are done with keep their outputs
    spill: bool = False  # states live in files of the work folder

    def __str__(self) -> str:
        where = "states are kept in files, and " if self.spill else ""
        return f"{where}parts of a block are computed again where they could be remembered"


THRIFTS = (Thrift(), Thrift(replay=False), Thrift(replay=False, spill=True))


def choose_thrift(settings: Settings, model: StreamedModel, plan: Plan, rows: int) -> Thrift:
    """The fastest way that fits in --max_memory (default: what is free).

    UserError, with the part of the model that is too large, if none does.
    """
    limit = memory_limit(settings)
    for thrift in THRIFTS:
        need = resident_bytes() + peak_bytes(settings, model, plan, rows, thrift)
        if need <= limit:
            return thrift
    whose = "--max_memory is" if settings.max_memory is not None else "there are"
    part, _ = _largest(settings, model, plan, rows, THRIFTS[-1])
    raise UserError(
        f"{part} needs {need / GIB:,.1f} GiB of memory, {whose} {limit / GIB:,.1f} GiB; "
        "use a machine with more, or try --hessian input, --no_correction or fewer threads "
        "(EXL3_THREADS)"
    )


def memory_limit(settings: Settings) -> int:
    """Bytes that this process may take."""
    if settings.max_memory is not None:
        return int(settings.max_memory * GIB)
    return available_bytes() + resident_now()


def peak_bytes(
    settings: Settings, model: StreamedModel, plan: Plan, rows: int, thrift: Thrift
) -> int:
    """Bytes on top of the program itself, with this many calibration rows."""
    states = 0 if thrift.spill else _streams(settings) * states_bytes(settings, model, rows)
    kept = _bytes(model, model.embedding_keys())
    return kept + states + _largest(settings, model, plan, rows, thrift)[1]


def resident_bytes() -> int:
    """The memory this process has taken at its peak so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def states_bytes(settings: Settings, model: StreamedModel, rows: int) -> int:
    """Of the states of one stream."""
    hidden = model.config.get_text_config(decoder=True).hidden_size
    return 4 * rows * settings.cal_cols * hidden


def _streams(settings: Settings) -> int:
    return 1 if settings.no_correction and not settings.tune else 2


def _entering(settings: Settings) -> int:
    """How many times the states of a stream is kept for experts: what enters them; with correction
    what enters the original's, and what their output lacks."""
    return 1 if settings.no_correction else 3


def spilled_bytes(settings: Settings, model: StreamedModel, rows: int, thrift: Thrift) -> int:
    """Of the work folder's disk, for what memory has no room for."""
    if not thrift.spill:
        return 0
    experts = any(model.block_experts(i) for i in range(model.num_blocks))
    count = _streams(settings) + experts * _entering(settings)
    return count * states_bytes(settings, model, rows)


def _largest(
    settings: Settings, model: StreamedModel, plan: Plan, rows: int, thrift: Thrift
) -> tuple[str, int]:
    """The part of the model that takes most, and how much that is."""
    parts = [
        (model.block_name(i), _block_peak(settings, model, i, rows, thrift))
        for i in range(model.num_blocks)
    ]
    parts.append(("the head", _head_peak(settings, model, plan)))
    if settings.hessian == "kron":
        passed = min(rows, settings.hessian_rows)
        loaded = max(_bytes(model, model.block_keys(i)) for i in range(model.num_blocks))
        backward = loaded + boundary_memory(model, passed, settings.cal_cols)
        parts.append(("the backward pass", backward))
    return max(parts, key=lambda part: part[1])


def _block_peak(settings: Settings, model: StreamedModel, i: int, rows: int, thrift: Thrift) -> int:
    """A block, what is known of its inputs and outputs, and its largest linear; or a block and
    what runs through it."""
    linears = model.block_linears(i)
    modules = [m for experts in model.block_experts(i).values() for m in experts.modules()]
    own = {id(m) for m in modules if isinstance(m, nn.Linear)}
    experts = {key: m for key, m in linears.items() if id(m) in own}
    plain = {key: m for key, m in linears.items() if id(m) not in own}
    states = states_bytes(settings, model, rows)
    block = _bytes(model, model.block_keys(i))
    block += 4 * sum(m.weight.numel() for m in plain.values())
    block += states_bytes(settings, model, min(rows, SAMPLE_ROWS))  # to tell the block's error by
    if experts and not thrift.spill:
        block += _entering(settings) * states
    if thrift.replay and not settings.no_correction:
        block += 2 * states
    asked = _asked(model, i)
    if settings.hessian == "kron":
        tokens = min(rows, settings.hessian_rows) * settings.cal_cols
        # At most: all experts get the same.
        block += output_hessian_bytes(plain, tokens)
        block += output_hessian_bytes(experts, ceil(asked * tokens))
    passing = sum(m.in_features + m.out_features for m in plain.values())
    passing += ceil(asked * sum(m.in_features + m.out_features for m in experts.values()))
    running = running_bytes(settings, passing, settings.hessian == "kron" or settings.tune > 0)
    working = max(_linear_peak(settings, m) for m in linears.values())
    known = _known(settings, list(linears.values()), list(plain.values()))
    return block + max(running, known + working)


def _asked(model: StreamedModel, i: int) -> float:
    """The share of a block's experts that a token is sent to; 1 where that is not known."""
    config = model.config.get_text_config(decoder=True)
    counts = [experts.num_experts for experts in model.block_experts(i).values()]
    asked = getattr(config, "num_experts_per_tok", None)
    return min(1.0, asked / min(counts)) if counts and asked else 1.0


def running_bytes(settings: Settings, features: int, backwards: bool) -> int:
    """Of so many values a token in all threads, forwards and perhaps backwards."""
    tokens = max(BATCH_TOKENS, settings.cal_cols) * parallel.threads()
    tokens = min(tokens, settings.cal_rows * settings.cal_cols)
    return 4 * tokens * (3 if backwards else 2) * features


def _known(settings: Settings, linears: list[nn.Linear], plain: list[nn.Linear]) -> int:
    """Bytes of Hessians: of one stage with its moments and their factor, or of all at once."""
    if settings.no_correction:
        inputs = {(m.in_features, m.out_features > m.in_features) for m in plain}
        inputs.add((max(m.in_features for m in linears), False))  # an expert's
        return 4 * sum(features**2 for features, _ in inputs)
    return max((4 + 4 + 8) * m.in_features**2 + 4 * m.in_features * m.out_features for m in linears)


def _head_peak(settings: Settings, model: StreamedModel, plan: Plan) -> int:
    key, head = model.head()
    if key not in plan.bits:
        return 0
    own = 0 if model.tied_head else 4 * head.weight.numel()
    return own + _known(settings, [head], [head]) + _linear_peak(settings, head, head=True)


def _linear_peak(settings: Settings, linear: nn.Linear, head: bool = False) -> int:
    """Of quantize_linear: three and a half copies of the weight, six of a float64 Hessian; with a
    target, and with an output-side Hessian, one more of the weight each."""
    rows, columns = padded(linear.in_features), padded(linear.out_features)
    copies = 3.5 if settings.no_correction else 4.5
    outputs = 0
    if settings.hessian == "kron" and not head:
        copies, outputs = copies + 1, (2 * 8 + 2 * 4) * columns**2
    return int(copies * 4 * rows * columns) + 6 * 8 * rows**2 + outputs


def _bytes(model: StreamedModel, keys: list[str]) -> int:
    """Of checkpoint tensors in the dtype they are loaded in."""
    return sum(model.dtype.itemsize * prod(model.checkpoint.shape(key)) for key in keys)
