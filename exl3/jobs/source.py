"""The model to convert, and the rows to calibrate it with, checked before any work is done."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from exl3.allocate import Module
from exl3.data.rows import calibration_rows, rows_hash
from exl3.errors import UserError
from exl3.format.layer import padded
from exl3.jobs.settings import DEFINING, Settings
from exl3.jobs.workdir import WorkDir
from exl3.model.streamed import StreamedModel


@dataclass
class Source:
    """What a conversion works on."""

    model: StreamedModel
    rows: torch.Tensor  # int64 (rows, cols)
    identity: dict[str, str]  # hashes of the source and of the rows
    job_id: str  # the same for every run that must end in the same bytes

    def modules(self) -> list[Module]:
        """The decoder's linears, which share the bits."""
        return [
            Module(key, i, padded(linear.in_features) * padded(linear.out_features))
            for i in range(self.model.num_blocks)
            for key, linear in self.model.block_linears(i).items()
        ]


def open_source(settings: Settings, work: WorkDir, device: torch.device) -> Source:
    """Opens the model and makes (or finds again) the rows. UserError for what is wrong."""
    folder = Path(settings.in_dir)
    # On a CPU half precision is slower than float32, and float32 loses nothing.
    dtype = torch.float32 if device.type == "cpu" else None
    trust = settings.trust_remote_code
    model = StreamedModel(folder, device=device, dtype=dtype, trust_remote_code=trust)
    rows = work.load_rows()
    if rows is None:
        rows = calibration_rows(
            load_tokenizer(folder, trust),
            settings.cal_rows,
            settings.cal_cols,
            settings.cal_file,
            settings.seed,
            model.config.get_text_config(decoder=True).vocab_size,
        )
        work.save_rows(rows)
    identity = {
        "source model": model.checkpoint.fingerprint(),
        "calibration rows": rows_hash(rows),
    }
    work.check_identity(identity)
    asked = {name: getattr(settings, name) for name in DEFINING if name != "cal_file"}
    text = json.dumps([identity, asked], sort_keys=True)
    return Source(model, rows, identity, hashlib.sha256(text.encode()).hexdigest()[:16])


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; no network, and its own code only where it is trusted."""
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the files are a stranger's: anything may come
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the tokenizer of {folder} cannot be loaded: {reason}") from error
