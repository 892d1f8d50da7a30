"""Qwen-Image: text first, both rotated by complex factors, text padded under a mask of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import AiluRusError
from .calls import NetworkCall
from .joint import JointProcessor
from .rotary import Rotary, of_complex


class ShapesGrid:
    """The rows and columns in `img_shapes`: [(frames, rows, columns)] for each image of the batch.

    Args:
        references: whether those of reference images may follow.
    """

    def __init__(self, references: bool = False) -> None:
        self.references = references

    def __call__(self, call: NetworkCall) -> tuple[int, ...]:
        shapes: Any = call.argument("img_shapes")
        of_each = shapes if isinstance(shapes, list) else [shapes]
        of_each = [each if isinstance(each, list) else [each] for each in of_each]
        of_first, num_tokens = of_each[0], call.latents.shape[1]
        if any(each != of_first for each in of_each):
            raise AiluRusError(f"img_shapes must be the same for all images of a batch, got {of_each}")
        if of_first[0][0] != 1 or (len(of_first) > 1 and not self.references):
            raise AiluRusError(f"img_shapes must be of one image, got {of_first}")
        if (told := sum(math.prod(shape) for shape in of_first)) != num_tokens:
            raise AiluRusError(f"img_shapes {of_first} have {told} tokens, but the network is called with {num_tokens}")
        network: Any = call.network
        if len(of_first) > 1 and getattr(network.config, "use_layer3d_rope", False):
            raise AiluRusError(
                f"img_shapes {of_first} are of the layers of one picture, which are made together and are no one grid"
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
