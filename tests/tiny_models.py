"""Tiny random models, made on the spot in the layout of a Hugging Face download."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HIDDEN, BLOCKS, VOCAB = 64, 3, 128

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large, so that logits are not flat
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# model type → what it needs besides SIZES
EXTRA = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 5},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "gpt_neox": {},
    "bloom": {"n_head": 4, "n_layer": BLOCKS},
    "mixtral": {"num_local_experts": 2},
}


def save_tiny(
    kind: str,
    folder: Path,
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    seed: int = 0,
    **sizes: object,
) -> Path:
    """Writes a random model of a type of `EXTRA` (3 blocks, hidden 64, vocab 128) to the folder.

    Norm weights and biases are random as well, so that none goes missing unnoticed.
    """
    arguments = {**SIZES, **EXTRA[kind], "tie_word_embeddings": tied, **sizes}
    config = CONFIG_MAPPING[kind](**arguments)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def tiny_rows(rows: int, cols: int, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, cols)."""
    return torch.randint(VOCAB, (rows, cols), generator=torch.Generator().manual_seed(seed))


def save_tokenizer(folder: Path, size: int = 290) -> None:
    """A byte-level BPE tokenizer of `size` tokens beside a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator(["the quick brown fox and the lazy dog"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
