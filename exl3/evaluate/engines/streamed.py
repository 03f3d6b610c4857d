"""Originals and EXL3 quants block by block: never the whole model in memory."""

from collections.abc import Iterator, Sequence

import torch

from exl3.evaluate.engines.base import Engine
from exl3.evaluate.engines.place import Place
from exl3.evaluate.stream import stream_logits
from exl3.model.quantized import QuantizedCheckpoint, runs_packed
from exl3.model.streamed import StreamedModel
from exl3.progress import Progress


class StreamedEngine(Engine):
    """Our own engine, in float32 everywhere."""

    arithmetic = "exl3, float32"

    def __init__(self, place: Place, device: torch.device, trust_remote_code: bool) -> None:
        super().__init__(place)
        quant = QuantizedCheckpoint(place.path) if place.is_exl3 else None
        self.model = StreamedModel(
            place.path,
            checkpoint=quant,
            device=device,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            packed=quant if runs_packed(device) else None,
        )
        self.vocab = self.model.head()[1].out_features
        text = self.model.config.get_text_config(decoder=True)
        self.context = getattr(text, "max_position_embeddings", None)

    def logits(
        self, rows: torch.Tensor, indices: Sequence[int], progress: Progress | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        chosen = rows[list(indices)]
        for number, logits in stream_logits(self.model, chosen, progress=progress):
            yield indices[number], logits

    def work(self, rows: int) -> int:
        return rows * (self.model.num_blocks + 1)
