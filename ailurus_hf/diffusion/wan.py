"""Wan's video transformer, and SkyReels-V2's, which is made from it: tokens lie in frames, rows and columns, attend to
all, and are rotated by all three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..clusters import TokenClusters
from .calls import NetworkCall
from .joint import JointProcessor
from .rotary import Rotary


def rotary_of_centroids(call: NetworkCall, clusters: TokenClusters, grid: tuple[int, ...]) -> Rotary:
    """cos and sin at each cluster's mean frame, row and column, Tensor[B, M, D] each."""
    rope: Any = call.network.rope
    device = clusters.assignment.device
    # Asked for two positions a side, the last token is at position 1 of each. Its angles are at most 1, so cosine and
    # sine tell them; those of position p are p times as much.
    cos, sin = rope(torch.empty((1, 1, *(2 * size for size in rope.patch_size)), device=device))
    step = torch.atan2(sin[0, -1, 0], cos[0, -1, 0])
    widths = (rope.t_dim, rope.h_dim, rope.w_dim)
    along = [
        position.expand(-1, -1, width)
        for position, width in zip(clusters.centroids(grid).split(1, -1), widths, strict=True)
    ]
    angles = torch.cat(along, -1) * step
    return angles.cos(), angles.sin()


class WanProcessor(JointProcessor):
    """Wan's self-attention whose keys are weighted by how many tokens they stand for; else as WanAttnProcessor."""

    def by_token(self, attn: Any, embedding: Any) -> Rotary:
        """Wan gives Tensor[1, N, 1, D] twice."""
        cos, sin = embedding
        return cos.squeeze(2), sin.squeeze(2)

    def _projected(self, attn: Any, image: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        parts = (attn.norm_q(attn.to_q(image)), attn.norm_k(attn.to_k(image)), attn.to_v(image))
        return tuple(part.unflatten(2, (attn.heads, -1)) for part in parts)
