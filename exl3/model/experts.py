"""Experts as linears: one `nn.Linear` for each matrix that transformers keeps in a stack.

transformers 5 holds all experts of a block in 3D parameters. Here the class that does so is
replaced by `LinearExperts`, whose linears are named as in a checkpoint with a key for every expert
(`experts.3.gate_proj.weight`), and a checkpoint that stores stacks is shown by `ExpertCheckpoint`
with those keys. So every expert is captured, quantized and written like any other linear.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from exl3.errors import UserError
from exl3.model.checkpoint import TensorSource, View

NAMES = {
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}  # unless transformers has others
STACKS = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}
BIAS = "_bias"  # a stack of biases is named like that of the weights, with this behind it


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules (path → module) that `LinearExperts` can take the place of.

    They are of the classes under transformers' `use_experts_implementation`, and hold no tensors
    but the stacks of their linears.
    """
    return {path: module for path, module in model.named_modules() if _is_stacked(module)}


def _is_stacked(module: nn.Module) -> bool:
    marks = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
    if not all(hasattr(module, mark) for mark in marks):
        return False
    if getattr(module, "has_post_expert_norm", False) or any(module.buffers()):
        return False
    weights = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    biases = {name + BIAS for name in weights} if module.has_bias else set()
    return {name for name, _ in module.named_parameters()} == weights | biases


def is_router(module: nn.Module, num_experts: int) -> bool:
    """Whether a module's own weight has a row for each expert, and multiplies what enters it: there
    is nothing in it that could come before."""
    parameters = dict(module.named_parameters())
    if not {"weight"} <= parameters.keys() <= {"weight", "bias"}:
        return False
    weight = parameters["weight"]
    return weight.dim() == 2 and len(weight) == num_experts


def check_expert_count(experts: dict[str, nn.Module], source: TensorSource) -> None:
    """Before linears are made: config.json asks for no more experts than there are tensors."""
    most = sum(1 for _ in source.keys())  # noqa: SIM118
    for stock in experts.values():
        if stock.down_proj.shape[0] > most:
            raise UserError(
                f"config.json asks for {stock.down_proj.shape[0]} experts, which the checkpoint "
                "does not have; check that the files belong together."
            )


