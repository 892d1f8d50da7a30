"""LTX-Video: tokens lie in frames, rows and columns; all heads together are rotated, each by angles of its own."""

from __future__ import annotations

from typing import Any

import torch

from ..clusters import TokenClusters
from ..errors import AiluRusError
from .calls import NetworkCall
from .grids import given_grid
from .rotary import Rotary
from .wan import WanProcessor

SIDES = ("num_frames", "height", "width")


class SidesGrid:
    """The sides that LTX is called with, which are of its tokens."""

    def __call__(self, call: NetworkCall) -> tuple[int, ...]:
        sides = [call.argument(name) for name in SIDES]
        if call.argument("video_coords") is not None or None in sides:
            raise AiluRusError(
                "video_coords place tokens anywhere, as conditions (LTXConditionPipeline), and here they have to "
                "be one grid: call the network with num_frames, height and width, as LTXPipeline does"
            )
        grid = tuple(int(side) for side in sides)
        given = given_grid(call, "attention_kwargs")
        if given is not None and given != grid:
            raise AiluRusError(f"grid in attention_kwargs must be (T, H, W), here {grid}, got {given}")
        return grid


def rotary_of_coordinates(call: NetworkCall, clusters: TokenClusters, grid: tuple[int, ...]) -> Rotary:
    """LTX's own embedding of each cluster's mean position, Tensor[B, M, heads, D] each."""
    network: Any = call.network
    rope = network.rope
    bases = (rope.base_num_frames, rope.base_height, rope.base_width)
    scales: Any = call.argument("rope_interpolation_scale")
    if scales is None:
        factors = list(bases)
    else:
        factors = [scale * patch for scale, patch in zip(scales, (rope.patch_size_t, rope.patch_size, rope.patch_size))]
    centroids = clusters.centroids(grid)
    coordinates = torch.stack([position * factor for position, factor in zip(centroids.unbind(-1), factors)], 1)
    cos, sin = rope(centroids, video_coords=coordinates)
    heads = (network.config.num_attention_heads, -1)
    return cos.unflatten(-1, heads), sin.unflatten(-1, heads)


class LTXProcessor(WanProcessor):
    """LTX's self-attention whose keys are weighted by how many tokens they stand for; else as LTXVideoAttnProcessor."""

    def by_token(self, attn: Any, embedding: Any) -> Rotary:
        """LTX gives Tensor[B, N, heads * D] twice."""
        cos, sin = embedding
        return cos.unflatten(-1, (attn.heads, -1)), sin.unflatten(-1, (attn.heads, -1))
