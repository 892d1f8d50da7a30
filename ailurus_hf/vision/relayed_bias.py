"""Layers that hand nothing on to their attention, which takes a bias (DINOv2 up to transformers 5.17): it passes by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..hooks import Hooks
from ..per_thread import PerThread
from .backend import KEY_BIAS, attention_of_layer, unwrapped


class RelayedBias:
    """Hooks that take the bias off a layer's arguments and give it to its attention."""

    def __init__(self, layer: nn.Module, attention: nn.Module) -> None:
        self.layer, self.attention = layer, attention
        self.bias: PerThread[Tensor] = PerThread()

    def install(self, hooks: Hooks) -> None:
        hooks.pre_forward(self.layer, self.take)
        hooks.pre_forward(self.attention, self.give)
        hooks.post_forward(self.layer, self.forget, always_call=True)

    def take(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if KEY_BIAS not in kwargs:
            return None
        kwargs = dict(kwargs)
        self.bias.set(kwargs.pop(KEY_BIAS))
        return args, kwargs

    def give(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        bias = self.bias.pop()
        return None if bias is None else (args, {**kwargs, KEY_BIAS: bias})

    def forget(self, layer: nn.Module, args: tuple, output: Any) -> None:
        self.bias.pop()


def relayed_biases(layers: Iterable[nn.Module]) -> list[RelayedBias]:
    """One for each layer that needs it."""
    found = [(layer, attention_of_layer(unwrapped(layer))) for layer in layers]
    return [RelayedBias(layer, attention) for layer, attention in found if attention is not None]