class LinearExperts(nn.Module):
    """The experts of a block as linears; computes bit for bit what the stock eager experts do.

    stock: a module of `find_experts`, which loses its stacks; names: role → the linears' name.
    """

    def __init__(self, stock: nn.Module, names: dict[str, str]):
        super().__init__()
        self.num_experts: int = stock.down_proj.shape[0]
        self.interleaved: bool = not stock.is_concatenated  # gate and up
        self._names = {role: names[role] for role in NAMES if role != "gate" or stock.has_gate}
        # A tuple, for as a child its activation would have names in the model.
        self._stock = (stock,)
        inner, hidden = stock.down_proj.shape[1:]
        if not stock.is_transposed:
            inner, hidden = hidden, inner
        make = _AddedBias if stock.is_transposed else nn.Linear
        options = {
            "bias": stock.has_bias,
            "device": stock.down_proj.device,
            "dtype": stock.down_proj.dtype,
        }
        for e in range(self.num_experts):
            expert = nn.Module()
            for role, name in self._names.items():
                sizes = (inner, hidden) if role == "down" else (hidden, inner)
                expert.add_module(name, make(*sizes, **options))
            self.add_module(str(e), expert)
        for name, _ in list(stock.named_parameters()):
            setattr(stock, name, None)
        self.requires_grad_(False)
        self.train(stock.training)

    def linears(self, e: int) -> dict[str, nn.Linear]:
        """Expert e's linears by role: "gate" (if it has one), "up", "down"."""
        expert = getattr(self, str(e))
        return {role: getattr(expert, name) for role, name in self._names.items()}

    def hidden(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """What enters expert e's down projection: (tokens, hidden) → (tokens, intermediate)."""
        linears, stock = self.linears(e), self._stock[0]
        if "gate" not in linears:
            return stock.act_fn(linears["up"](x))
        both = linears["gate"](x), linears["up"](x)
        # Laid out as the stock class has them, for activations may round by the layout.
        if self.interleaved:
            return stock._apply_gate(torch.stack(both, dim=-1).flatten(-2))
        return stock._apply_gate(torch.cat(both, dim=-1))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the outputs of every token's experts, (tokens, hidden).

        hidden_states: (tokens, hidden); top_k_index: (tokens, k), of which numbers beyond the last
        expert stand for none; top_k_weights: (tokens, k).
        """
        output = torch.zeros_like(hidden_states)
        # As in the stock class: experts in order, and each one's tokens by place, then by token.
        for e in top_k_index.unique().tolist():
            if e >= self.num_experts:
                continue
            place, token = torch.where(top_k_index.T.eq(e))
            y = self.linears(e)["down"](self.hidden(e, hidden_states[token]))
            y = y * top_k_weights[token, place, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output


class _AddedBias(nn.Linear):
    """A linear that rounds its product before it adds the bias, as stock transposed experts do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Stack:
    """The tensor of one kind of all experts of a block, as a checkpoint holds it.

    Weights are (experts, out, in), or if transposed (experts, in, out), biases (experts, out);
    out is one role's, or gate's and up's, one after the other or interleaved.
    """

    prefix: str  # of the keys shown instead: "model.layers.0.mlp.experts"
    roles: tuple[str, ...]
    names: dict[str, str]  # role → name of the linears
    leaf: str  # "weight" or "bias"
    shape: tuple[int, ...]
    transposed: bool
    interleaved: bool

    def parts(self) -> Iterable[tuple[str, int, str]]:
        """Key, expert and role of every tensor that is shown instead."""
        for e in range(self.shape[0]):
            for role in self.roles:
                yield f"{self.prefix}.{e}.{self.names[role]}.{self.leaf}", e, role

    def part_shape(self) -> tuple[int, ...]:
        """(out, in) of one role of one expert; (out,) of its bias."""
        shape = self.shape[1:]
        if self.transposed:
            shape = shape[::-1]
        return (shape[0] // len(self.roles), *shape[1:])

    def part(self, expert: torch.Tensor, role: str) -> torch.Tensor:
        """One role's weight (out, in) or bias (out,), given the expert's part of the stack."""
        out = expert.dim() - 1 if self.transposed else 0
        count, size = len(self.roles), expert.shape[out] // len(self.roles)
        i = self.roles.index(role)
        cut = slice(i, None, count) if self.interleaved else slice(i * size, (i + 1) * size)
        # Copied before it is transposed, so that products run through memory as the stack's do;
        # a view would keep the other role's half.
        part = expert[:, cut].clone() if out else expert[cut].clone()
        return part.T if self.transposed else part

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """An expert's part of the stack from its roles' weights (out, in) or biases (out,): what
        `part` cuts."""
        whole = torch.stack(parts, dim=1).flatten(0, 1) if self.interleaved else torch.cat(parts)
        return whole.T if self.transposed else whole


def restack(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The state with stacks where `ExpertCheckpoint` would show their parts, for a stock model.

    Parts with names of their own are left: transformers stacks these.
    """
    state = dict(state)
    for path, experts in find_experts(model).items():
        for tensor, _ in experts.named_parameters():
            name = f"{path}.{tensor}"
            stack = find_stack(experts, tensor, name, name, NAMES)
            parts = [key for key, *_ in stack.parts()]
            if all(key in state for key in parts):
                tensors = [state.pop(key) for key in parts]
                count = len(stack.roles)
                each = [tensors[i : i + count] for i in range(0, len(tensors), count)]
                state[name] = torch.stack([stack.join(roles) for roles in each])
    return state


def find_stack(
    experts: nn.Module, tensor: str, key: str, name: str, names: dict[str, str]
) -> Stack | None:
    """What a checkpoint's key holds that goes to a tensor of stacked experts, None if that is
    nothing this module knows.

    tensor: the parameter's name in `experts`; name: the same with its path in the model.
    """
    roles = STACKS.get(tensor.removesuffix(BIAS))
    if roles is None:
        return None
    bias = tensor.endswith(BIAS)
    # Readers look where the stack is; where it is under a name of its own, where the model has it.
    path = key if key.endswith(f".{tensor}") else name
    return Stack(
        path.removesuffix(f".{tensor}"),
        roles,
        names,
        "bias" if bias else "weight",
        tuple(getattr(experts, tensor).shape),
        experts.is_transposed and not bias,
        len(roles) > 1 and not experts.is_concatenated,
    )


@dataclass(frozen=True)
class _Part:
    key: str  # of the stack
    expert: int
    role: str


class ExpertCheckpoint(View):
    """A source of tensors with a key for every expert in the place of stacks.

    UserError for a stack that is not of the shape which the model wants.
    """

    def __init__(self, source: TensorSource, stacks: dict[str, Stack]):
        super().__init__(source)
        self._stacks = stacks
        self._parts: dict[str, _Part] = {}
        for key, stack in stacks.items():
            source.expect(key, stack.shape)
            self._parts |= {shown: _Part(key, e, role) for shown, e, role in stack.parts()}

    def keys(self) -> Iterable[str]:
        yield from (key for key in self.source.keys() if key not in self._stacks)  # noqa: SIM118
        yield from self._parts

    def shape(self, key: str) -> tuple[int, ...]:
        part = self._parts.get(key)
        return self._stacks[part.key].part_shape() if part else self.source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(self._stored(key))

    def nbytes(self, key: str) -> int:
        """Bytes in the file; of an expert, its share of the stack's."""
        part = self._parts.get(key)
        if part is None:
            return self.source.nbytes(key)
        stack = self._stacks[part.key]
        return self.source.nbytes(part.key) // (stack.shape[0] * len(stack.roles))

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor, the caller's own to write into."""
        part = self._parts.get(key)
        if part is None:
            return self.source.tensor(key)
        return self._stacks[part.key].part(self.source.matrix(part.key, part.expert), part.role)

    def file(self, key: str) -> str:
        return self.source.file(self._stored(key))

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        """UserError unless the tensor has the shape that the model wants."""
        if key not in self._parts:  # of the others the shapes are the model's own
            self.source.expect(key, shape)

    def _stored(self, key: str) -> str:
        part = self._parts.get(key)
        return part.key if part else key
