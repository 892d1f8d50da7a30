"""FLOPs of whole models (a multiply-add is two); those of single layers are in vision/flops.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def counted_flops(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """FLOPs of a whole forward on a model's inputs, counted by torch on shapes alone: nothing is computed,
    unless what a model does depends on values (EoMT's masks).

    Attention counts as its two products, since torch does not know the fused kernels of all devices.

    Args:
        model: any module.
        inputs: the keyword arguments of its forward; of tensors only shape and type matter.

    Returns:
        The FLOPs; a multiply-add is two.

    Example:
        >>> counted_flops(torch.nn.Linear(4, 8), {"input": torch.zeros(3, 4)})
        192
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                shapes = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
                with counter:
                    model(**shapes)
        except DataDependentOutputException:
            with FlopCounterMode(display=False) as counter:
                model(**inputs)
    return counter.get_total_flops()
