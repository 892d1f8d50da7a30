"""fp32 where clustering compares tokens: under autocast, products and so distances would be in half precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
# Devices that can be asked for autocast; on others ("meta") asking is an error.
DEVICES = ("cpu", "cuda", "mps", "xpu")


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """A decorator: runs the function without autocast on the device of its first argument, a tensor."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        first = args[0]
        assert isinstance(first, Tensor)
        device = first.device.type
        # Not entered where it is off anyway: exporters would write it into the graph.
        if device not in DEVICES or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
