"""Text that a model writes itself, drawn from its own predictions, to calibrate on.

Such text is of the kind that the model knows, where no better is at hand (Liu et al., LLM-QAT,
arXiv 2305.17888, begin with a random token as well).

The file is JSON lines, `{"text": ..., "of": ...}`, a row each. While it grows it is OUT.partial, a
beginning of the finished one: a killed job goes on with the row that is missing.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from exl3 import parallel
from exl3.data.tokenizer import load_tokenizer
from exl3.devices import pick_device
from exl3.errors import UserError
from exl3.evaluate.engines.place import Place
from exl3.evaluate.engines.stock import TransformersEngine
from exl3.files import PARTIAL, sync_folder, take_lock
from exl3.memory import GIB, available_bytes
from exl3.model.quantized import open_model
from exl3.progress import Progress
from exl3.splice import job_id

ROW = b'{"text": "'  # how each begins
SHORTEST = 8  # tokens of a row: a few begin it
BATCH = 16  # rows that are drawn side by side: other numbers would round otherwise


@dataclass(frozen=True)
class Request:
    """What to write. length: tokens of a row."""

    model: Path
    out: Path
    rows: int = 256
    length: int = 2048
    seed: int = 0
    device: str = "0"
    trust_remote_code: bool = False


def write_self_text(request: Request) -> None:
    """Writes the file, or what is missing of it. UserError for bad input."""
    _check(request)
    device, note = pick_device(request.device, kernels=False)
    if note:
        print(note)
    with parallel.one_thread_per_op(), _engine(request, device) as engine:
        tokenizer = load_tokenizer(request.model, request.trust_remote_code)
        length = min(request.length, engine.context or request.length)
        if length < request.length:
            print(f"Rows of {length} tokens, the longest that the model takes")
        job = job_id("self-text", engine.fingerprint(), engine.arithmetic, length, request.seed)
        if _is_complete(request, job):
            print(f"{request.out} is complete already")
            return
        with _growing(request.out, job, request.rows) as (file, done):
            _write(request, engine, tokenizer, job, length, file, done)
    print(f"Wrote {request.out}: {request.rows} rows of {length} tokens; give it to convert.py -c")


def _check(request: Request) -> None:
    if request.rows < 1 or request.length < SHORTEST:
        raise UserError(f"give at least one row (-r) of at least {SHORTEST} tokens (-l)")
    if request.seed < 0:
        raise UserError(f"--seed {request.seed}: give 0 or more")
    if request.out.suffix != ".jsonl":
        raise UserError(
            f"-o {request.out}: give a name that ends in .jsonl, so that it can be read"
        )
    if not request.out.absolute().parent.is_dir():
        raise UserError(f"-o {request.out}: the folder {request.out.absolute().parent} is missing")


def _engine(request: Request, device: torch.device) -> TransformersEngine:
    """The stock model, whole. UserError where it has no room."""
    on_cpu = device.type == "cpu"
    engine = TransformersEngine(
        Place(request.model), device, request.trust_remote_code, bfloat16=not on_cpu
    )
    if on_cpu:
        weights = open_model(request.model, request.trust_remote_code).checkpoint
        needed = 4 * sum(prod(weights.shape(key)) for key in weights.keys())  # noqa: SIM118
        if needed > (free := available_bytes()):
            raise UserError(
                f"{request.model} takes {needed / GIB:.1f} GiB as a whole, and {free / GIB:.1f} "
                "are free; text has to come from elsewhere, such as a model of the same family"
            )
    return engine


def _write(
    request: Request,
    engine: TransformersEngine,
    tokenizer: PreTrainedTokenizerBase,
    job: str,
    length: int,
    file: IO[bytes],
    done: int,
) -> None:
    """Batch after batch; one that was cut short is drawn again, and what is missing is kept."""
    with Progress(request.rows * length, "Self-written text") as progress:
        progress.skip(done * length)
        model = engine.model(progress)
        for batch in range(done // BATCH, -(-request.rows // BATCH)):
            first = batch * BATCH
            progress.doing(f"rows {first} to {min(request.rows, first + BATCH) - 1}")
            missing = range(max(done, first), min(request.rows, first + BATCH))
            seed = _mixed(request.seed, batch)
            ids = draw(model, tokenizer, length, seed, partial(progress.advance, len(missing)))
            for row in missing:
                text = tokenizer.decode(ids[row - first], skip_special_tokens=True)
                file.write(json.dumps({"text": text, "of": job}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _mixed(seed: int, batch: int) -> int:
    """A seed of 32 bits, of which torch's generator takes no more."""
    return int(np.random.SeedSequence((seed, batch)).generate_state(1)[0])


def draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """BATCH rows (BATCH, length) of ids drawn from the model's predictions, as they are, behind
    what the tokenizer begins a text with and a random token. tick: called for every token of a
    row."""
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    known = range(min(len(tokenizer), len(embedding)))
    words = torch.tensor([i for i in known if i not in special])
    picked = words[torch.randint(len(words), (BATCH, 1), generator=generator)]
    begin = torch.tensor(tokenizer("")["input_ids"], dtype=torch.int64).expand(BATCH, -1)
    start = torch.cat([begin, picked], 1).to(embedding.device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=length - start.shape[1], pad_token_id=0, eos_token_id=None
    )
    model.generation_config = config  # the model's own would add what is not said here
    with torch.no_grad():
        return model.generate(
            start,
            attention_mask=torch.ones_like(start),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Drawn(generator, tick)]),
        ).cpu()


class _Drawn(LogitsProcessor):
    """Leaves a token of every row: a draw from what the model predicts, by a generator of our own
    and on the CPU, where sums are added in the same order every time."""

    def __init__(self, generator: torch.Generator, tick: Callable[[], None]) -> None:
        self.generator, self.tick = generator, tick

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tick()
        up_to = scores.float().cpu().softmax(1).double().cumsum(1)
        at = torch.rand(len(scores), 1, generator=self.generator, dtype=torch.float64)
        picked = torch.searchsorted(up_to, at * up_to[:, -1:], right=True)
        picked = picked.clamp(max=scores.shape[1] - 1).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, picked, 0.0)


# -- The file --------------------------------------------------------------------------------------


def _is_complete(request: Request, job: str) -> bool:
    """Whether the file is there and this one; UserError if another one is."""
    if not request.out.exists():
        return False
    if request.out.is_file() and len(_rows_of(request.out.read_bytes(), job)) == request.rows:
        return True
    raise UserError(f"-o {request.out} is there already and something else; give another name")


@contextmanager
def _growing(out: Path, job: str, rows: int) -> Iterator[tuple[IO[bytes], int]]:
    """OUT.partial, open at its end, and how many rows are in it; takes the name OUT at the end."""
    path = out.with_name(out.name + PARTIAL)
    with open(path, "a+b") as file:
        if not take_lock(file):
            raise UserError(f"another process is writing {out}; wait for it to end")
        file.seek(0)
        content = file.read()
        found = _rows_of(content, job)[:rows]
        whole = sum(map(len, found))
        if content and not found and not _is_cut_short(content):
            raise UserError(
                f"{path} is of another model, seed or length, or something else; delete it to "
                "start afresh, or give another -o"
            )
        file.truncate(whole)
        yield file, len(found)
    os.replace(path, out)
    sync_folder(out.absolute().parent)


def _is_cut_short(content: bytes) -> bool:
    """Whether it is no more than a part of a first row."""
    return b"\n" not in content and content.startswith(ROW[: len(content)])


def _rows_of(content: bytes, job: str) -> list[bytes]:
    """The lines that are whole and this job's, up to the first that is not."""
    found = []
    for line in content.splitlines(keepends=True):
        try:
            ours = line.endswith(b"\n") and json.loads(line)["of"] == job
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            break
        found.append(line)
    return found
