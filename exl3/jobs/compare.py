"""A comparison: every model of the specs against the reference, row by row, each row kept.

A run that is killed goes on where it was: what is known of a row is a file in the cache, under the
content of rows, reference and model. A changed model is measured again, an unchanged one is not.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from exl3.data.rows import rows_hash
from exl3.devices import pick_device
from exl3.errors import UserError
from exl3.evaluate.cache import cache_folder
from exl3.evaluate.dataspec import load_dataspec
from exl3.evaluate.engines import Engine, open_engine
from exl3.evaluate.logits_file import ReferenceLogits
from exl3.evaluate.logits_writer import Planned, logits_writer
from exl3.evaluate.metrics import Row, row_metrics, summarize
from exl3.evaluate.modelspec import ModelSpec, load_modelspecs
from exl3.evaluate.result import Result, Storage
from exl3.evaluate.rows import check_tokens
from exl3.files import PARTIAL
from exl3.memory import GIB
from exl3.progress import Progress
from exl3.tensor_files import LazyTensor, write_safetensors

METRICS = 1  # raised when what is kept of a row changes its meaning


@dataclass(frozen=True)
class Request:
    """What is compared. reference_rows: of the model with out_logits, 0: all."""

    dataspec: Path
    modelspecs: tuple[str, ...]
    logits_file: Path | None = None
    mask: str | None = None
    clear_cache: bool = False
    device: str = "0"
    reference_rows: int = 10
    need_reference: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Comparison:
    """Rows, and the reference to compare with."""

    request: Request
    rows: torch.Tensor  # ids (rows, length)
    reference: ReferenceLogits | None

    def known(self, engine: Engine) -> Path:
        """The cache folder of what is known of a model's rows."""
        reference = self.reference.fingerprint() if self.reference else ""
        model = (engine.arithmetic, engine.fingerprint())
        parts = (METRICS, rows_hash(self.rows), reference, *model)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        return cache_folder() / "rows" / key


def compare_models(request: Request) -> list[Result]:
    """Measures every model of the specs, the reference first. UserError for bad input."""
    dataspec = load_dataspec(request.dataspec)
    specs = load_modelspecs(request.modelspecs, request.mask)
    device, note = pick_device(request.device, "-dev", kernels=False)
    request = replace(request, device=str(device))
    for line in (*dataspec.notes, *filter(None, [note])):
        print(line)
    if request.need_reference and not (request.logits_file or specs[0].out_logits):
        raise UserError(
            "-kld needs a reference: give -lf LOGITS, or out_logits to a model of the specs"
        )
    rows = dataspec.rows(request.trust_remote_code)
    for spec in specs:  # what is wrong with the last is said before hours of the first
        _open(request, spec, rows.shape[1]).close()
    reference = _reference(request, specs, rows)
    for line in reference.check(rows, reference.vocab) if reference else ():
        print(line)
    comparison = Comparison(request, rows, reference)
    results = []
    for spec in specs:
        results.append(_measure(comparison, spec))
        print(_line(results[-1]), flush=True)
    return results


def _open(request: Request, spec: ModelSpec, length: int) -> Engine:
    """A model that can run rows of so many tokens."""
    engine = open_engine(
        spec.load_fn, spec.model_dir, spec.label, request.device, request.trust_remote_code
    )
    if engine.context and length > engine.context:
        engine.close()
        raise UserError(
            f"{request.dataspec}: eval_len: rows of {length} tokens are longer than the context of "
            f"{spec.label}, {engine.context} tokens; make them shorter"
        )
    return engine


def _reference(
    request: Request, specs: Sequence[ModelSpec], rows: torch.Tensor
) -> ReferenceLogits | None:
    """The file that is given, or that of the model with out_logits, which is made if need be."""
    if request.logits_file is not None:
        return ReferenceLogits(request.logits_file)
    if not specs[0].out_logits:
        return None
    kept = rows[: request.reference_rows or None]
    with _open(request, specs[0], rows.shape[1]) as engine:
        planned = Planned.of(engine.fingerprint(), kept, engine.vocab)
        name = hashlib.sha256(f"{engine.arithmetic} {planned}".encode()).hexdigest()[:32]
        path = Path(specs[0].out_logits) / f"{name}.safetensors"
        if not planned.is_complete(path):
            _write_reference(engine, planned, kept, path, specs[0].label)
    return ReferenceLogits(path)


