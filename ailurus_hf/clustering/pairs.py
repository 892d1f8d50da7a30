"""Pairs: joins the clusters that are cheapest to join, wherever they are on the grid, at most half of them in a round.

Not in the paper. Meant for classification, whose head reads the image as a whole, and for several small reductions in a
row: what is unlike all else stays alone, as in ToMe (Bolya et al. 2023, arXiv 2210.09461) and with Ward's criterion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_num_clusters
from ..clusters import TokenClusters
from ..precision import without_autocast
from ..profiling import recorded
from .base import Clustering, register_clustering
from .boruvka import merged, united
from .neighbors import Grid, check_input

# Clusters along a side of a tile of costs: 1 MB in fp32 on a CPU, where more leaves the cache, 64 MB elsewhere, where
# launches count.
SMALL_TILE, TILE = 512, 4096

# What joining each cluster's partner costs, Tensor[B, n], and which that is, LongTensor[B, n].
Partners = tuple[Tensor, Tensor]
# Clusters along a side of a tile: their means, Tensor[B, n, C], squared norms, and 1 / size, both Tensor[B, n].
Side = tuple[Tensor, Tensor, Tensor]


@register_clustering("pairs")
@dataclass(frozen=True)
class Pairs(Clustering):
    """Joins what is cheapest to join, wherever it is on the grid, by `pairs`.

    Example:
        >>> config = AiluRusConfig(keep_ratio=0.5, clustering=Pairs())
    """

    def cluster(self, features: Tensor, grid: Grid, num_clusters: int) -> TokenClusters:
        return pairs(features, grid, num_clusters)

    def join(
        self, clusters: TokenClusters, representatives: Tensor, tokens: Tensor, grid: Grid, num_clusters: int
    ) -> TokenClusters:
        """In the same way, by `join_clusters`."""
        return recorded("ailurus::cluster", join_clusters, clusters, representatives, tokens, grid, num_clusters)


@torch.no_grad()
def pairs(features: Tensor, grid: Sequence[int], num_clusters: int, *, check_finite: bool = False) -> TokenClusters:
    """Joins tokens to the ones that are cheapest to join, cheapest first, in rounds until M clusters are left.

    Joining clusters of means a and b and of m and n tokens costs |a - b|² * sqrt(m n / (m + n)). All pairs are
    compared, in tiles, so that memory does not grow as N² does.

    Args:
        features: Tensor[B, N, C] of any float type; the arithmetic is fp32. No gradient flows through the choice.
        grid: (H, W), or (T, H, W) for video; its product is N. Positions on it do not matter.
        num_clusters: M, in [1, N]. One round is enough for half of the tokens.
        check_finite: raise on NaN or infinite features; this waits for the device.

    Returns:
        TokenClusters without centers; none is empty.

    Raises:
        AiluRusError: the grid does not match N, or M is out of range.

    Example:
        >>> clusters = pairs(torch.randn(2, 6 * 8, 16), grid=(6, 8), num_clusters=12)
        >>> clusters.assignment.shape, clusters.num_clusters
        (torch.Size([2, 48]), 12)
    """
    check_input(features, grid, num_clusters, check_finite)
    sizes = torch.ones(features.shape[:2], device=features.device)
    return TokenClusters.from_assignment(_joined(features.float(), sizes, num_clusters), num_clusters)


@torch.no_grad()
def join_clusters(
    clusters: TokenClusters, representatives: Tensor, tokens: Tensor, grid: Grid, num_clusters: int
) -> TokenClusters:
    """Joins M clusters to fewer in the same way, by their representatives; tokens and grid do not matter.

    Args:
        clusters: of the grid's N tokens. Empty ones cost nothing to join.
        representatives: Tensor[B, M, C], of the clusters.
        tokens, grid: not used.
        num_clusters: clusters to leave, in [1, M].

    Returns:
        TokenClusters of the N tokens: each of the old clusters lies in one new cluster.

    Example:
        >>> tokens = torch.randn(1, 6 * 8, 16)
        >>> first = ward(tokens, (6, 8), 12)
        >>> join_clusters(first, first.merge(tokens), tokens, (6, 8), 5).num_clusters
        5
    """
    check_num_clusters(num_clusters, clusters.num_clusters)
    joined = _joined(representatives.float(), clusters.counts, num_clusters)
    return TokenClusters.from_assignment(joined.gather(1, clusters.assignment), num_clusters)


def _joined(means: Tensor, sizes: Tensor, num_clusters: int) -> Tensor:
    """The new cluster of each of Tensor[B, n, C] that stands for `sizes` tokens: LongTensor[B, n]."""
    # Relative to the image's mean, for precision.
    means = means - means.mean(1, keepdim=True)
    count = means.shape[1]
    assignment = torch.arange(count, device=means.device).expand(means.shape[:2])
    while count > num_clusters:
        # Edges to cheapest partners are at least half as many as the clusters, and make no cycle.
        left = max(num_clusters, count - count // 2)
        cost, partner = _cheapest(means, sizes)
        step = united(cost, partner, count - left)
        assignment, count = step.gather(1, assignment), left
        if count > num_clusters:
            means, sizes = merged(means, sizes, step, count)
    return assignment


@without_autocast
def _cheapest(means: Tensor, sizes: Tensor) -> Partners:
    """Each cluster's cheapest partner, the lower at ties."""
    small = means.device.type == "cpu" and not torch.compiler.is_compiling()
    # As wide for one image as for many, or a batch would round otherwise.
    width = SMALL_TILE if small else TILE
    parts = (each.split(width, 1) for each in (means, means.square().sum(-1), 1 / sizes))
    tiles: list[Side] = list(zip(*parts, strict=True))
    found: list[Partners | None] = [None] * len(tiles)
    for row, rows in enumerate(tiles):
        for column, columns in enumerate(tiles[row:], start=row):
            # One cost for both, or rounding could make three clusters each other's cheapest in a cycle.
            cost = _costs(rows, columns)
            found[row] = _cheaper(found[row], cost.min(2), column * width)
            if row != column:
                found[column] = _cheaper(found[column], cost.min(1), row * width)
    costs, partners = zip(*(each for each in found if each is not None), strict=True)
    return (costs[0], partners[0]) if len(tiles) == 1 else (torch.cat(costs, 1), torch.cat(partners, 1))


def _cheaper(before: Partners | None, found: Partners, first: int) -> Partners:
    """Of the partners before and those found now, which are counted from `first` on; those before at ties."""
    cost, partner = found
    partner = partner + first if first else partner
    if before is None:
        return cost, partner
    wins = cost < before[0]
    return torch.where(wins, cost, before[0]), torch.where(wins, partner, before[1])


def _costs(rows: Side, columns: Side) -> Tensor:
    """The cost of joining any two clusters of a tile, Tensor[B, r, c]: 0 with an empty one.

    Of clusters with themselves it is exactly symmetric, and infinite for one with itself.
    """
    (means, norms, inverse), (others, other_norms, other_inverse) = rows, columns
    scale = norms[:, :, None] + other_norms[:, None]
    squared = torch.baddbmm(scale, means, others.transpose(1, 2), alpha=-2).clamp_min(0)
    if rows is columns:
        squared = torch.minimum(squared, squared.transpose(1, 2))
    cost = squared * (inverse[:, :, None] + other_inverse[:, None]).rsqrt()
    # NaN is dearest.
    cost = cost.nan_to_num(torch.finfo(cost.dtype).max)
    if rows is not columns:
        return cost
    number = torch.arange(cost.shape[1], device=cost.device)
    return cost.masked_fill(number[:, None] == number, torch.inf)
