"""What can run a model for a comparison, by the names that users' spec files have."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from exl3.errors import UserError
from exl3.evaluate.engines.base import Engine
from exl3.evaluate.engines.llamacpp import LlamaCppEngine
from exl3.evaluate.engines.place import Place
from exl3.evaluate.engines.stock import TransformersEngine
from exl3.evaluate.engines.streamed import StreamedEngine

__all__ = ["ENGINES", "Engine", "open_engine"]

ENGINES: dict[str, Callable[[Place, torch.device, bool], Engine]] = {
    "exl3": StreamedEngine,
    "exllamav3": StreamedEngine,  # so that users' files work
    "transformers": TransformersEngine,
    "transformers_auto": partial(TransformersEngine, spread=True),
    "transformers_auto_bf16": partial(TransformersEngine, spread=True, bfloat16=True),
    "llamacpp": LlamaCppEngine,
}

# Names in users' files that nothing here runs → what to do instead.
OTHERS = {
    "exllamav2": "convert the original to EXL3 and compare that",
    "anyprecision": 'use "transformers" if transformers can load it',
    "qtip": 'use "transformers" if transformers can load it',
    "transformers_mm": 'use "transformers", which takes the text part of such models',
}


def open_engine(
    load_fn: str,
    model_dir: str | Path | Sequence[str | Path],
    label: str,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Engine:
    """The model of a spec's entry, ready to run.

    model_dir: a folder, a GGUF file, or several folders with shards; device: of torch, or GPU
    numbers. UserError, beginning with the label, for a name without an engine and for a model that
    cannot be run.
    """
    if load_fn in OTHERS:
        raise UserError(
            f'{label}: load_fn "{load_fn}" is an engine that is not there; remove the entry, or '
            f"{OTHERS[load_fn]}"
        )
    if load_fn not in ENGINES:
        raise UserError(f'{label}: load_fn "{load_fn}" is unknown; there are {", ".join(ENGINES)}')
    try:
        return ENGINES[load_fn](Place(model_dir), _device(device), trust_remote_code)
    except UserError as error:
        raise UserError(f"{label}: {error}") from error


def _device(device: str | torch.device) -> torch.device:
    """A torch device; of GPU numbers, as flags have them, the first, or the CPU without GPUs."""
    first = str(device).partition(",")[0]
    if not first.isdecimal():
        return torch.device(device)
    return torch.device(f"cuda:{first}" if torch.cuda.is_available() else "cpu")
