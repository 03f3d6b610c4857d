"""A transformers causal language model of which one decoder block at a time is in memory.

The stock `forward` drives every run, so masks, rotary embeddings and layer kinds are the model's
own: blocks before the wanted one give back the saved state, the wanted one runs and stops the
model there. This module and `skeleton.py` alone use transformers' internals.
"""

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from exl3.devices import attention_for_gradients
from exl3.errors import UserError
from exl3.memory import return_large
from exl3.model.checkpoint import Checkpoint, TensorSource
from exl3.model.dequantized import dequantized
from exl3.model.exl3_linear import LayerSource, pack_linear, unpack_linear
from exl3.model.experts import (
    ExpertCheckpoint,
    LinearExperts,
    Stack,
    check_expert_count,
    find_experts,
    find_stack,
    is_router,
)
from exl3.model.fused import SplitCheckpoint, split_linears
from exl3.model.rope import Rope
from exl3.model.run import LocalRun, Run, Stop, WrongForm
from exl3.model.skeleton import (
    check_block_count,
    expert_names,
    find_blocks,
    find_head,
    find_targets,
    make_buffers,
    make_skeleton,
    read_config,
    refuse_unsupported,
    stored_dtype,
)
from exl3.model.unquantized import is_left_alone
from exl3.progress import no_transformers_bar

EMBEDDING = "the embedding"
TAIL = "the norm and head"
Part = int | str  # a block's number, EMBEDDING or TAIL


