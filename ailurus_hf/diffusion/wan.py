"""Wan's video transformer on representatives: its tokens are frames, rows and columns, and attend to all of them.

As in joint.py, with other embeddings and no text in self-attention: tokens are clustered over space and time, and a
representative is rotated by its cluster's mean frame, row and column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..clusters import TokenClusters
from ..errors import AiluRusError
from .backend import WAN_PROCESSORS, wan_block_flops
from .joint import Arriving, JointProcessor, JointReducer, Rotary


class WanReducer(JointReducer):
    """What reduces one Wan transformer."""

    KWARGS = "attention_kwargs"
    PROCESSORS = WAN_PROCESSORS
    block_flops = staticmethod(wan_block_flops)

    def _new_processor(self) -> JointProcessor:
        return WanProcessor(self)

    def _pairs_halves(self, pipeline: Any, args: tuple, kwargs: dict) -> bool:
        # Guidance calls the network twice.
        return False

    def _grid(self, latents: Tensor, ids: Any, given: Any) -> tuple[int, ...]:
        patch = self.network.config.patch_size  # type: ignore[union-attr]
        grid = tuple(int(side) // int(size) for side, size in zip(latents.shape[-3:], patch))  # type: ignore[arg-type]
        if given is not None and tuple(given) != grid:
            raise AiluRusError(f"grid in attention_kwargs must be {grid}, got {tuple(given)}")
        return grid

    def _refuse_what_cannot_follow(self, given: dict, args: tuple, kwargs: dict) -> None:
        timestep = self.call.argument("timestep", args, kwargs)
        if isinstance(timestep, Tensor) and timestep.ndim > 1:
            raise AiluRusError(
                f"a timestep for each token, {tuple(timestep.shape)}, cannot follow merged tokens: give one a video, "
                f"({timestep.shape[0]},), as Wan 2.1 and the 14B models of Wan 2.2 take it"
            )
        super()._refuse_what_cannot_follow(given, args, kwargs)

    def _rotary(self, clusters: TokenClusters, arriving: Arriving) -> Rotary:
        """cos and sin at each cluster's mean frame, row and column, Tensor[B, M, D] each."""
        rope: Any = self.network.rope
        device = clusters.assignment.device
        # Asked for two places a side, the last token is at place 1 of each. Its angles are at most 1, so cosine and sine
        # tell them; those of place p are p times as much.
        cos, sin = rope(torch.empty((1, 1, *(2 * size for size in rope.patch_size)), device=device))
        step = torch.atan2(sin[0, -1, 0], cos[0, -1, 0])
        widths = (rope.t_dim, rope.h_dim, rope.w_dim)
        along = [
            place.expand(-1, -1, width)
            for place, width in zip(clusters.centroids(arriving.grid).split(1, -1), widths, strict=True)
        ]
        angles = torch.cat(along, -1) * step
        return angles.cos(), angles.sin()


class WanProcessor(JointProcessor):
    """Wan's self-attention whose keys are weighted by how many tokens they stand for; else as WanAttnProcessor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        grid: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """image_rotary_emb: Tensor[1, N, 1, D] twice, given by its place."""
        rotary = None if image_rotary_emb is None else (image_rotary_emb[0].squeeze(2), image_rotary_emb[1].squeeze(2))
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)

    def _projected(self, attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        parts = (attn.norm_q(attn.to_q(image)), attn.norm_k(attn.to_k(image)), attn.to_v(image))
        return tuple(part.unflatten(2, (attn.heads, -1)) for part in parts)
