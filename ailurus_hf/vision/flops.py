"""FLOPs of transformer layers as a function of their number of tokens (a multiply-add is two)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def layer_flops(layer: nn.Module, num_tokens: int) -> float | None:
    """FLOPs of one layer on one sequence: its linear layers, and self-attention's two products as wide as its output.

    Args:
        layer: a transformer layer. Quantized linear layers count as those they replace.
        num_tokens: the length of the sequence.

    Returns:
        The FLOPs; None where the layer has no linear layer whose size is known.

    Example:
        >>> layer_flops(torch.nn.Sequential(torch.nn.Linear(4, 4)), num_tokens=3)
        240.0
    """
    linears: list[Any] = [module for module in layer.modules() if _is_linear(module)]
    if not linears:
        return None
    dense = sum(2.0 * linear.in_features * linear.out_features for linear in linears) * num_tokens
    # The first linear layer makes the queries, or queries, keys and values together.
    width = min(linears[0].in_features, linears[0].out_features)
    return dense + 4.0 * num_tokens**2 * width


def _is_linear(module: nn.Module) -> bool:
    """A linear layer of any make that has no other linear layer inside, which would count twice."""
    inner = [child for child in module.children() if _is_linear(child)]
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return not inner and all(isinstance(size, int) for size in sizes)


def layers_flops(layers: Iterable[nn.Module], num_tokens: int) -> float | None:
    """FLOPs of several layers on one sequence.

    Args:
        layers: transformer layers.
        num_tokens: the length of the sequence.

    Returns:
        The sum; None where those of one are not known.

    Example:
        >>> layers_flops([torch.nn.Sequential(torch.nn.Linear(4, 4))] * 2, num_tokens=3)
        480.0
    """
    each = [layer_flops(layer, num_tokens) for layer in layers]
    return None if None in each else sum(flops for flops in each if flops is not None)