def _write_reference(
    engine: Engine, planned: Planned, rows: torch.Tensor, path: Path, label: str
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    need = planned.rows * planned.row_bytes - (partial.stat().st_size if partial.exists() else 0)
    if need > (free := shutil.disk_usage(path.parent).free):
        raise UserError(
            f"out_logits {path.parent}: the reference logits need {need / GIB:,.1f} GiB, the disk "
            f"has {free / GIB:,.1f} GiB free; give fewer with --reference_rows"
        )
    with logits_writer(path, planned) as writer:
        missing = range(writer.done, len(rows))
        with Progress(engine.work(len(missing)), f"{label}, reference logits") as progress:
            for _, logits in engine.logits(rows, missing, progress):
                writer.add(logits)


def _measure(comparison: Comparison, spec: ModelSpec) -> Result:
    """Runs what is not known yet of one model, and sums up."""
    numbers = range(len(comparison.rows))
    with _open(comparison.request, spec, comparison.rows.shape[1]) as engine:
        folder = comparison.known(engine)
        if comparison.request.clear_cache:
            shutil.rmtree(folder, ignore_errors=True)
        tokens_of = f"{comparison.request.dataspec}: tokenizer_dir"
        check_tokens(tokens_of, comparison.rows, engine.vocab, spec.label)
        known = {i: row for i in numbers if (row := _load(folder, i)) is not None}
        if missing := [i for i in numbers if i not in known]:
            known |= _run(comparison, spec, engine, folder, missing)
        storage = _overridden(spec, engine.storage())
        details = {
            "engine": spec.load_fn,
            "arithmetic": engine.arithmetic,
            "model_dir": spec.model_dir,
            "fingerprint": engine.fingerprint(),
        }
    summary = summarize([known[i] for i in numbers])
    return Result(
        label=spec.label,
        group=spec.group,
        storage=storage,
        ppl=summary.ppl,
        ppl_error=summary.ppl_error,
        rows=len(comparison.rows),
        divergence=summary.divergence,
        color=spec.color,
        details=details,
    )


def _run(
    comparison: Comparison, spec: ModelSpec, engine: Engine, folder: Path, missing: list[int]
) -> dict[int, Row]:
    """Measures the missing rows, keeping each as it comes."""
    reference, rows = comparison.reference, comparison.rows
    if reference is not None:
        reference.check(rows, engine.vocab)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    with Progress(engine.work(len(missing)), spec.label) as progress:
        for i, logits in engine.logits(rows, missing, progress):
            has_reference = reference is not None and i < len(reference)
            expected = reference.row(i) if has_reference else None
            found[i] = row_metrics(logits, rows[i : i + 1], expected)
            _save(folder, i, found[i])
    return found


def _save(folder: Path, i: int, row: Row) -> None:
    write_safetensors(
        folder / f"{i:06}.safetensors", [LazyTensor.of(k, v) for k, v in sorted(row.items())]
    )


def _load(folder: Path, i: int) -> Row | None:
    path = folder / f"{i:06}.safetensors"
    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError:
        return None  # measured again


def _overridden(spec: ModelSpec, storage: Storage) -> Storage:
    """What the spec says it knows better than the files do."""
    given = dict(spec.overrides)
    if "override_vram_bits" in given:
        whole = given["override_vram_bits"] / 8 / GIB
        storage = replace(storage, layer_gib=whole - storage.head_gib)
    return replace(
        storage,
        layer_bpw=given.get("override_bpw_layer", storage.layer_bpw),
        head_bpw=given.get("override_bpw_head", storage.head_bpw),
    )


def _line(result: Result) -> str:
    """One model in a line, as soon as it is known."""
    text = f"{result.label}: perplexity {result.ppl:.4f} ± {result.ppl_error:.4f}"
    if result.divergence is not None:
        text += f", KL divergence {result.divergence.mean:.5f} ± {result.divergence.ci95:.5f}"
    return text
