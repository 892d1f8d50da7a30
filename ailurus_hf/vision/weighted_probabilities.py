"""Attention that takes no bias (BLIP): its probabilities are weighted by the counts, where they pass its dropout.

softmax(s + log m) is m · softmax(s) over its sum (AiluRus, Eq. 5), so nothing of the attention has to be written again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..hooks import Hooks
from ..per_thread import PerThread
from .backend import KEY_BIAS, WRITES_PROBABILITIES
from .registry import qualified_name


class WeightedProbabilities:
    """Hooks on one attention module with explicit probabilities, Tensor[B, heads, L, L], and dropout on them."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention
        self.dropout = attention.get_submodule(WRITES_PROBABILITIES[qualified_name(attention)])
        self.bias: PerThread[Tensor] = PerThread()

    def install(self, hooks: Hooks) -> None:
        hooks.pre_forward(self.attention, self.note)
        hooks.pre_forward(self.dropout, self.weigh)
        hooks.post_forward(self.attention, self.forget, always_call=True)

    def note(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        if (bias := kwargs.pop(KEY_BIAS, None)) is not None:
            self.bias.set(bias)
        return args, kwargs

    def weigh(self, dropout: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        bias = self.bias.pop()
        if bias is None:
            return args, kwargs
        weighted = args[0] * bias.exp()
        return (weighted / weighted.sum(-1, keepdim=True), *args[1:]), kwargs

    def forget(self, attention: nn.Module, args: tuple, output: Any) -> None:
        self.bias.pop()


def weighted_probabilities(layers: Iterable[nn.Module]) -> list[WeightedProbabilities]:
    """One for each attention module in `layers` that needs it."""
    modules = (module for layer in layers for module in layer.modules())
    return [WeightedProbabilities(module) for module in modules if qualified_name(module) in WRITES_PROBABILITIES]
