"""Qwen-Image: text first, both rotated by complex factors, text padded under a mask of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import AiluRusError
from .calls import NetworkCall
from .joint import JointProcessor
from .rotary import Rotary, of_complex


class ShapesGrid:
    """The rows and columns in `img_shapes`: [(frames, rows, columns)] for each image of the batch."""

    def __call__(self, call: NetworkCall) -> tuple[int, ...]:
        shapes: Any = call.argument("img_shapes")
        of_first = shapes[0] if isinstance(shapes, list) else shapes
        of_first = of_first if isinstance(of_first, list) else [of_first]
        if len(of_first) != 1 or of_first[0][0] != 1:
            raise AiluRusError(
                f"img_shapes must be of one image, got {of_first}: reference images and layers beside it cannot be "
                "reduced"
            )
        _, height, width = of_first[0]
        return int(height), int(width)


class QwenProcessor(JointProcessor):
    """Qwen-Image's joint attention with weighted keys; else as QwenDoubleStreamAttnProcessor2_0."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        grid: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if encoder_hidden_states_mask is not None:
            image = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2])
            attention_mask = torch.cat([encoder_hidden_states_mask, image], 1)
        return JointProcessor.__call__(
            self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
        )

    def by_token(self, attn: Any, embedding: Any) -> Rotary:
        """Qwen gives the image's complex factors and the text's, Tensor[L, D / 2] each."""
        image, text = embedding
        return of_complex(torch.cat([text, image]))
