"""Before a tuning: which rows it sees, whether the whole model fits in memory, its work."""

import json
from dataclasses import dataclass
from math import prod

import torch

from exl3 import parallel
from exl3.errors import UserError
from exl3.files import write_json
from exl3.jobs.boundaries import BACK
from exl3.jobs.job import TOKEN
from exl3.jobs.plan import Plan
from exl3.jobs.settings import Settings
from exl3.jobs.source import Source
from exl3.jobs.streams import TAIL_TOKENS
from exl3.jobs.thrift import (
    Thrift,
    attention_bytes,
    beside_model,
    computing_room,
    running_bytes,
    states_bytes,
)
from exl3.jobs.workdir import WorkDir
from exl3.model.streamed import StreamedModel
from exl3.sensitivity import share_of_tokens

WHOLE, BLOCKS = "the whole model", "block by block"
STEP_TOKENS = 8192  # of one step
HELD_SHARE = 8  # one of so many rows is held out,
HELD_TOKENS = 16384  # but not more tokens than that
LEAST_HELD = 2  # rows
LOGITS = 8  # copies of a piece's, in float32


@dataclass(frozen=True)
class TuningRows:
    """Which calibration rows a step sees, and which none sees."""

    held: torch.Tensor  # indices
    train: torch.Tensor
    count: int  # of a step
    seed: int

    @classmethod
    def of(cls, rows: torch.Tensor, seed: int) -> "TuningRows":
        """The last ones are held out. UserError for too few rows (rows, cols)."""
        n, cols = rows.shape
        if n <= LEAST_HELD:
            raise UserError(
                f"--tune holds {LEAST_HELD} calibration rows out and learns from others, there are "
                f"{n} in all; give more with -cr and -c, or leave it out"
            )
        held = max(LEAST_HELD, min(n // HELD_SHARE, HELD_TOKENS // cols))
        indices = torch.arange(n)
        count = min(max(1, STEP_TOKENS // cols), n - held)
        return cls(indices[n - held :], indices[: n - held], count, seed)

    def of_step(self, step: int) -> torch.Tensor:
        """Rows of a step; all have come before one comes again."""
        n = len(self.train)
        places = range(step * self.count, (step + 1) * self.count)
        orders = {place // n: self._order(place // n) for place in places}
        return self.train[torch.stack([orders[place // n][place % n] for place in places])]

    def _order(self, again: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.seed + again) % 2**63)
        return torch.randperm(len(self.train), generator=generator)


def tuning_way(
    settings: Settings, work: WorkDir, source: Source, plan: Plan, thrift: Thrift
) -> str:
    """How this job tunes. Decided when it begins, for the ways end in different bytes, and kept.

    UserError for too few rows.
    """
    TuningRows.of(source.rows, settings.seed)
    path = work.path / "tuned" / "way.json"
    if not path.exists():
        whole = whole_tuning_bytes(settings, source.model, plan, thrift) is not None
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"way": WHOLE if whole else BLOCKS})
    try:
        way = json.loads(path.read_text())["way"]
    except (ValueError, KeyError, TypeError):
        way = None
    if way not in (WHOLE, BLOCKS):
        raise UserError(f"{path} is damaged; start afresh in another work folder")
    return way


def whole_tuning_bytes(
    settings: Settings, model: StreamedModel, plan: Plan, thrift: Thrift
) -> int | None:
    """Memory of tuning the whole model where it computes, everything included; None if it is not
    to be tuned so."""
    taken, limit = computing_room(settings, model)
    need = taken + _whole_bytes(settings, model, plan, thrift)
    return need if settings.tune and need <= limit else None


def tuned_bytes(settings: Settings, model: StreamedModel) -> int:
    """Of the work folder's files about tuning: four float32 vectors, old and new, and the result.

    Norms are left out: they are few.
    """
    gains = sum(m.in_features + m.out_features for m in model.linears().values())
    return gains * (2 * 4 * 4 + 2) if settings.tune else 0


def _whole_bytes(settings: Settings, model: StreamedModel, plan: Plan, thrift: Thrift) -> int:
    """On top of the program itself."""
    key, head = model.head()
    blocks = [_bytes(model, model.block_keys(i)) for i in range(model.num_blocks)]
    weights = _bytes(model, [*model.embedding_keys(), *model.tail_keys()]) + sum(blocks)
    weights += 4 * head.weight.numel() if key in plan.bits else 0
    hidden = model.config.get_text_config(decoder=True).hidden_size
    step, held = (max(n, 2 * settings.cal_cols) for n in (STEP_TOKENS, HELD_TOKENS))
    kept = 4 * hidden * max((model.num_blocks + 3) * step, 3 * held)  # what enters the blocks
    states = states_bytes(settings, model, settings.cal_rows)
    kept += states if beside_model(model, thrift) else 0
    passing = max(_features(model, i) for i in range(model.num_blocks))
    logits = LOGITS * 4 * TAIL_TOKENS * parallel.threads() * head.out_features
    running = running_bytes(settings, passing, True) + attention_bytes(settings, model)
    return weights + max(*blocks, kept + max(running, logits))


def tuning_cost(settings: Settings, source: Source, plan: Plan) -> float:
    """Of the tuning, as `exl3.jobs.job` counts costs."""
    if not settings.tune:
        return 0.0
    tokens = TuningRows.of(source.rows, settings.seed).count * source.rows.shape[1]
    return settings.tune * (1 + BACK) * tokens * TOKEN * plan.weights


def _bytes(model: StreamedModel, keys: list[str]) -> int:
    """Of checkpoint tensors once they are loaded, or decoded."""
    return 4 * sum(prod(model.checkpoint.shape(key)) for key in keys)


def _features(model: StreamedModel, i: int) -> int:
    """Values of a token at the linears of block i; at experts, as many as are used on average."""
    experts = model.expert_linears(i)
    used = share_of_tokens(model.config.get_text_config(decoder=True))
    return sum(
        int((m.in_features + m.out_features) * (used if key in experts else 1)) + 1
        for key, m in model.block_linears(i).items()
    )
