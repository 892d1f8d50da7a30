"""Products in fp32 where clustering compares tokens: autocast would have them in half precision, and distances with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
# Where training under autocast is known; on other devices ("meta") the question alone is an error.
DEVICES = ("cpu", "cuda", "mps", "xpu")


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """The function with autocast off on the device of its first argument, a tensor."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        first = args[0]
        assert isinstance(first, Tensor)
        device = first.device.type
        # Not entered where it is off anyway: exporters would write it into their graphs.
        if device not in DEVICES or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run
