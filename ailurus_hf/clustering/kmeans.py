"""k-means: starts from one token of each cell of a regular grid; a token joins the most similar mean, wherever it is.

Not in the paper. Meant for self-attention alone, which sees the whole image: there, keys that are alike can be one even
if they are far apart, as in ToMe's matching for Stable Diffusion (Bolya and Hoffman 2023, arXiv 2303.17604).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_at_least
from ..clusters import TokenClusters
from ..grid_cache import grid_table
from ..precision import without_autocast
from .base import Clustering, register_clustering
from .local_kmeans import grid_cells, prepared
from .neighbors import Grid

# Pairs of a token and a mean that are compared at once: 64 MB of fp32 an image.
PAIRS_AT_ONCE = 2**24


@register_clustering("kmeans")
@dataclass(frozen=True)
class KMeans(Clustering):
    """Rounds of k-means over the whole image, by `kmeans`.

    Args:
        num_rounds: rounds of assignment, at least 1.

    Example:
        >>> config = AiluRusConfig(keep_ratio=0.5, clustering=KMeans(num_rounds=5))
    """

    num_rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, num_rounds=self.num_rounds)

    def cluster(self, features: Tensor, grid: Grid, num_clusters: int) -> TokenClusters:
        return kmeans(features, grid, num_clusters, num_rounds=self.num_rounds)


@torch.no_grad()
def kmeans(
    features: Tensor, grid: Sequence[int], num_clusters: int, *, num_rounds: int = 3, check_finite: bool = False
) -> TokenClusters:
    """Assigns each token to the most similar of M means, for a few rounds of N * M distances each.

    Source: Lloyd, Least squares quantization in PCM, 1982.

    Args:
        features: Tensor[B, N, C] of any float type; the arithmetic is fp32. No gradient flows through the choice.
        grid: (H, W), or (T, H, W) for video; its product is N.
        num_clusters: M, in [1, N]: the grid is divided into M cells, whose middle tokens are the first means.
        num_rounds: rounds of assignment.
        check_finite: raise on NaN or infinite features; this waits for the device.

    Returns:
        TokenClusters without centers; a cluster may end up empty: count 0, no weight in attention.

    Raises:
        AiluRusError: the grid does not match N, or a setting is out of range.

    Example:
        >>> clusters = kmeans(torch.randn(2, 6 * 8, 16), grid=(6, 8), num_clusters=12)
        >>> clusters.assignment.shape, clusters.num_clusters
        (torch.Size([2, 48]), 12)
    """
    features, grid = prepared(features, grid, num_clusters, num_rounds, check_finite)
    means = features[:, middles(grid, num_clusters, features.device)]
    clusters = TokenClusters.from_assignment(_nearest(features, means, None), num_clusters)
    for _ in range(num_rounds - 1):
        # A cluster without tokens has no mean.
        nearest = _nearest(features, clusters.merge(features), clusters.counts == 0)
        clusters = TokenClusters.from_assignment(nearest, num_clusters)
    return clusters


@without_autocast
def _nearest(features: Tensor, means: Tensor, empty: Tensor | None) -> Tensor:
    """The nearest of the means, Tensor[B, M, C], among those of clusters that are not empty: LongTensor[B, N]."""
    # |x|² is the same for all of a token's distances.
    norms = means.square().sum(-1)[:, None]
    norms = norms if empty is None else norms.masked_fill(empty[:, None], math.inf)
    rows = max(PAIRS_AT_ONCE // means.shape[1], 1)
    ends = means.transpose(1, 2)
    return torch.cat([torch.baddbmm(norms, part, ends, alpha=-2).argmin(-1) for part in features.split(rows, 1)], 1)


@grid_table
def middles(grid: Grid, num_cells: int, device: torch.device) -> Tensor:
    """The token nearest to the middle of each cell of `grid_cells`, the first of equal ones: LongTensor[M]."""
    start = grid_cells(grid, num_cells, torch.device("cpu")).start
    positions = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid)).double()
    cells = TokenClusters.from_assignment(start[None], num_cells)
    apart = torch.linalg.vector_norm(positions - cells.unmerge(cells.merge(positions[None]))[0], dim=-1)
    order = apart.argsort(stable=True)
    first = torch.full((num_cells,), len(start)).scatter_reduce(0, start[order], torch.arange(len(start)), "amin")
    return order[first].to(device)
