"""From a folder's config.json to a model without weights, and where its tensors belong.

Uses transformers' internals, as `streamed.py` does; no other module may.
"""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exl3.errors import UserError
from exl3.model.checkpoint import TensorSource, read_json
from exl3.model.experts import NAMES, STACKS


def read_config(
    path: Path, attn_implementation: str | None, trust_remote_code: bool, decoded: bool
) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """The folder's config, without network and without running code that is not trusted, and the
    quantization_config it had, which tells how the tensors are to be decoded.

    decoded: the checkpoint does that already, and the folder is that of an EXL3 model.
    """
    raw = read_json(path / "config.json")
    _check_code(path, raw, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # the values are a stranger's: anything may come
        raise UserError(f"{path}/config.json is not valid: {_first_line(error)}") from error
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        implementation = getattr(part, "_attn_implementation", None)
        if isinstance(implementation, str) and "/" in implementation:
            raise UserError(
                f"The attention implementation {implementation} would be downloaded; use eager "
                "or sdpa (in config.json: remove attn_implementation)."
            )
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return config, None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if decoded and quantization.get("quant_method") != "exl3":
        raise UserError(
            f"{path} is already quantized ({quantization.get('quant_method')}); give the folder of "
            "the original model."
        )
    del config.quantization_config  # transformers shall not decode anything
    return config, None if decoded else quantization


def _check_code(path: Path, raw: dict[str, Any], trust_remote_code: bool) -> None:
    """A type that transformers knows, or code of the model's own that may run."""
    kind = raw.get("model_type")
    auto_map = raw.get("auto_map")
    if trust_remote_code and isinstance(auto_map, dict):
        if "--" in str(auto_map):
            raise UserError(
                f"{path}/config.json takes its code from another repository; copy that code into "
                "the folder and name it there."
            )
        return
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if auto_map:
        raise UserError(
            f"{path} brings its own code, which would have to run; if you have read it and trust "
            "it, pass --trust_remote_code."
        )
    raise UserError(
        f"{path}/config.json has the model type {kind!r}, which transformers "
        f"{transformers.__version__} does not know; a newer transformers may."
    )


def stored_dtype(config: PreTrainedConfig, source: TensorSource) -> torch.dtype:
    """The dtype of config.json, else of the checkpoint's first floating-point tensor."""
    text = config.get_text_config(decoder=True)
    for dtype in (config.dtype, text.dtype, *(source.dtype(key) for key in source.keys())):  # noqa: SIM118
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    return torch.float32


def check_block_count(config: PreTrainedConfig, source: TensorSource) -> None:
    """Before a skeleton is built: config.json asks for no more blocks than there are tensors."""
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if type(count) is not int or not 1 <= count <= len(list(source.keys())):
        raise UserError(
            f"config.json asks for {count} blocks (num_hidden_layers), which the checkpoint does "
            "not have; check that the files belong together."
        )


def make_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The model without any memory for its weights."""
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.device("meta"))
            stack.enter_context(init.meta_device_safe_creation_ops())
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # the values are a stranger's: anything may come
        raise UserError(
            f"No causal language model of the type {config.model_type} can be made from "
            f"config.json: {_first_line(error)}"
        ) from error
    return model.eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Makes the buffers no checkpoint has (rotary frequencies, scales) as `from_pretrained` does:
    by `_init_weights` for their modules and the modules around them, from the inside out."""
    around = set()
    for name in [name for name, _ in model.named_non_persistent_buffers()]:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        empty = torch.empty_like(getattr(module, leaf), device=device)
        module.register_buffer(leaf, empty, persistent=False)
        steps = parent.split(".")
        around |= {"", *(".".join(steps[:n]) for n in range(1, len(steps) + 1))}
    for name in sorted(around, key=len, reverse=True):
        with torch.no_grad():  # weights are on meta still, where initialization does nothing
            _nearest_model(model, name)._init_weights(model.get_submodule(name))


def _nearest_model(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost PreTrainedModel at or above the module of that name."""
    nearest = module = model
    for step in name.split(".") if name else []:
        module = module.get_submodule(step)
        nearest = module if isinstance(module, PreTrainedModel) else nearest
    return nearest


# Types whose linear attention runs without a state when there is no cache, and whose readers want
# its linears as they are in the model.
RECURRENT = {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"}


def refuse_unsupported(model: PreTrainedModel, blocks: nn.ModuleList, path: Path) -> None:
    """UserError for models that would run here, but whose quants would be of no use.

    The experts that can be linears must be so already.
    """
    if model._is_stateful and model.config.model_type not in RECURRENT:
        raise UserError(
            f"{path} is a recurrent model ({model.config.model_type}: Mamba, RWKV, linear "
            "attention and the like), which is not supported yet; use a model with attention only."
        )
    if "shared" in (
        getattr(model.config.get_text_config(decoder=True), "indexer_types", None) or ()
    ):
        raise UserError(
            f"The blocks of {path} hand on which tokens to attend to (indexer_types) besides their "
            f"states; such models of the type {model.config.model_type} are not supported yet."
        )
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        most = 1 if "experts" in name.split(".") else 2  # dimensions; experts may be stacked in two
        for leaf, weight in module.named_parameters(recurse=False):
            if weight.dim() > most:
                raise UserError(
                    f"{path} keeps several matrices in one tensor ({name}.{leaf}) in a way that is "
                    f"not supported yet for models of the type {model.config.model_type}; use a "
                    "dense model, or one with experts as Mixtral, Qwen or DeepSeek have them."
                )
    if not any(isinstance(module, nn.Linear) for module in blocks.modules()):
        raise UserError(
            f"{path} has no linear layers in its blocks that could be quantized; models of the "
            f"type {model.config.model_type} are not supported."
        )


def find_blocks(model: PreTrainedModel, path: Path) -> tuple[str, nn.ModuleList]:
    """Module path and list of the decoder's blocks."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = set(model.get_decoder().modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module in decoder and len(module) == count:
            return name, module
    raise UserError(
        f"{path} has no list of {count} decoder blocks; models of the type "
        f"{model.config.model_type} are not supported."
    )


def find_head(model: PreTrainedModel, path: Path) -> tuple[str, nn.Linear]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and isinstance(head, nn.Linear):
            return name, head
    raise UserError(
        f"{path} has no linear head; models of the type {model.config.model_type} are not "
        "supported."
    )


def find_targets(
    model: PreTrainedModel, mapping: list[Any], source: TensorSource
) -> tuple[dict[str, tuple[str, bool]], list[str]]:
    """Where the checkpoint's keys go: key → (the model's name, converted on the way?), and the
    keys the model has no place for. A converted key has the first of its converter's names."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, base = model.state_dict(), model.base_model_prefix
    targets, dropped = {}, []
    for key in source.keys():  # noqa: SIM118
        name, pattern = rename_source_key(key, renamings, converters, base, state)
        if name not in state and key in state:  # as the loader does: perhaps not to be renamed
            name, pattern = rename_source_key(key, [], [], base, state)
        if name in state:
            targets[key] = (name, pattern is not None)
        else:
            dropped.append(key)
    return targets, dropped


def expert_names(mapping: list[Any]) -> tuple[dict[str, str], list[Any]]:
    """How checkpoints name the linears of an expert, role → name, and the mapping without the
    entries that would stack them."""
    names, others = dict(NAMES), []
    for entry in mapping:
        found = _names_of_stacked(entry)
        names |= found
        if not found:
            others.append(entry)
    return names, others


def _names_of_stacked(entry: Any) -> dict[str, str]:
    """Role → name of the linears that an entry of a mapping stacks; none if it does not."""
    if not isinstance(entry, WeightConverter):
        return {}
    if not any(isinstance(operation, MergeModulelist) for operation in entry.operations):
        return {}
    sources = [pattern.replace("\\", "") for pattern in entry._original_source_patterns]
    names = [re.search(r"experts\.\*\.([\w.]+)\.weight$", pattern) for pattern in sources]
    roles = STACKS.get(entry._original_target_patterns[0].rpartition(".")[2], ())
    if len(names) != len(roles) or not all(names):
        return {}
    return {role: name[1] for role, name in zip(roles, names, strict=True)}
