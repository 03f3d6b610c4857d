"""The last look at a quant: is it near its original, on rows that took no part in its making?"""

import math
from pathlib import Path

import torch

from exl3.data.rows import evaluation_rows
from exl3.data.tokenizer import load_tokenizer
from exl3.errors import UserError
from exl3.evaluate.compare import compare
from exl3.evaluate.metrics import Scores
from exl3.evaluate.rows import check_tokens
from exl3.files import write_json
from exl3.jobs.perplexity import held_out_texts
from exl3.jobs.settings import Settings
from exl3.jobs.source import Source
from exl3.model.rope import Rope

LENGTH = 512  # tokens of a row
WORSE = 2.0  # times the original's perplexity: something went wrong


def check_quant(settings: Settings, source: Source) -> None:
    """Compares the finished quant with the original, prints the numbers and what they mean.

    The result is kept in the work folder, so that a killed job does it once.
    """
    done = Path(settings.work_dir) / "check.json"
    if not settings.check_rows or done.exists():
        return
    try:
        rows = held_out_rows(settings, source)
    except UserError as error:  # the quant is there all the same
        print(f"The quant is not compared with the original: {error}")
        return
    original, quant = compare(
        settings.in_dir,
        [settings.out_dir],
        rows,
        quiet=False,
        title="Checking",
        trust_remote_code=settings.trust_remote_code,
        rope=Rope(settings.rope_alpha, settings.rope_scale),
        device=source.model.device,
    )
    print(f"On {len(rows)} held-out rows of {rows.shape[1]} tokens:")
    print(f"  perplexity {original.perplexity:.4f} original, {quant.perplexity:.4f} quant")
    print(f"  KL divergence {quant.kld:.5f}, same most likely token {quant.top1:.1%}")
    if warning := complaint(original, quant):
        print(f"WARNING: {warning}")
    write_json(
        done,
        {
            "rows": list(rows.shape),
            "perplexity": {"original": original.perplexity, "quant": quant.perplexity},
            "kld": quant.kld,
            "top1": quant.top1,
        },
    )


def held_out_rows(settings: Settings, source: Source) -> torch.Tensor:
    """Rows of built-in text that is never part of calibration rows."""
    tokenizer = load_tokenizer(Path(settings.in_dir), settings.trust_remote_code)
    text = "\n\n".join(held_out_texts())
    length = min(LENGTH, source.rows.shape[1])
    rows = evaluation_rows(tokenizer, text, length, settings.check_rows)
    vocab = source.model.config.get_text_config(decoder=True).vocab_size
    check_tokens("the built-in text", rows, vocab, settings.in_dir)
    return rows


def complaint(original: Scores, quant: Scores) -> str | None:
    """What is plainly wrong with a quant, if anything."""
    if not math.isfinite(original.perplexity):
        return "the original model's predictions are not finite; the source may be damaged"
    if not (math.isfinite(quant.perplexity) and math.isfinite(quant.kld)):
        return "the quant's predictions are not finite; do not use it, and report this"
    if quant.perplexity > WORSE * original.perplexity:
        return (
            f"the quant's perplexity is {quant.perplexity / original.perplexity:.1f} times the "
            "original's; try more bits, or other calibration text"
        )
    return None
