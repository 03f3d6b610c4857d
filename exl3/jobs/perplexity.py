"""The perplexity of one model on a text."""

from pathlib import Path

from exl3.data.builtin import builtin_texts
from exl3.data.rows import evaluation_rows
from exl3.data.texts import read_texts
from exl3.data.tokenizer import load_tokenizer
from exl3.devices import pick_device
from exl3.evaluate.metrics import row_metrics, summarize
from exl3.evaluate.rows import check_tokens
from exl3.evaluate.stream import stream_logits, stream_work
from exl3.model.quantized import open_model
from exl3.progress import Progress


def print_perplexity(
    folder: Path,
    text: Path | None,
    rows: int,
    length: int,
    trust_remote_code: bool,
    device: str = "0",
) -> None:
    """Prints perplexity with its standard error. UserError for bad input."""
    chosen, note = pick_device(device, "-dev", kernels=False)
    if note:
        print(note)
    model = open_model(folder, trust_remote_code, device=chosen, packed=True)
    texts = read_texts(text) if text else held_out_texts()
    tokenizer = load_tokenizer(folder, trust_remote_code)
    ids = evaluation_rows(tokenizer, "\n\n".join(texts), length, rows)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    check_tokens(text or "the built-in text", ids, vocab, folder)
    with Progress(stream_work(model, ids), "Perplexity") as progress:
        found = [
            row_metrics(logits, ids[i : i + 1])
            for i, logits in stream_logits(model, ids, progress=progress)
        ]
    summary = summarize(found)
    print(
        f"{folder}: perplexity {summary.ppl:.4f} ± {summary.ppl_error:.4f} "
        f"on {len(ids)} rows of {length} tokens of {text or 'the built-in held-out text'}"
    )


def held_out_texts() -> list[str]:
    """Built-in text that is never part of calibration rows."""
    return [text for _, text in builtin_texts("prose", held_out=True)]
