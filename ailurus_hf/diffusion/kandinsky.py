"""Kandinsky 5: tokens lie in frames, rows and columns, attend to all, and are rotated by matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .joint import JointProcessor
from .rotary import Rotary
from .token_order import TokenOrder


class KandinskyProcessor(JointProcessor):
    """Kandinsky's self-attention whose keys are weighted by how many tokens they stand for; else as
    Kandinsky5AttnProcessor."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return JointProcessor.__call__(self, attn, hidden_states, None, None, rotary_emb)

    def by_token(self, attn: Any, embedding: Any) -> Rotary:
        """Kandinsky gives Tensor[B, N, 1, D / 2, 2, 2], a matrix for each pair of channels."""
        cos, sin = embedding.squeeze(2)[..., 0].repeat_interleave(2, -2).unbind(-1)
        return cos, sin

    def _rotated(self, tokens: Tensor, rotary: Rotary, order: TokenOrder) -> Tensor:
        # As the network does, whatever its precision.
        return JointProcessor._rotated(self, tokens.float(), rotary, order).to(torch.bfloat16).to(tokens.dtype)

    def _projected(self, attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        parts = (attn.to_query(image), attn.to_key(image), attn.to_value(image))
        query, key, value = (part.unflatten(2, (attn.num_heads, -1)) for part in parts)
        return attn.query_norm(query.float()).to(query.dtype), attn.key_norm(key.float()).to(key.dtype), value

    def _output(self, attn: Any, out: Tensor, text: Tensor | None, *others: Tensor) -> Tensor:
        projected: Tensor = attn.out_layer(out)
        return projected
