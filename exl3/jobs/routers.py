"""Routers, which stay unquantized: corrected for what is lost before them, as linears are."""

import torch

from exl3.format.directory import stored_dtype
from exl3.jobs.block import Block
from exl3.jobs.inputs import Calibration, tokens
from exl3.jobs.streams import Streams
from exl3.jobs.workdir import WorkDir
from exl3.model.capture import Taps
from exl3.model.flow import Stage
from exl3.model.streamed import StreamedModel
from exl3.quant.correction import Moments


def correct_router(block: Block, stage: Stage, streams: Streams, work: WorkDir) -> None:
    """Gives the router of a stage's experts the weights that best make the original's logits from
    what the quantized model gives it, and keeps them in the work folder."""
    if stage.keys[0] not in block.routers:
        return
    key, router = block.routers[stage.keys[0]]
    if not work.has_router(key):
        was = block.loaded[key]
        dtype = stored_dtype(key, block.model.checkpoint.dtype(key), embedding=False)
        moments = _router_moments(block, router, streams)
        weight = Calibration.of(moments).target(was.T).T.to(dtype).contiguous()
        if not torch.isfinite(weight).all():
            weight = was.to(dtype)
        work.save_router(key, weight)
    block.settle_router(key, work.load_router(key))


def _router_moments(block: Block, router: torch.nn.Module, streams: Streams) -> Moments:
    """Of what enters a router in the quantized model and in the original; of nothing, where it is
    never asked."""
    moments = Moments(router.weight.shape[1], device=block.model.device)
    with Taps(block.model, block.i, [router]) as taps:
        for wave in streams.waves():
            originals = block.run_original(streams, wave, taps.run)
            quantized = block.run_quantized(streams, wave, taps.run)
            for of, q in zip(originals, quantized, strict=True):
                if of is not None and q is not None:
                    moments.add(tokens(q[0][0]), tokens(of[0][0]))
    return moments


def router_keys(model: StreamedModel, blocks: int) -> list[str]:
    """The keys of the weights of all routers in the first blocks."""
    return [key for i in range(blocks) for key, _ in model.block_routers(i).values()]


def corrected_routers(model: StreamedModel, work: WorkDir) -> dict[str, torch.Tensor]:
    """The weights of all routers that were corrected, by their keys."""
    keys = router_keys(model, model.num_blocks)
    return {key: work.load_router(key) for key in keys if work.has_router(key)}
