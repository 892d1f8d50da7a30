"""Clusters of a network's tokens: compared in few channels, and for the halves of guidance in their mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..clustering import ClusterFunction
from ..clusters import TokenClusters
from ..errors import AiluRusError
from ..grid_cache import grid_table
from ..precision import without_autocast
from .frames import Frames, JointClusters

# Tokens are compared in this many random directions: distances survive that, and it costs a fifth of 320 channels.
COMPARED_CHANNELS = 64


@torch.no_grad()
def cluster_tokens(
    clustering: ClusterFunction, tokens: Tensor, grid: tuple[int, ...], num_clusters: int, share_halves: bool = False
) -> TokenClusters:
    """Clusters of Tensor[B, N, C]; share_halves: both halves of the batch get those of their mean."""
    features = tokens
    if tokens.shape[2] > COMPARED_CHANNELS:
        features = _projected(tokens.float())
    if not share_halves:
        return clustering(features, grid, num_clusters)
    first, second = features.chunk(2)
    shared = clustering((first + second) / 2, grid, num_clusters)
    centers = None if shared.centers is None else shared.centers.repeat(2, 1)
    return TokenClusters(shared.assignment.repeat(2, 1), centers, shared.counts.repeat(2, 1))


def cluster_videos(
    clustering: ClusterFunction,
    frames: Frames,
    tokens: Tensor,
    grid: tuple[int, ...],
    num_clusters: int,
    share_halves: bool = False,
) -> JointClusters:
    """Clusters over space and time of Tensor[B, N, C]: `num_clusters` times the number of frames, for each video."""
    count, videos = frames.count, frames.videos(tokens.shape[0])
    if share_halves and videos % 2:
        raise AiluRusError(f"share_cfg takes a batch as two halves, but it has {videos} videos of {count} frames")
    joined = tokens.reshape(videos, -1, tokens.shape[2])
    return JointClusters(cluster_tokens(clustering, joined, (count, *grid), count * num_clusters, share_halves), count)


@without_autocast
def _projected(tokens: Tensor) -> Tensor:
    """Tensor[B, N, C] in fewer channels, about as far from one another."""
    return tokens @ directions(tokens.shape[2], COMPARED_CHANNELS, tokens.device)


@grid_table
def directions(channels: int, number: int, device: torch.device) -> Tensor:
    """The same random directions in every process: Tensor[channels, number]."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(channels, number, generator=generator) / math.sqrt(number)).to(device)
