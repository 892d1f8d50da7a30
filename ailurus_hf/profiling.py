"""Names of reduction's steps in a profiler's trace: "ailurus::cluster", "ailurus::merge", "ailurus::unmerge"."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.profiler import record_function

P = ParamSpec("P")
T = TypeVar("T")


def recorded(name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result; the call has this name in the trace of a profiler that runs.

    Graphs that are compiled, traced or exported get no names.
    """
    # Asking costs a microsecond; entering record_function some 30, whether a profiler runs or not.
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return function(*args, **kwargs)
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return function(*args, **kwargs)
    with record_function(name):
        return function(*args, **kwargs)
