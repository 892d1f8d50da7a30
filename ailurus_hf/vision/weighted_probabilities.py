"""Attention that takes no bias (BLIP): its probabilities are weighted by the counts, where they pass its dropout.

softmax(s + log m) is m · softmax(s) over its sum (AiluRus, Eq. 5), so nothing of the attention has to be written again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..hooks import Hooks
from .backend import KEY_BIAS, OWN_ATTENTION, qualified_name
from .forward_state import thread


class WeightedProbabilities:
    """Hooks on one attention module that writes out its probabilities, Tensor[B, heads, L, L], and drops some of them."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        self.dropout = attention.get_submodule(OWN_ATTENTION[qualified_name(attention)])
        # One model may run in several threads at once.
        self.bias: dict[int, Tensor] = {}

    def install(self, hooks: Hooks) -> None:
        hooks.pre_forward(self.attention, self.note)
        hooks.pre_forward(self.dropout, self.weigh)

    def note(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        self.bias.pop(thread(), None)
        if (bias := kwargs.pop(KEY_BIAS, None)) is not None:
            self.bias[thread()] = bias
        return args, kwargs

    def weigh(self, dropout: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        bias = self.bias.pop(thread(), None)
        if bias is None:
            return args, kwargs
        weighted = args[0] * bias.exp()
        return (weighted / weighted.sum(-1, keepdim=True), *args[1:]), kwargs


def weighted_probabilities(layers: Iterable[Any]) -> list[WeightedProbabilities]:
    """One for each attention module in `layers` that needs it."""
    modules = (module for layer in layers for module in layer.modules())
    return [WeightedProbabilities(module) for module in modules if qualified_name(module) in OWN_ATTENTION]
