"""Tiny random models, made on the spot in the layout of a Hugging Face download."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
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

LOCAL = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROTARY = {"rotary_dim": 8}
LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

# model type → what it needs besides SIZES; numbers that are not neutral, so that none goes missing
EXTRA = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 5},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **LOCAL},
    "phi3": {"sliding_window": 5},
    "glm": {"head_dim": 32, "attention_bias": True},
    "glm4": {"head_dim": 32, "attention_bias": True},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.5, **LOCAL},
    "olmo": {"clip_qkv": 1.5},
    "olmo2": {},
    "olmo3": LOCAL,
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.7,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], **LOCAL, "use_sliding_window": True},
    "gpt_neox": {},
    "bloom": {"n_head": 4, "n_layer": BLOCKS},
    "codegen": {"n_head": 4, "n_embd": HIDDEN, "n_layer": BLOCKS, "rotary_dim": 8},
    "gpt2": {"n_head": 4, "n_embd": HIDDEN, "n_layer": BLOCKS},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 5, "shared_expert_intermediate_size": 48, **MOE},
    "qwen3_moe": {"num_experts": 5, "head_dim": 16, "mlp_only_layers": [1], **MOE},
    "qwen3_next": {"num_experts": 5, "shared_expert_intermediate_size": 48, **MOE, **LINEAR},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {
        "num_experts": 5,
        "shared_expert_intermediate_size": 48,
        **MOE,
        **LINEAR,
    },
    "minimax_m2": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, **ROTARY},
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, **MOE},
        **{"first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
        **{"num_key_value_heads": 4, "routed_scaling_factor": 1.7},
    },
    "glm_moe_dsa": {
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, **MOE},
        **{"q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": 16, "num_key_value_heads": 4},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "head_dim": 16},
        "indexer_types": ["full", "shared", "full"],
    },
    "glm4_moe": {
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, **MOE},
        **{"first_k_dense_replace": 1, "head_dim": 16, "use_qk_norm": True},
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, **LOCAL},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 2, "kv_channels": 16},
    "llama4_text": {"num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 96},
    "mamba": {},
    "rwkv": {},
    "bamba": {"attn_layer_indices": [1], "mamba_expand": 2, **MAMBA},
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
    for name in {"layer_types", "no_rope_layers"} & arguments.keys():
        arguments[name] = arguments[name][: arguments["num_hidden_layers"]]
    return save_config(CONFIG_MAPPING[kind](**arguments), folder, dtype, shard_size, seed)


def save_tiny_gemma3_with_vision(folder: Path, **sizes: object) -> Path:
    """Writes a random Gemma 3 of the multimodal kind to the folder."""
    text = {**SIZES, **EXTRA["gemma3_text"], **sizes}
    text["layer_types"] = text["layer_types"][: text["num_hidden_layers"]]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = CONFIG_MAPPING["gemma3"](
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
    )
    return save_config(config, folder)


def save_config(
    config: PreTrainedConfig,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    seed: int = 0,
) -> Path:
    """Writes a random model of a config to the folder."""
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
