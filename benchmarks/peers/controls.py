"""Controls for the ways of clustering: the same number of clusters, chosen without looking (much) at the image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ailurus_hf import TokenClusters
from ailurus_hf.clustering.local_kmeans import grid_cells
from ailurus_hf.clustering.neighbors import grid_neighbors, nearest_unmasked, neighbor_distances


def grid_pooling(tokens: Tensor, grid: tuple[int, ...], num_clusters: int) -> TokenClusters:
    """Equal cells of a regular grid, whatever the image."""
    start = grid_cells(grid, num_clusters, tokens.device).start
    return TokenClusters.from_assignment(start.expand(tokens.shape[0], -1), num_clusters)


@torch.no_grad()
def random_centers(tokens: Tensor, grid: tuple[int, ...], num_clusters: int) -> TokenClusters:
    """M tokens drawn at random, the same for every image."""
    drawn = torch.randperm(math.prod(grid), generator=torch.Generator().manual_seed(0))[:num_clusters].sort().values
    return to_nearest_center(tokens, grid, drawn.to(tokens.device).expand(tokens.shape[0], -1))


@torch.no_grad()
def to_nearest_center(tokens: Tensor, grid: tuple[int, ...], centers: Tensor) -> TokenClusters:
    """A token goes to the most similar center near it (Eq. 2 distances). centers: LongTensor[B, M], ascending."""
    batch, count = tokens.shape[:2]
    is_center = torch.zeros(batch, count, dtype=torch.bool, device=tokens.device).scatter(1, centers, True)
    neighbors = grid_neighbors(grid, 50, tokens.device)
    near = is_center[:, neighbors.index]
    weighted = neighbor_distances(tokens.float(), neighbors) * (0.1 * neighbors.rank / neighbors.rank.shape[1] + 0.9)
    best = weighted.masked_fill(~near, math.inf).argmin(-1, keepdim=True)
    chosen = neighbors.index.expand(batch, -1, -1).gather(2, best).squeeze(-1)
    itself = torch.arange(count, device=tokens.device).expand(batch, -1)
    owner = torch.where(near.any(-1), chosen, nearest_unmasked(~is_center, grid))
    owner = torch.where(is_center, itself, owner)
    return TokenClusters.from_assignment((is_center.long().cumsum(1) - 1).gather(1, owner), centers.shape[1], centers)
