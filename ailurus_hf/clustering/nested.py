"""Clusters of clusters: a second reduction, whose clusters are made of whole clusters of the first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_num_clusters
from ..clusters import TokenClusters, stable_argsort
from ..precision import without_autocast
from .neighbors import DIRECT_DISTANCE_LIMIT, EQUALITY_TOLERANCE
from .peaks import density_peaks


@torch.no_grad()
def merge_clusters(
    clusters: TokenClusters,
    representatives: Tensor,
    tokens: Tensor,
    grid: tuple[int, ...],
    num_clusters: int,
    *,
    num_spatial_neighbors: int = 50,
    alpha: float = 0.9,
    num_density_neighbors: int = 1,
) -> TokenClusters:
    """Joins M clusters to fewer, by density peaks among representatives, each at its cluster's centroid on the grid.

    Ranks are by distance between centroids. All pairs of clusters are compared, in O(M²) memory.

    Args:
        clusters: of the grid's N tokens.
        representatives: Tensor[B, M, C], of the clusters.
        tokens: Tensor[B, N, C]; their distance to the representatives counts for the density.
        grid: of the N tokens.
        num_clusters: clusters to leave, in [1, M].
        num_spatial_neighbors, alpha, num_density_neighbors: as in `spatial_density_peaks`.

    Returns:
        TokenClusters of the N tokens: each of the old clusters lies in one new cluster, and counts add up. The new
        centers are centers of old clusters; None where those have none.

    Raises:
        AiluRusError: num_clusters is out of range.

    Example:
        >>> tokens = torch.randn(1, 6 * 8, 16)
        >>> first = spatial_density_peaks(tokens, (6, 8), 12)
        >>> merge_clusters(first, first.merge(tokens), tokens, (6, 8), 5).num_clusters
        5
    """
    channels = tokens.shape[2]
    count = clusters.num_clusters
    check_num_clusters(num_clusters, count)
    means = representatives.float()
    centroids = clusters.centroids(grid)

    itself = torch.eye(count, dtype=torch.bool, device=tokens.device)
    apart = _distances(centroids)
    lam = max(1, min(num_spatial_neighbors or count - 1, count - 1))
    near = stable_argsort(apart.masked_fill(itself, math.inf))[..., :lam]
    index, by_index = near.sort(dim=-1)
    sigma = _distances(means).gather(2, index) / math.sqrt(channels)
    s = (1 - alpha) * (by_index + 1) / lam + alpha if num_spatial_neighbors else 1.0

    # A mean of m tokens is as dense as they are: it has m - 1 neighbors at their mean distance from it.
    k = min(num_density_neighbors, lam)
    spread = torch.linalg.vector_norm(tokens.float() - clusters.unmerge(means), dim=-1, keepdim=True)
    spread = clusters.merge(spread) / math.sqrt(channels)
    others = torch.arange(k, device=tokens.device) < clusters.counts[..., None] - 1

    def nearest_center(no_center: Tensor) -> Tensor:
        return apart.masked_fill(no_center[:, None], math.inf).argmin(-1)

    own = spread.expand(-1, -1, k).masked_fill(~others, math.inf)
    joined = density_peaks(sigma * s, index, num_clusters, k, nearest_center, own)
    assert joined.centers is not None
    centers = None if clusters.centers is None else clusters.centers.gather(1, joined.centers)
    return TokenClusters.from_assignment(joined.assignment.gather(1, clusters.assignment), num_clusters, centers)


@without_autocast
def _distances(points: Tensor) -> Tensor:
    """Euclidean distances of all pairs, Tensor[B, M, C] to [B, M, M]; by products where many (see neighbors.py)."""
    if points.shape[1] ** 2 * points.shape[2] <= DIRECT_DISTANCE_LIMIT:
        return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    points = points - points.mean(1, keepdim=True)
    norms = points.square().sum(-1)
    scale = norms[:, :, None] + norms[:, None]
    squared = scale - 2 * points @ points.transpose(1, 2)
    return torch.where(squared <= EQUALITY_TOLERANCE * scale, 0.0, squared).sqrt()
