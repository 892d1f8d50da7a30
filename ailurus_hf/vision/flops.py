"""FLOPs of transformer layers as a function of their number of tokens (a multiply-add is two)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def layer_flops(layer: nn.Module, num_tokens: int) -> float:
    """FLOPs of one layer on one sequence: its linear layers, and self-attention's two products as wide as its output."""
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    dense = sum(2.0 * linear.in_features * linear.out_features for linear in linears) * num_tokens
    # The first linear layer makes the queries, or queries, keys and values together.
    width = min(linears[0].in_features, linears[0].out_features)
    return dense + 4.0 * num_tokens**2 * width


def layers_flops(layers: Iterable[nn.Module], num_tokens: int) -> float:
    """FLOPs of several layers on one sequence of `num_tokens`."""
    return sum(layer_flops(layer, num_tokens) for layer in layers)
