"""Spatial-aware density-peak clustering: the paper's way to pick M representatives (AiluRus, section 3.2, Eq. 1-3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_density_peaks
from ..clusters import TokenClusters
from ..profiling import recorded
from .all_pairs import all_pairs, pairwise_distances, prefers_all_pairs
from .base import Clustering, register_clustering
from .neighbors import Grid, check_input, grid_neighbors, nearest_unmasked, neighbor_distances
from .nested import merge_clusters
from .peaks import density_peaks

__all__ = ["DensityPeaks", "density_peaks", "spatial_density_peaks"]


@register_clustering("density_peaks")
@dataclass(frozen=True)
class DensityPeaks(Clustering):
    """The paper's clustering, by `spatial_density_peaks`; the defaults are the paper's settings (section 3.2).

    Args:
        alpha: α of Eq. 2, in [0, 1]: how much a near neighbor's distance is discounted (1: not at all).
        num_spatial_neighbors: λ of Eq. 2; 0 compares all pairs without a spatial term, in O(N²) memory.
        num_density_neighbors: k of Eq. 1, at least 1.

    Example:
        >>> config = AiluRusConfig(keep_ratio=0.5, clustering=DensityPeaks(alpha=0.8))
    """

    alpha: float = 0.9
    num_spatial_neighbors: int = 50
    num_density_neighbors: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density_peaks(self.num_spatial_neighbors, self.alpha, self.num_density_neighbors)

    def cluster(self, features: Tensor, grid: Grid, num_clusters: int) -> TokenClusters:
        return spatial_density_peaks(features, grid, num_clusters, **self._settings())

    def join(
        self, clusters: TokenClusters, representatives: Tensor, tokens: Tensor, grid: Grid, num_clusters: int
    ) -> TokenClusters:
        """By density peaks among representatives, with its own settings."""
        given = clusters, representatives, tokens, grid, num_clusters
        return recorded("ailurus::cluster", merge_clusters, *given, **self._settings())

    def _settings(self) -> dict[str, Any]:
        # Written out: not every torch.compile can read the fields of a frozen dataclass (torch 2.11 cannot).
        return {
            "alpha": self.alpha,
            "num_spatial_neighbors": self.num_spatial_neighbors,
            "num_density_neighbors": self.num_density_neighbors,
        }


@torch.no_grad()
def spatial_density_peaks(
    features: Tensor,
    grid: Sequence[int],
    num_clusters: int,
    *,
    num_spatial_neighbors: int = 50,
    alpha: float = 0.9,
    num_density_neighbors: int = 1,
    check_finite: bool = False,
) -> TokenClusters:
    """Picks the M density peaks of a token grid and assigns every token to one of them (AiluRus, section 3.2, Eq. 1-3).

    Args:
        features: Tensor[B, N, C] of any float type; the arithmetic is fp32. No gradient flows through the choice.
        grid: (H, W), or (T, H, W) for video; its product is N.
        num_clusters: M, in [1, N].
        num_spatial_neighbors: λ of Eq. 2, clipped to N - 1. 0 compares all pairs without a spatial term, in O(N²)
            memory.
        alpha: α of Eq. 2, in [0, 1]: how much a near neighbor's distance is discounted (1: not at all).
        num_density_neighbors: k of Eq. 1, clipped to the number of neighbors.
        check_finite: raise on NaN or infinite features; this waits for the device. Without it they give arbitrary
            clusters.

    Returns:
        TokenClusters with centers in ascending token order. Equal values resolve to the lower token index.

    Raises:
        AiluRusError: the grid does not match N, or a setting is out of range.

    Example:
        >>> features = torch.randn(2, 24 * 32, 64)
        >>> clusters = spatial_density_peaks(features, grid=(24, 32), num_clusters=192)
        >>> clusters.merge(features).shape
        torch.Size([2, 192, 64])
    """
    check_density_peaks(num_spatial_neighbors, alpha, num_density_neighbors)
    grid = check_input(features, grid, num_clusters, check_finite)
    batch, tokens, channels = features.shape
    if num_clusters == tokens:
        every = torch.arange(tokens, device=features.device).expand(batch, -1)
        return TokenClusters(every, every, torch.ones(batch, tokens, device=features.device))

    # λ = 0 compares all pairs, without a spatial term.
    lam = min(num_spatial_neighbors or tokens - 1, tokens - 1)
    discount = alpha if num_spatial_neighbors else 1.0
    k = min(num_density_neighbors, lam)
    if prefers_all_pairs(tokens * tokens, features.device):
        pairs = all_pairs(grid, lam, discount, features.device)
        sigma = pairwise_distances(features.float()) / math.sqrt(channels)
        weighted = (sigma * pairs.weight).masked_fill(pairs.is_no_neighbor, math.inf)
        return density_peaks(weighted, None, num_clusters, k, pairs.nearest_unmasked)
    neighbors = grid_neighbors(grid, lam, features.device)
    s = (1 - discount) * neighbors.rank / lam + discount  # Eq. 2
    sigma = neighbor_distances(features.float(), neighbors) / math.sqrt(channels)
    index = neighbors.index.expand(batch, -1, -1)
    return density_peaks(sigma * s, index, num_clusters, k, lambda no_center: nearest_unmasked(no_center, grid))
