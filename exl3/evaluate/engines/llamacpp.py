"""GGUF models through llama-cpp-python, where that is installed."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from exl3.errors import UserError
from exl3.evaluate.engines.base import Engine
from exl3.evaluate.engines.place import Place
from exl3.evaluate.gguf_header import gguf_parts, gguf_tensors
from exl3.progress import Progress

BATCH = 512  # tokens evaluated at a time


class LlamaCppEngine(Engine):
    """A GGUF file, or a folder with one; on a GPU if llama-cpp-python was built for it."""

    arithmetic = "llama.cpp"
    context = None

    def __init__(self, place: Place, device: torch.device, trust_remote_code: bool) -> None:
        super().__init__(place)
        if find_spec("llama_cpp") is None:
            raise UserError(
                f"{place.name}: GGUF models run through llama-cpp-python, which is not installed; "
                "`pip install llama-cpp-python` installs it"
            )
        place.path = _the_file(place.path)
        embedding = [t for t in gguf_tensors(place.path) if t.name == "token_embd.weight"]
        if not embedding:
            raise UserError(f"{place.path} has no token_embd.weight; it is not a language model")
        self.vocab = embedding[0].shape[-1]
        self.gpu_layers = 0 if device.type == "cpu" else -1  # -1: all of them

    def logits(
        self, rows: torch.Tensor, indices: Sequence[int], progress: Progress | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        from llama_cpp import Llama

        length = rows.shape[1]
        model = Llama(
            model_path=str(self.place.path),
            n_ctx=length,
            n_batch=min(BATCH, length),
            n_gpu_layers=self.gpu_layers,
            logits_all=True,
            verbose=False,
        )
        for index in indices:
            model.reset()
            model.eval(rows[index].tolist())
            if progress is not None:
                progress.advance(1)
            # A copy: the next row is written into the same memory.
            yield index, torch.tensor(model.scores[:length]).float()[None]
        model.close()


def _the_file(path: Path) -> Path:
    """The (first) GGUF file of a folder; UserError if it is not one model."""
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if not files or set(files) != set(gguf_parts(files[0])):
        raise UserError(f"{path} holds {len(files)} GGUF files; name the one to run in model_dir")
    return files[0]
