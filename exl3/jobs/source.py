"""The model to convert, and the rows to calibrate it with, checked before any work is done."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from exl3.data.rows import TextSource, calibration_rows, rows_hash
from exl3.data.tokenizer import load_tokenizer
from exl3.devices import backend
from exl3.errors import UserError
from exl3.jobs.settings import DEFINING, Settings, has_progress
from exl3.jobs.workdir import BACKEND, METHOD, WorkDir
from exl3.model.rope import Rope
from exl3.model.streamed import StreamedModel

VERSION = "3"  # of the method; without one: 1


@dataclass
class Source:
    """What a conversion works on."""

    model: StreamedModel
    rows: torch.Tensor  # int64 (rows, cols)
    identity: dict[str, str]  # hashes of the source and of the rows
    job_id: str  # the same for every run that must end in the same bytes


def open_model(settings: Settings, device: torch.device) -> StreamedModel:
    """The original model. UserError for what is wrong with it."""
    model = StreamedModel(
        settings.in_dir,
        device=device,
        dtype=torch.float32,
        trust_remote_code=settings.trust_remote_code,
        rope=Rope(settings.rope_alpha, settings.rope_scale),
    )
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context and settings.cal_cols > context * (settings.rope_scale or 1):
        raise UserError(
            f"-cc {settings.cal_cols}: the model's context is {context} tokens "
            f"(max_position_embeddings); give shorter rows"
        )
    return model


def open_source(settings: Settings, work: WorkDir, device: torch.device) -> Source:
    """Opens the model and makes (or finds again) the rows. UserError for what is wrong."""
    model = open_model(settings, device)
    # Rows without an identity may be those of a job that was replaced at its very beginning.
    rows = work.load_rows() if has_progress(work.path) else None
    if rows is None:
        rows = _make_rows(settings, model)
        work.save_rows(rows)
    identity = {
        "source model": model.checkpoint.fingerprint(),
        "calibration rows": rows_hash(rows),
        BACKEND: backend(device),
        METHOD: VERSION,
    }
    work.check_identity(identity)
    # The rows stand for themselves, wherever they came from.
    asked = {name: getattr(settings, name) for name in DEFINING if not name.startswith("cal_")}
    text = json.dumps([identity, asked], sort_keys=True)
    return Source(model, rows, identity, hashlib.sha256(text.encode()).hexdigest()[:16])


def _make_rows(settings: Settings, model: StreamedModel) -> torch.Tensor:
    text = None
    if settings.cal_file is not None:
        text = TextSource(
            settings.cal_file, settings.cal_split, settings.cal_column, settings.cal_stride
        )
    return calibration_rows(
        load_tokenizer(Path(settings.in_dir), settings.trust_remote_code),
        settings.cal_rows,
        settings.cal_cols,
        text,
        settings.seed,
        model.config.get_text_config(decoder=True).vocab_size,
    )
