"""A small language model trained on the spot, to try everything without a download."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from exl3.data.builtin import builtin_texts
from exl3.data.rows import evaluation_rows, token_stream
from exl3.errors import UserError
from exl3.progress import Progress, no_transformers_bar

STEPS = 750  # about 75 seconds on two cores
BATCH, CONTEXT = 4, 256  # rows of a step, tokens of a row
WARMUP = 50  # steps
MUON_RATE, ADAM_RATE = 0.02, 4e-3
SPECIAL = ["<s>", "</s>", "<pad>"]  # BOS, EOS, padding: ids 0, 1, 2
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def make_demo_model(
    out_dir: str | Path, steps: int = STEPS, seed: int = 0, progress: bool = True
) -> Path:
    """Trains a Llama of 1.2 million weights on Python's documentation and saves it in `out_dir`.

    The part of the text that is held out is not trained on. The folder appears when everything is
    in it; a complete one is used again. Raises UserError if it holds other things.
    """
    out = Path(out_dir)
    if all((out / name).is_file() for name in FILES):
        print(f"{out}: a demo model is there already and is used again.")
        return out
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"{out}: something else is there; name a new or an empty folder.")
    training = [text for _, text in builtin_texts("prose")]
    heldout = "\n\n".join(text for _, text in builtin_texts("prose", held_out=True))
    tokenizer = train_tokenizer(training)
    model = train_model(tokenizer, training, steps, seed, progress)
    if progress:
        print(f"Perplexity on text it has not seen: {perplexity(model, tokenizer, heldout):.2f}")
    save(out, model, tokenizer)
    return out


def train_tokenizer(texts: list[str], size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `size` tokens, with BOS in front of every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=2048
    )


def new_model(vocab_size: int) -> LlamaForCausalLM:
    """Random weights; every matrix a multiple of 128 both ways, as quantized layers are tiled."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.04,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def train_model(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int, seed: int, progress: bool
) -> LlamaForCausalLM:
    """A model trained for `steps` steps; the caller's random state is left as it was."""
    tokens = torch.from_numpy(np.fromiter(token_stream(tokenizer, texts), dtype=np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(len(tokenizer)).train()
        optimizers = make_optimizers(model)
        schedules = [LambdaLR(each, lambda step: pace(step, steps)) for each in optimizers]
        bar = Progress(steps, "Training", quiet=not progress)
        for rows in batches(tokens, steps):
            loss = model(input_ids=rows, labels=rows).loss
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in (*optimizers, *schedules):
                part.step()
            bar.doing(f"loss {loss.item():.3f}")
            bar.advance(1)
        bar.close()
    return model.eval()


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, head and norms."""
    weights = list(model.model.layers.parameters())
    matrices = [weight for weight in weights if weight.ndim == 2]
    taken = set(matrices)
    others = [weight for weight in model.parameters() if weight not in taken]
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0, fused=True)
    return [Muon(matrices, {"lr": MUON_RATE}), adam]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (https://kellerjordan.github.io/posts/muon).

    From so little text it reaches about two thirds of AdamW's perplexity. Torch has it from 2.9.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                momentum = state.setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 0.05)
                update = orthogonal(weight.grad.lerp(momentum, 0.95))
                rows, cols = weight.shape
                weight.mul_(1 - 0.1 * group["lr"])  # weight decay
                weight.sub_(update, alpha=group["lr"] * max(1, rows / cols) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal matrix (m, n) next to it: singular values go to about one."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):  # Newton-Schulz
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * (gram @ gram) - 4.7750 * gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def batches(tokens: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Batches (BATCH, CONTEXT) of the tokens: all of them in random order, then all again."""
    starts = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(starts) < BATCH:
            offset = int(torch.randint(CONTEXT, ()))  # other rows each time round
            starts = torch.arange(offset, len(tokens) - CONTEXT, CONTEXT)
            starts = starts[torch.randperm(len(starts))]
        yield torch.stack([tokens[start : start + CONTEXT] for start in starts[:BATCH]])
        starts = starts[BATCH:]


def pace(step: int, steps: int) -> float:
    """Share of the learning rate: a short warm-up, then half a cosine down to nothing."""
    return min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Perplexity over the first 32 rows of 512 tokens."""
    rows = evaluation_rows(tokenizer, text, 512, 32)
    losses = [model(input_ids=row, labels=row).loss for row in rows.split(1)]
    return math.exp(torch.stack(losses).mean())


def save(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes next to `out` and renames at the end, so that there is never half a model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        part = Path(folder) / "model"
        with no_transformers_bar():
            model.half().save_pretrained(part)
        tokenizer.save_pretrained(part)
        if out.is_dir():
            out.rmdir()  # empty; Windows renames onto nothing
        os.replace(part, out)
