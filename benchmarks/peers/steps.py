"""What the peers that remember over steps share: which step of a generation a network is in, and when a new one begins.

Within a generation the timesteps fall from call to call. A call whose timestep does not fall, or whose latents have
another shape, begins a new one: what was remembered is dropped. So schedulers that repeat a timestep cannot be used,
and a single step that is called again and again remembers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ailurus_hf.diffusion.calls import NetworkCall, argument_names
from ailurus_hf.hooks import Hooks


class Steps:
    """Counts the steps of a network's generations, from 0. begin: called where one begins, before the first step."""

    def __init__(self, network: nn.Module, hooks: Hooks, begin: Callable[[], None]) -> None:
        self.number = -1
        self._begin, self._names = begin, argument_names(network)
        self._timestep, self._shape = -math.inf, ()
        hooks.pre_forward(network, self._note)

    def _note(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        call = NetworkCall(network, self._names, args, kwargs)
        timestep = call.argument("timestep")
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        shape = tuple(call.latents.shape)
        if value >= self._timestep or shape != self._shape:
            self.number = -1
            self._begin()
        self.number += 1
        self._timestep, self._shape = value, shape


def replace_forward(hooks: Hooks, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Has the module's forward be forward(original, first argument, *others, **named), whatever it is called with."""
    first = argument_names(module)[0]

    def replaced(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args:
            return forward(original, *args, **kwargs)
        return forward(original, kwargs.pop(first), **kwargs)

    hooks.replace_method(module, "forward", replaced)


def rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Tensor[B, N, C] at LongTensor[B, K]: [B, K, C]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
