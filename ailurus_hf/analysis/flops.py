"""FLOPs: of transformer layers as a function of their number of tokens, and of whole models (a multiply-add is two)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


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


def counted_flops(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """FLOPs of a whole forward on a model's inputs, counted by torch on shapes alone: nothing is computed.

    Attention counts as its two products, since torch does not know the fused kernels of all devices.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        shapes = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        with FlopCounterMode(display=False) as counter:
            model(**shapes)
    return counter.get_total_flops()
