"""Whether a call is traced for a graph that does without this package: its runtimes are stricter than torch, too."""

from __future__ import annotations

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Whether torch.export traces this call.

    `torch.compiler.is_exporting` is taken for true in every graph that torch 2.11 compiles.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def leaves_package() -> bool:
    """Whether this call is traced for a graph that has to do without this package."""
    return is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def takes_operators(tensor: Tensor) -> bool:
    """Whether operators of this package run on it: on a CPU, but in graphs that have to do without the package."""
    return tensor.device.type == "cpu" and not leaves_package()
