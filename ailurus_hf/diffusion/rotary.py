"""Rotary embeddings of representatives: a tensor of angles for each image of the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..clusters import TokenClusters

# cos and sin of each token's angles, Tensor[L, D] or [B, L, D] each, or [B, L, heads, D] where heads differ.
Rotary = tuple[Tensor, Tensor]


def rotated(tokens: Tensor, rotary: Rotary) -> Tensor:
    """Tensor[B, L, heads, D] rotated as diffusers' apply_rotary_emb does, which knows no batch of angles."""
    cos, sin = (part if part.ndim == 4 else part.unsqueeze(-2) for part in rotary)
    cos, sin = cos.to(tokens.device), sin.to(tokens.device)
    real, imaginary = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (tokens.float() * cos + turned.float() * sin).to(tokens.dtype)


def length(rotary: Rotary) -> int:
    """How many tokens an embedding is of."""
    return rotary[0].shape[-3 if rotary[0].ndim == 4 else -2]


def of_complex(factors: Tensor) -> Rotary:
    """From what pairs of channels are multiplied by as complex numbers, Tensor[..., D / 2]."""
    return factors.real.repeat_interleave(2, -1), factors.imag.repeat_interleave(2, -1)


def at_centroids(rotary: Rotary, clusters: TokenClusters, grid: tuple[int, ...]) -> Rotary:
    """The embedding of each cluster's mean position, Tensor[B, M, D] twice, from that of all tokens of a grid.

    Positions are even along each axis, and no angle grows by half a turn or more from a token to the next.

    Args:
        rotary: Tensor[N, D] or [B, N, D], twice.
    """
    cos, sin = (part.float() for part in rotary)

    def turn(index: int) -> Tensor:
        """The angles from the first token to another one."""
        across = cos[..., 0, :] * sin[..., index, :] - sin[..., 0, :] * cos[..., index, :]
        along = cos[..., 0, :] * cos[..., index, :] + sin[..., 0, :] * sin[..., index, :]
        return torch.atan2(across, along)

    angles = torch.atan2(sin[..., :1, :], cos[..., :1, :])
    centroids = clusters.centroids(grid)
    for axis, size in enumerate(grid):
        if size > 1:
            step = turn(math.prod(grid[axis + 1 :])).unsqueeze(-2)
            angles = angles + centroids[..., axis : axis + 1].to(step.device) * step
    angles = angles.expand(*clusters.counts.shape, -1)
    return angles.cos(), angles.sin()
