"""How a conversion gets along with the memory there is: the machine's, and that of its GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import nn

from exl3 import parallel
from exl3.devices import free_bytes
from exl3.errors import UserError
from exl3.format.hadamard import HADAMARD
from exl3.format.layer import padded
from exl3.jobs.boundaries import boundary_memory
from exl3.jobs.output_hessians import WHOLE_HEAD, output_hessian_bytes
from exl3.jobs.plan import Plan, gradient_rows, traces_back
from exl3.jobs.settings import Settings
from exl3.jobs.streams import BATCH_TOKENS, SAMPLE_ROWS
from exl3.jobs.survey import survey_folder
from exl3.memory import GIB, available_bytes, resident_now
from exl3.model.streamed import StreamedModel
from exl3.quant.two_sided import SQUARE, TOGETHER
from exl3.sensitivity import share_of_tokens


@dataclass(frozen=True)
class Thrift:
    """What a conversion does to save memory, for time. The result is the same, bit for bit."""

    replay: bool = True  # parts of a block that are done with keep their outputs
    spill: bool = False  # states live in files of the work folder
    on_card: bool = False  # or in the memory of the GPU that runs the model

    def __str__(self) -> str:
        where = "states are kept in files, and " if self.spill else ""
        return f"{where}parts of a block are computed again where they could be remembered"


THRIFTS = (Thrift(), Thrift(replay=False), Thrift(replay=False, spill=True))
GPU_THRIFTS = (Thrift(on_card=True), *THRIFTS)

CUDA_BYTES = 2 * GIB  # of main memory, for CUDA and its libraries
CARD_BYTES = 2 * GIB  # of a card's, for these and for the search's workspace, which is at most one
CARD_SHARE = 0.9  # of a card's memory: the rest is gaps between tensors


def choose_thrift(
    settings: Settings,
    model: StreamedModel,
    plan: Plan,
    rows: int,
    others: Sequence[torch.device] = (),
) -> Thrift:
    """The fastest way that fits in --max_memory (default: what is free), and on the GPU if the
    model runs on one. others: GPUs that only share the linears.

    UserError, with the part of the model that is too large, if none does.
    """
    given = settings, model, plan, rows
    thrifts = THRIFTS if model.device.type == "cpu" else GPU_THRIFTS
    for other in others:
        need, there = sharing_bytes(settings, model), card_limit(other)
        if need > there:
            raise UserError(
                f"a layer's work needs {need / GIB:,.1f} GiB on {other}, which has "
                f"{there / GIB:,.1f} GiB to spare; leave it out of -d, or free it of other programs"
            )
    for thrift in thrifts:
        if _lacking(thrift, *given) is None:
            return thrift
    raise UserError(_lacking(thrifts[-1], *given))


def _lacking(
    thrift: Thrift, settings: Settings, model: StreamedModel, plan: Plan, rows: int
) -> str | None:
    """What is too short for this way, as a sentence for the user; None if it fits."""
    given = settings, model, plan, rows, thrift
    part, _ = _largest(*given)
    if model.device.type != "cpu":
        need, there = computing_bytes(*given), card_limit(model.device)
        if need > there:
            return (
                f"{part} needs {need / GIB:,.1f} GiB on {model.device}, which has "
                f"{there / GIB:,.1f} GiB to spare; use a GPU with more, try --hessian input or "
                "--no_correction, or work on the CPU (-d cpu)"
            )
        part = "the conversion"
    need, limit = resident_now() + peak_bytes(*given), memory_limit(settings)
    if need <= limit:
        return None
    whose = "--max_memory is" if settings.max_memory is not None else "there are"
    return (
        f"{part} needs {need / GIB:,.1f} GiB of memory, {whose} {limit / GIB:,.1f} GiB; "
        "use a machine with more, or try --hessian input, --no_correction or fewer threads "
        "(EXL3_THREADS)"
    )


def card_limit(device: torch.device) -> int:
    """Bytes of tensors that there is room for on a GPU."""
    return max(0, int(free_bytes(device) * CARD_SHARE) - CARD_BYTES)


def computing_room(settings: Settings, model: StreamedModel) -> tuple[int, int]:
    """Of the memory that the model computes in: bytes taken already, and the limit."""
    if model.device.type == "cpu":
        return resident_now(), memory_limit(settings)
    return 0, card_limit(model.device)


def beside_model(model: StreamedModel, thrift: Thrift) -> bool:
    """Whether states lie in the memory that the model computes in."""
    return not thrift.spill if model.device.type == "cpu" else thrift.on_card


def memory_limit(settings: Settings) -> int:
    """Bytes that this process may take."""
    if settings.max_memory is not None:
        return int(settings.max_memory * GIB)
    return available_bytes() + resident_now()


def peak_bytes(
    settings: Settings, model: StreamedModel, plan: Plan, rows: int, thrift: Thrift
) -> int:
    """Bytes of main memory on top of the program itself, with this many calibration rows."""
    if model.device.type == "cpu":
        return computing_bytes(settings, model, plan, rows, thrift)
    kept = 0 if thrift.spill or thrift.on_card else _kept_states(settings, model, rows)
    if traces_back(settings):
        kept += boundary_memory(model, gradient_rows(settings, model, rows), settings.cal_cols)
    # Tensors on their way from the files to the card and back: the largest is the embedding.
    return CUDA_BYTES + kept + 2 * _bytes(model, model.embedding_keys())


def computing_bytes(
    settings: Settings, model: StreamedModel, plan: Plan, rows: int, thrift: Thrift
) -> int:
    """Bytes where the model computes: in main memory, or on its GPU."""
    states = _streams(settings) * states_bytes(settings, model, rows)
    states = states if beside_model(model, thrift) else 0
    kept = _bytes(model, model.embedding_keys())
    return kept + states + _largest(settings, model, plan, rows, thrift)[1]


def sharing_bytes(settings: Settings, model: StreamedModel) -> int:
    """Bytes on a GPU that is given single linears of the model's blocks: one with what is known of
    its inputs."""
    linears = model.linears(head=False).values()
    return max(_known(settings, [m], [m]) + _linear_peak(settings, m) for m in linears)


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
    return _kept_states(settings, model, rows)


def _kept_states(settings: Settings, model: StreamedModel, rows: int) -> int:
    """Of all that `Streams.empty` makes room for."""
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
    if traces_back(settings):
        passed = gradient_rows(settings, model, rows)
        blocks = range(model.num_blocks)
        backward = max(_block_backward(settings, model, i, passed) for i in blocks)
        backward += boundary_memory(model, passed, settings.cal_cols)
        parts.append(("the backward pass", backward))
    return max(parts, key=lambda part: part[1])


def _block_peak(settings: Settings, model: StreamedModel, i: int, rows: int, thrift: Thrift) -> int:
    """A block, what is known of its inputs and outputs, and its largest linear; or a block and
    what runs through it."""
    linears = model.block_linears(i)
    experts = model.expert_linears(i)
    plain = {key: m for key, m in linears.items() if key not in experts}
    states = states_bytes(settings, model, rows)
    block = _bytes(model, model.block_keys(i))
    block += 4 * sum(m.weight.numel() for m in plain.values())
    block += states_bytes(settings, model, min(rows, SAMPLE_ROWS))  # to tell the block's error by
    if experts and beside_model(model, thrift):
        block += _entering(settings) * states
    if thrift.replay and not settings.no_correction:
        block += 2 * states
    if settings.hessian == "kron":
        tokens = gradient_rows(settings, model, rows) * settings.cal_cols
        block += output_hessian_bytes(model, [i], tokens)
    running = _running(settings, model, i)
    working = max(_linear_peak(settings, m) for m in linears.values())
    known = _known(settings, list(linears.values()), list(plain.values()))
    return block + max(running, known + working)


def _block_backward(settings: Settings, model: StreamedModel, i: int, rows: int) -> int:
    """Of block i in the backward pass, and of the output-side Hessians that are kept from it."""
    tokens, hessians = rows * settings.cal_cols, 0
    if survey_folder(settings, model, tokens) is not None:
        hessians = output_hessian_bytes(model, [i], tokens)
    return _bytes(model, model.block_keys(i)) + _running(settings, model, i) + hessians


def _running(settings: Settings, model: StreamedModel, i: int) -> int:
    """Of what runs through block i."""
    experts = model.expert_linears(i)
    asked = share_of_tokens(model.config.get_text_config(decoder=True))
    passing = sum(
        (asked if key in experts else 1) * (m.in_features + m.out_features)
        for key, m in model.block_linears(i).items()
    )
    backwards = traces_back(settings) or settings.tune > 0
    running = running_bytes(settings, ceil(passing), backwards)
    return running + (attention_bytes(settings, model) if backwards else 0)


def running_bytes(settings: Settings, features: int, backwards: bool) -> int:
    """Of so many values a token in all threads, forwards and perhaps backwards."""
    tokens = max(BATCH_TOKENS, settings.cal_cols) * parallel.threads()
    tokens = min(tokens, settings.cal_rows * settings.cal_cols)
    return 4 * tokens * (3 if backwards else 2) * features


def attention_bytes(settings: Settings, model: StreamedModel) -> int:
    """Of the probabilities that attention keeps for gradients, as `attention_for_gradients` has it:
    a kernel on the CPU keeps none."""
    if model.device.type == "cpu":
        return 0
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", 0)
    return 3 * 4 * heads * max(BATCH_TOKENS, settings.cal_cols) * settings.cal_cols


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
    target one more of the weight, with an output-side Hessian two. A large head's output-side
    Hessian is in blocks: a sum, its mean, and what every thread adds to it; there some columns at
    a time are copied."""
    rows, columns = padded(linear.in_features), padded(linear.out_features)
    copies = 3.5 if settings.no_correction else 4.5
    outputs = 0
    if settings.hessian == "kron":
        blocks = (2 + parallel.threads()) * 4 * HADAMARD * columns
        whole = not head or linear.out_features <= WHOLE_HEAD
        outputs = (2 * 8 + 2 * 4) * columns**2 if whole else blocks
        copies += 2 if whole else 2 * min(1.0, TOGETHER * SQUARE / columns)
    return int(copies * 4 * rows * columns) + 6 * 8 * rows**2 + outputs


def _bytes(model: StreamedModel, keys: list[str]) -> int:
    """Of checkpoint tensors in the dtype they are loaded in."""
    return sum(model.dtype.itemsize * prod(model.checkpoint.shape(key)) for key in keys)
