"""FLOPs of transformer layers as a function of their number of tokens (a multiply-add is two)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def layer_flops(layer: nn.Module, num_tokens: int) -> float:
    """FLOPs of one layer on one sequence: its linear layers, and self-attention's two products as wide as its output."""
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    dense = sum(2.0 * linear.in_features * linear.out_features for linear in linears) * num_tokens
    width = max(linear.in_features for linear in linears if linear.out_features == linears[0].in_features)
    heads_width = min(width, linears[0].out_features)
    return dense + 4.0 * num_tokens**2 * heads_width


def layers_flops(layers: Iterable[nn.Module], num_tokens: int) -> float:
    """FLOPs of several layers on one sequence of `num_tokens`."""
    return sum(layer_flops(layer, num_tokens) for layer in layers)
