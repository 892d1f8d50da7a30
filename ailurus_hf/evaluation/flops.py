"""FLOPs of whole models (a multiply-add is two); those of single layers are in vision/flops.py."""

from __future__ import annotations

import inspect
import sys

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
        finally:
            _forget_tables(model)
    return counter.get_total_flops()


def _forget_tables(model: nn.Module) -> None:
    """Empties the caches (functools.lru_cache) of a model's methods and of the functions in the files of its classes.

    Those that keep a table of each size they met (BEiT, DINOv3) have kept one of shapes alone, with which no real
    forward can go on.
    """
    classes = {ancestor for module in model.modules() for ancestor in type(module).__mro__}
    files = [sys.modules[name] for name in {cls.__module__ for cls in classes} if name in sys.modules]
    for value in [value for holder in (*classes, *files) for value in vars(holder).values()]:
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        # transformers hides its caches in closures.
        hidden = inspect.getclosurevars(function).nonlocals.values() if inspect.isfunction(function) else ()
        for cache in (function, *hidden):
            if hasattr(type(cache), "cache_clear"):
                cache.cache_clear()
