"""Numbers about models and reductions: FLOPs."""

from .flops import layer_flops, layers_flops

__all__ = ["layer_flops", "layers_flops"]
