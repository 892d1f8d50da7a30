"""Gradient checkpointing: a block that is run again in the backward finds the state that it ran in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .forward_state import Forwards, ForwardState


class CheckpointedBlocks:
    """A module's `_gradient_checkpointing_func`, called by diffusers as func(block, *args), with the state for it."""

    def __init__(self, checkpoint: Callable[..., Any], forwards: Forwards) -> None:
        self.checkpoint, self.forwards = checkpoint, forwards

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        state = self.forwards.current
        run = block if state is None else _Resumable(block, self.forwards, state.at_this_point())
        return self.checkpoint(run, *args)


class _Resumable:
    """A block that runs in the present forward the first time, and in the same state when it runs again."""

    def __init__(self, block: nn.Module, forwards: Forwards, state: ForwardState) -> None:
        self.block, self.forwards, self.state = block, forwards, state
        self.ran = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.ran:
            self.ran = True
            return self.block(*args, **kwargs)
        with self.forwards.resumed(self.state.at_this_point()):
            return self.block(*args, **kwargs)


def keep_state_in_checkpoints(module: Any, forwards: Forwards) -> None:
    """Has a module's checkpoints keep the state; done at each forward, as checkpointing may be enabled at any time."""
    checkpoint = module._gradient_checkpointing_func
    if not isinstance(checkpoint, CheckpointedBlocks):
        module._gradient_checkpointing_func = CheckpointedBlocks(checkpoint, forwards)


def drop_state_in_checkpoints(network: nn.Module) -> None:
    """Undoes `keep_state_in_checkpoints` in a network."""
    for module in network.modules():
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if isinstance(checkpoint, CheckpointedBlocks):
            vars(module)["_gradient_checkpointing_func"] = checkpoint.checkpoint
