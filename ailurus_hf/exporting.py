"""Whether torch.export traces a call: its graph does without this package, and runtimes are stricter than torch."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether torch.export traces this call.

    `torch.compiler.is_exporting` is taken for true in every graph that torch 2.11 compiles.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)