class StreamedModel:
    """A causal language model whose parts are loaded, run and freed one by one.

    path: the model's folder; checkpoint: where its tensors come from (default: that folder);
    dtype: what the weights become (default: what config.json says); rope: changes to the rotary
    embeddings; packed: a quant, whose linears run packed and have no weights. Runs may
    be called from several threads at once; loading and freeing are for one thread. Weights of a
    loaded part may be replaced (`linear.weight.data = ...`), modules may not.

    Raises UserError for a folder that is damaged, incomplete or of a kind not supported.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        checkpoint: TensorSource | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        rope: Rope | None = None,
        packed: LayerSource | None = None,
    ):
        return_large()
        self.path = Path(path)
        self.device = torch.device(device)
        decoded = checkpoint is not None
        self.config, quantization = read_config(
            self.path, attn_implementation, trust_remote_code, decoded
        )
        text = self.config.get_text_config(decoder=True)
        self.rope_parameters = (rope or Rope()).parameters(text)  # None: the config's own
        if self.rope_parameters:
            text.rope_parameters = self.rope_parameters
        self.checkpoint: TensorSource = checkpoint if decoded else Checkpoint(self.path)
        if quantization is not None:
            self.checkpoint = dequantized(self.checkpoint, quantization, self.path)
        self.dtype = dtype or stored_dtype(self.config, self.checkpoint)
        check_block_count(self.config, self.checkpoint)
        self._model = make_skeleton(self.config, self.dtype, trust_remote_code)
        make_buffers(self._model, self.device)
        self._prefix, self._blocks = find_blocks(self._model, self.path)
        self._mapping = get_model_conversion_mapping(self._model)
        self._split_experts()
        refuse_unsupported(self._model, self._blocks, self.path)
        self._split_fused()
        self._head_name, self._head = find_head(self._model, self.path)
        self._sort_tensors()
        self._loaded: set[Part] = set()
        self._layers = packed
        self._packed = self._find_packed() if packed else {}
        self._local = LocalRun()
        self._outputs = 0  # how many values a block returns in a tuple; 0: the bare tensor
        self._hook_up()

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def block_name(self, i: int) -> str:
        """Module path of block i, such as `model.layers.3`."""
        return f"{self._prefix}.{i}"

    def _split_experts(self) -> None:
        """Makes experts linears, in the model and in its checkpoint."""
        experts = find_experts(self._model)
        self._expert_keys: set[str] = set()  # of everything that must find a place in them
        if not experts:
            return
        targets, _ = find_targets(self._model, self._mapping, self.checkpoint)
        names, self._mapping = expert_names(self._mapping)
        stacks: dict[str, Stack] = {}
        for key, (name, converted) in targets.items():
            path, _, tensor = name.rpartition(".")
            if path not in experts:
                continue
            stack = None if converted else find_stack(experts[path], tensor, key, name, names)
            if stack is None:
                self._expert_keys.add(key)
            else:
                stacks[key] = stack
        if stacks:
            self.checkpoint = ExpertCheckpoint(self.checkpoint, stacks)
        check_expert_count(experts, self.checkpoint)
        for path, stock in experts.items():
            self._model.set_submodule(path, LinearExperts(stock, names))

    def _split_fused(self) -> None:
        """Splits fused linears, in the model and in its checkpoint."""
        fused = split_linears(self._model, self.config.get_text_config(decoder=True))
        if fused:
            self.checkpoint = SplitCheckpoint(self.checkpoint, fused)

    # -- What is where ---------------------------------------------------------------------------

    def _sort_tensors(self) -> None:
        """Assigns the model's tensors and the checkpoint's keys to parts, and checks them."""
        model, source = self._model, self.checkpoint
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self._keys: dict[str, str] = {}  # tensors stored 1:1: the model's name → the key
        targets, self.dropped_keys = find_targets(model, self._mapping, source)
        for key in self.dropped_keys:
            if key in self._expert_keys:
                raise UserError(
                    f"{source.file(key)}: {key} belongs to no expert that the model has by "
                    "config.json, or is stored in a way that is not supported; check that the "
                    "files belong together."
                )
        for key, (name, converted) in targets.items():
            if converted:
                continue
            source.expect(key, shapes[name])
            if name in self._keys:
                raise UserError(
                    f"{source.file(key)}: {key} and {self._keys[name]} are the same tensor of "
                    "the model; remove the one that does not belong to it."
                )
            self._keys[name] = key
        self._sort_ties({name for name, _ in targets.values()})
        parts = self._part_names(shapes)
        self._names = {part: [] for part in (EMBEDDING, *range(self.num_blocks), TAIL)}
        self._part_keys = {part: [] for part in self._names}
        for name in shapes:
            self._names[parts[name]].append(name)
        for key, (name, _) in targets.items():
            # A tied head that alone is stored is the embedding too, which is needed first.
            part = EMBEDDING if name in self._twins else parts[name]
            self._part_keys[part].append(key)
        present = {name for name, _ in targets.values()} | self._twins.keys()
        for part, names in self._names.items():
            if not any(targets[key][1] for key in self._part_keys[part]):
                self._need(names, present)

    def _sort_ties(self, stored: set[str]) -> None:
        """Finds the pairs of tensors that are one, of which the checkpoint has one only."""
        self._twins: dict[str, str] = {}  # name → the other name, both ways
        for name, other in self._model.all_tied_weights_keys.items():
            if (name in stored) != (other in stored):
                self._twins |= {name: other, other: name}
        self.tied_head = f"{self._head_name}.weight" in self._twins

    def _part_names(self, names: dict[str, Any]) -> dict[str, Part]:
        """The part of each of the model's tensors."""
        parent, _, _ = self._prefix.rpartition(".")
        siblings = list(self._model.get_submodule(parent).named_children())
        after = siblings[[module for _, module in siblings].index(self._blocks) + 1 :]
        norms = [f"{parent}.{n}".strip(".") for n, m in after if "norm" in type(m).__name__.lower()]
        tail = tuple(f"{name}." for name in (*norms[:1], self._head_name))  # others: who knows when
        blocks = f"{self._prefix}."

        def part(name: str) -> Part:
            if name.startswith(blocks):
                return int(name.removeprefix(blocks).partition(".")[0])
            return TAIL if name.startswith(tail) else EMBEDDING

        return {name: part(name) for name in names}

    def _need(self, names: list[str], present: set[str]) -> None:
        for name in names:
            if name not in present:
                raise UserError(
                    f"{name} is in no file of {self.path}; download the model again, and check "
                    "that config.json belongs to it."
                )

    def block_keys(self, i: int) -> list[str]:
        """The checkpoint's keys that block i is made of."""
        return list(self._part_keys[i])

    def embedding_keys(self) -> list[str]:
        """The checkpoint's keys of everything that is neither in a block nor in the tail."""
        return list(self._part_keys[EMBEDDING])

    def tail_keys(self) -> list[str]:
        """The checkpoint's keys of the final norm and of the head (if it is not tied)."""
        return list(self._part_keys[TAIL])

    def block_linears(self, i: int) -> dict[str, nn.Linear]:
        """Block i's linears that can be quantized: the checkpoint's key without `.weight` → module.

        They are stored as they are in the model, and experts' are among them.
        """
        linears = {}
        for name, module in self._blocks[i].named_modules():
            key = self._keys.get(f"{self.block_name(i)}.{name}.weight", "")
            if not isinstance(module, nn.Linear) or is_left_alone(name):
                continue
            if key.endswith(".weight"):
                linears[key.removesuffix(".weight")] = module
        return linears

    def linears(self, head: bool = True) -> dict[str, nn.Linear]:
        """`block_linears` of all blocks, in order; last the head, unless that is not wanted."""
        blocks = (self.block_linears(i) for i in range(self.num_blocks))
        linears = {key: linear for block in blocks for key, linear in block.items()}
        return linears | dict([self.head()]) if head else linears

    def expert_linears(self, i: int) -> dict[str, nn.Linear]:
        """Those of `block_linears(i)` that are experts'."""
        own = {m for experts in self.block_experts(i).values() for m in experts.modules()}
        return {key: m for key, m in self.block_linears(i).items() if m in own}

    def block_experts(self, i: int) -> dict[str, LinearExperts]:
        """Block i's experts: path in the block → module."""
        modules = self._blocks[i].named_modules()
        return {name: module for name, module in modules if isinstance(module, LinearExperts)}

    def block_routers(self, i: int) -> dict[str, tuple[str, nn.Module]]:
        """What chooses among block i's experts: path of the experts in the block → the checkpoint's
        key of the router's weight, and the router.

        That is a module beside them with a row of weights for each, and nothing else that could
        stand between its input and those; where none or several are like that, it is not known.
        """
        found = {}
        for path, experts in self.block_experts(i).items():
            around, _, _ = f"{self.block_name(i)}.{path}".rpartition(".")
            beside = self._model.get_submodule(around).named_children()
            routers = [(n, m) for n, m in beside if is_router(m, experts.num_experts)]
            if len(routers) == 1 and (key := self._keys.get(f"{around}.{routers[0][0]}.weight")):
                found[path] = key, routers[0][1]
        return found

    def norms(self, part: Part) -> dict[str, nn.Module]:
        """The norms with a weight in a block (its number) or in TAIL: the checkpoint's key of that
        weight → module."""
        norms = {}
        for name in self._names[part]:
            path, _, leaf = name.rpartition(".")
            module = self._model.get_submodule(path)
            kind = type(module).__name__.lower()
            if leaf == "weight" and "norm" in kind and name in self._keys:
                norms[self._keys[name]] = module
        return norms

    def head(self) -> tuple[str, nn.Linear]:
        """The head and its key without `.weight`: the checkpoint's own, else (tied) `lm_head` with
        what stands before `model.embed_tokens`, as in `language_model.lm_head`."""
        key = self._keys.get(f"{self._head_name}.weight")
        if key is not None and not self.tied_head:
            return key.removesuffix(".weight"), self._head
        embedding = self._keys.get(self._twins.get(f"{self._head_name}.weight", ""), "")
        before, found, _ = embedding.rpartition(".model.embed_tokens.")
        return f"{before}.lm_head" if found else "lm_head", self._head

    # -- Loading and freeing ---------------------------------------------------------------------

    def load_embedding(self) -> None:
        """Loads what comes before the blocks; it must stay during every run."""
        self._load(EMBEDDING)

    def free_embedding(self) -> None:
        self._free(EMBEDDING)

    def load_block(self, i: int) -> nn.Module:
        """Loads block i and returns it."""
        self._load(i)
        return self._blocks[i]

    def free_block(self, i: int) -> None:
        self._free(i)

    def load_tail(self) -> None:
        """Loads the final norm and the head; a tied head is the embedding's own tensor."""
        if self.tied_head and EMBEDDING not in self._loaded:
            self.load_embedding()
        self._load(TAIL)

    def free_tail(self) -> None:
        self._free(TAIL)

    def _load(self, part: Part) -> None:
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self._model._get_dtype_plan(self.dtype),
            weight_mapping=copy.deepcopy(self._mapping),  # a converter remembers what it was given
            device_map={"": self.device},
        )
        keys = [key for key in self._part_keys[part] if key not in self._packed]
        state = {key: _Lazy(self.checkpoint, key) for key in keys}
        with no_transformers_bar():
            info, _ = convert_and_load_state_dict_in_model(self._model, state, config, None)
        for name, shape, expected in info.mismatched_keys:
            raise UserError(
                f"{name} of {self.path} is {tuple(shape)}, but by config.json it is "
                f"{tuple(expected)}; check that the files belong together."
            )
        for name, error in info.conversion_errors.items():
            raise UserError(f"{name} of {self.path} cannot be converted ({error}).")
        for key in self._packed.keys() & set(self._part_keys[part]):
            pack_linear(self._packed[key], self._layers.layer(key), self.device)
        names = [n for n in self._names[part] if self._keys.get(n) not in self._packed]
        for name in names:
            if name in self._twins and self._tensor(name).is_meta:
                self._set(name, self._tensor(self._twins[name]))
        self._need(names, {name for name in names if not self._tensor(name).is_meta})
        for name in names:
            self._tensor(name).requires_grad_(False)
        self._loaded.add(part)

    def _find_packed(self) -> dict[str, nn.Linear]:
        """The keys of quantized weights → their linears."""
        packed = {}
        for name, key in self._keys.items():
            path, _, leaf = name.rpartition(".")
            module = self._model.get_submodule(path)
            if leaf == "weight" and type(module) is nn.Linear and self._layers.is_layer(key):
                packed[key] = module
        return packed

    def _free(self, part: Part) -> None:
        self._loaded.discard(part)
        for key in self._packed.keys() & set(self._part_keys[part]):
            unpack_linear(self._packed[key])
        for name in self._names[part]:
            tensor = self._tensor(name)
            empty = torch.empty_like(tensor, device="meta")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=False)
            self._set(name, empty)

    def _tensor(self, name: str) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        return getattr(self._model.get_submodule(module), leaf)

    def _set(self, name: str, value: torch.Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        setattr(self._model.get_submodule(module), leaf, value)

    # -- Running ---------------------------------------------------------------------------------

    def run_block(
        self, i: int, input_ids: torch.Tensor, state: torch.Tensor | None
    ) -> torch.Tensor:
        """Output of block i, (rows, cols, hidden).

        input_ids: (rows, cols); state: output of block i-1 for these ids, None for block 0.
        """
        if (state is None) != (i == 0):
            raise ValueError("block 0 takes no state, every other block takes its predecessor's")
        return self._run_block(input_ids, Run(stop=i, state=self._here(state)))

    def block_graph(
        self, i: int, input_ids: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters block i, and its output as autograd's function of that; both (rows, cols,
        hidden). Arguments as for `run_block`; weights take no gradient."""
        run = Run(stop=i, state=self._here(state), gradients=True)
        with attention_for_gradients(self.device):
            output = self._run_block(input_ids, run)
        return run.entered, output

    def _run_block(self, input_ids: torch.Tensor, run: Run) -> torch.Tensor:
        output = self._drive(input_ids, run, run.stop)
        if isinstance(output, tuple):
            self._outputs = len(output)
            return output[0]
        return output

    def run_tail(self, input_ids: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Logits (rows, cols, vocab) from the last block's output (rows, cols, hidden)."""
        run = Run(stop=self.num_blocks, state=self._here(state))
        return self._drive(input_ids, run, TAIL).logits

    def tail_graph(
        self, input_ids: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last block's output, and the logits as autograd's function of it."""
        entered = self._here(state).detach().requires_grad_()
        run = Run(stop=self.num_blocks, state=entered, gradients=True)
        return entered, self._drive(input_ids, run, TAIL).logits

    def run_norm(self, input_ids: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What enters the head, (rows, cols, hidden), from the last block's output."""
        run = Run(stop=self.num_blocks, state=self._here(state), at_head=True)
        return self._drive(input_ids, run, TAIL)

    def _here(self, state: torch.Tensor | None) -> torch.Tensor | None:
        return None if state is None else state.to(self.device)

    def _drive(self, input_ids: torch.Tensor, run: Run, part: Part) -> Any:
        """Runs the stock forward as `run` says; returns what it was stopped with, or its output."""
        for needed in (EMBEDDING, part):
            if needed not in self._loaded:
                raise RuntimeError(f"part {needed} is not loaded")
        # After a resume no block has shown yet whether it returns a tensor or a tuple.
        for run.outputs in dict.fromkeys((self._outputs, 0, 1)):
            self._local.run = run
            try:
                with torch.set_grad_enabled(run.gradients):
                    output = self._model(
                        input_ids=input_ids.to(self.device), use_cache=False, return_dict=True
                    )
            except Stop as stop:
                output = stop.value
            except WrongForm:
                continue
            finally:
                self._local.run = None
            self._outputs = run.outputs
            return output
        raise UserError(
            f"The blocks of {self.path} hand on more than their hidden states; "
            f"models of the type {self.config.model_type} are not supported yet."
        )

    def _hook_up(self) -> None:
        """Makes blocks and head obey the run of their thread; without one they are as ever."""
        for i, block in enumerate(self._blocks):
            block.forward = self._obeying(i, block.forward)
        self._head.register_forward_pre_hook(self._stop_at_head)

    def _stop_at_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._local.run is not None and self._local.run.at_head:
            raise Stop(args[0])

    def _obeying(self, i: int, forward: Any) -> Any:
        @wraps(forward)
        def obeying(*args: Any, **kwargs: Any) -> Any:
            run = self._local.run
            if run is None:
                return forward(*args, **kwargs)
            if i > 0:
                hidden = args[0] if args else kwargs.get("hidden_states")
                if not isinstance(hidden, torch.Tensor) or hidden.shape != run.state.shape:
                    raise WrongForm
            if i < run.stop:
                return (run.state, *[None] * (run.outputs - 1)) if run.outputs else run.state
            self._refuse_side_channels(kwargs)
            if run.gradients:
                args, kwargs = run.follow(args, kwargs)
            raise Stop(forward(*args, **kwargs))

        return obeying

    def _refuse_side_channels(self, kwargs: dict[str, Any]) -> None:
        for name, value in kwargs.items():
            if isinstance(value, MutableMapping):
                raise UserError(
                    f"The blocks of {self.path} talk to each other through {name}; models of "
                    f"the type {self.config.model_type} are not supported yet."
                )


@dataclass(frozen=True)
class _Lazy:
    """A tensor of a checkpoint that is read when the loader slices it."""

    source: TensorSource
    key: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.source.tensor(self.key)[index]
