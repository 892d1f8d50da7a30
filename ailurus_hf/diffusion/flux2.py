"""Flux.2: joint attention as Flux's, and single blocks whose attention and MLP are projected together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .joint import JointProcessor


class Flux2Processor(JointProcessor):
    """Flux.2's attention with weighted keys; else as Flux2AttnProcessor and Flux2ParallelSelfAttnProcessor."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, grid: Any = None, **kwargs: Any) -> Any:
        # Single blocks have no place for text among their arguments.
        text = (None,) if hasattr(attn, "to_qkv_mlp_proj") else ()
        return JointProcessor.__call__(self, attn, hidden_states, *text, *args, **kwargs)

    def _projected(self, attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        if not hasattr(attn, "to_qkv_mlp_proj"):
            return JointProcessor._projected(self, attn, image, text)
        sizes = (*(attn.inner_dim,) * 3, attn.mlp_hidden_dim * attn.mlp_mult_factor)
        *parts, mlp = attn.to_qkv_mlp_proj(image).split(sizes, -1)
        query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in parts)
        return attn.norm_q(query), attn.norm_k(key), value, mlp

    def _output(self, attn: Any, out: Tensor, text: Tensor | None, *others: Tensor) -> Any:
        if not others:
            return JointProcessor._output(self, attn, out, text)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(others[0])], -1))
