"""Lumina 2 and Z-Image: image and text are one sequence, padded to the longest of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .calls import NetworkCall
from .joint import JointProcessor
from .rotary import Rotary, of_complex
from .token_order import ImageAmongText


def image_after_its_text(call: NetworkCall) -> ImageAmongText:
    """Lumina 2's sequences: as much of the text as its mask says, the image, padding."""
    mask: Tensor = call.argument("encoder_attention_mask")
    return ImageAmongText(starts=mask.sum(1).long())


class ListGrid:
    """The sides of Z-Image's images, Tensor[C, frames, H, W] each, over the patch size that it is called with."""

    def __call__(self, call: NetworkCall) -> tuple[int, ...]:
        patch = int(call.argument("patch_size") or 2)
        *_, frames, height, width = call.latents.shape
        frames = int(frames) // int(call.argument("f_patch_size") or 1)
        grid = (int(height) // patch, int(width) // patch)
        return grid if frames == 1 else (frames, *grid)


class LuminaProcessor(JointProcessor):
    """Lumina 2's attention with weighted keys; else as Lumina2AttnProcessor2_0."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        grid: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        mask = None if attention_mask is None else attention_mask.bool()
        # The layer's keys are of the same tokens as its queries.
        return JointProcessor.__call__(self, attn, hidden_states, None, mask, image_rotary_emb)

    def by_token(self, attn: Any, embedding: Any) -> Rotary:
        """Complex factors, Tensor[B, L, D / 2]."""
        return of_complex(embedding.to(torch.complex64))

    def _projected(self, attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        query = attn.to_q(image).unflatten(2, (attn.heads, -1))
        key, value = (part(image).unflatten(2, (-1, query.shape[-1])) for part in (attn.to_k, attn.to_v))
        query = query if attn.norm_q is None else attn.norm_q(query).to(query.dtype)
        key = key if attn.norm_k is None else attn.norm_k(key).to(key.dtype)
        # Several queries' heads share one of keys and values.
        key, value = (part.repeat_interleave(attn.heads // part.shape[2], 2) for part in (key, value))
        return query, key, value


class ZImageProcessor(LuminaProcessor):
    """Z-Image's attention with weighted keys; else as ZSingleStreamAttnProcessor."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return LuminaProcessor.__call__(self, attn, hidden_states, None, attention_mask, freqs_cis)
