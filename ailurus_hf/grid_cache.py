"""Tensors that depend on no image (tables of a grid, constants): made once per device, constant under compilation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Made:
    """What a function made. The compiler names an object apart from others, but all tensors of a function alike."""

    value: Any


def grid_table(function: Callable[..., Any]) -> Callable[..., Any]:
    """Caches a function's results by its arguments, which must be hashable; the last 64 are kept."""

    def build(*arguments: Any) -> Any:
        # Tables are built in data-dependent steps, which belong on the CPU whatever the default device is.
        with torch.no_grad(), torch.device("cpu"):
            return function(*arguments)

    @lru_cache(maxsize=64, typed=True)  # True is no 1.0
    def make(*arguments: Any) -> Made:
        # While torch.export traces a model, tensors of that thread have no values; those of another thread do.
        with ThreadPoolExecutor(1) as elsewhere:
            return Made(elsewhere.submit(build, *arguments).result())

    def made(*arguments: Any) -> Made:
        return make(*arguments)

    # As torch.compiler.assume_constant_result does, which would import the compiler with this package (seconds).
    made._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @wraps(function)
    def table(*arguments: Any) -> Any:
        return made(*arguments).value

    return table


def constant(value: float | bool, device: torch.device) -> torch.Tensor:
    """Tensor[] of a value, to be expanded: a fill would be one more launch."""
    # A compiler writes values into its kernels.
    return torch.tensor(value, device=device) if torch.compiler.is_compiling() else _constant(value, device)


def multiples(count: int, step: int, device: torch.device) -> torch.Tensor:
    """LongTensor[count, 1]: 0, step, 2 · step, ...: where each image's rows begin in one flat table."""
    # A batch may have no number yet while a graph is made.
    if torch.compiler.is_compiling():
        return torch.arange(count, device=device)[:, None] * step
    return _multiples(count, step, device)


@grid_table
def _constant(value: float | bool, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, device=device)


@grid_table
def _multiples(count: int, step: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(count) * step)[:, None].to(device)
