"""The contenders: every way of reducing a vision model (registry, variants) or a diffusion network (diffusion)."""

from .registry import (
    EVERY,
    METHODS,
    PAPER,
    VARIANTS,
    Amount,
    AppliedConfig,
    AppliedMethod,
    AppliedPeer,
    Direct,
    Matched,
    Ours,
    apply_method,
    flops_with,
    parsed,
    token_grid,
)

__all__ = [
    "EVERY",
    "METHODS",
    "PAPER",
    "VARIANTS",
    "Direct",
    "Matched",
    "AppliedConfig",
    "Ours",
    "AppliedPeer",
    "AppliedMethod",
    "Amount",
    "apply_method",
    "flops_with",
    "parsed",
    "token_grid",
]
