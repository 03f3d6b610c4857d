"""What the blocks of a streamed model shall do during one forward of the stock model."""

import threading
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Run:
    """One forward of one thread."""

    stop: int  # blocks before this one give back `state`, this one runs and stops the model
    state: torch.Tensor | None
    at_head: bool = False  # stop where the head begins
    outputs: int = 0  # blocks give back the bare state (0) or a tuple of so many values
    gradients: bool = False  # autograd follows the part that runs
    entered: torch.Tensor | None = None  # what entered the block, where autograd begins

    def follow(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments with its input in autograd's sight."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.entered = hidden.detach().requires_grad_()
        hidden = self.entered.clone()  # autograd's own beginnings may not be changed in place
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}


class LocalRun(threading.local):
    """The run that a thread makes, if any."""

    run: Run | None = None


class Stop(Exception):
    """Leaves the stock forward with a value."""

    def __init__(self, value: Any):
        self.value = value


class WrongForm(Exception):
    """A block was not given the state that its predecessor gave back."""
