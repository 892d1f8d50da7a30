"""@grid_table: for functions of a grid and a device whose results are made once, kept, and constant under compilation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from typing import Any

import torch


def grid_table(function: Callable[..., Any]) -> Callable[..., Any]:
    """Caches the result by arguments (all hashable); the last 64 are kept."""

    def build(*arguments: Any) -> Any:
        # Building a table takes data-dependent steps, which belong on the CPU whatever the default device is.
        with torch.no_grad(), torch.device("cpu"):
            return function(*arguments)

    @lru_cache(maxsize=64)
    def make(*arguments: Any) -> Any:
        # What traces a model (torch.export) has tensors without values in the thread that it traces; another has not.
        with ThreadPoolExecutor(1) as elsewhere:
            return elsewhere.submit(build, *arguments).result()

    @wraps(function)
    def table(*arguments: Any) -> Any:
        return make(*arguments)

    # What torch.compiler.assume_constant_result does; calling that would import the compiler with this package (seconds).
    table._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return table
