"""Ward's clustering on the grid graph, in rounds: adjacent clusters are joined where that adds least variance.

Not in the paper. The clusters are regions of any shape and size, with less variance inside than those of density peaks
and local k-means; it takes some ten rounds, together about twice as long as density peaks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_num_clusters
from ..clusters import TokenClusters, stable_argsort
from ..grid_cache import grid_table
from ..profiling import recorded
from .base import Clustering, register_clustering
from .boruvka import merged, united
from .neighbors import Grid, check_input, chunk_length

# A round makes at most this share of the unions that are left: less is nearer to Ward, and slower.
SHARE = 0.35
# A round makes at least as many unions as this share of M.
LEAST_SHARE = 0.05
# Repeated edges are removed, by two sorts, where less than this share is left.
MUCH_FEWER = 0.8


@register_clustering("ward")
@dataclass(frozen=True)
class Ward(Clustering):
    """Joins adjacent clusters by Ward's criterion, by `ward`.

    Example:
        >>> config = AiluRusConfig(keep_ratio=0.5, clustering=Ward())
    """

    def cluster(self, features: Tensor, grid: Grid, num_clusters: int) -> TokenClusters:
        return ward(features, grid, num_clusters)

    def join(
        self, clusters: TokenClusters, representatives: Tensor, tokens: Tensor, grid: Grid, num_clusters: int
    ) -> TokenClusters:
        """In the same way, by `join_regions`."""
        return recorded("ailurus::cluster", join_regions, clusters, representatives, tokens, grid, num_clusters)


@torch.no_grad()
def ward(features: Tensor, grid: Sequence[int], num_clusters: int, *, check_finite: bool = False) -> TokenClusters:
    """Joins adjacent clusters, from single tokens to M, by Ward's criterion (J. H. Ward, 1963).

    In a round, every cluster has an edge to the adjacent one that is cheapest to join; an edge costs four times as much
    where it is not the cheapest at its other end, too. The cheapest edges are joined. Joining pairs that are each
    other's cheapest, in any order, leads to the same tree as joining the cheapest pair of all each time, so the result
    is near to that.

    Args:
        features: Tensor[B, N, C] of any float type; the arithmetic is fp32. No gradient flows through the choice.
        grid: (H, W), or (T, H, W) for video; its product is N. Tokens side by side on it are adjacent.
        num_clusters: M, in [1, N].
        check_finite: raise on NaN or infinite features; this waits for the device.

    Returns:
        TokenClusters without centers; none is empty.

    Raises:
        AiluRusError: the grid does not match N, or M is out of range.

    Example:
        >>> clusters = ward(torch.randn(2, 6 * 8, 16), grid=(6, 8), num_clusters=12)
        >>> clusters.assignment.shape, clusters.num_clusters
        (torch.Size([2, 48]), 12)
    """
    grid = check_input(features, grid, num_clusters, check_finite)
    sizes = torch.ones(features.shape[:2], device=features.device)
    itself = torch.arange(math.prod(grid), device=features.device).expand(features.shape[:2])
    assignment = _joined(features.float(), sizes, itself, adjacent_clusters(itself, grid), grid, num_clusters)
    return TokenClusters.from_assignment(assignment, num_clusters)


@torch.no_grad()
def join_regions(
    clusters: TokenClusters, representatives: Tensor, tokens: Tensor, grid: Grid, num_clusters: int
) -> TokenClusters:
    """Joins M clusters to fewer in the same way as `ward`, by their representatives.

    Args:
        clusters: of the grid's N tokens, made by any clustering; empty ones join whatever comes first.
        representatives: Tensor[B, M, C], of the clusters.
        tokens: not used.
        grid: of the N tokens.
        num_clusters: clusters to leave, in [1, M].

    Returns:
        TokenClusters of the N tokens: each of the old clusters lies in one new cluster.

    Example:
        >>> tokens = torch.randn(1, 6 * 8, 16)
        >>> first = ward(tokens, (6, 8), 12)
        >>> join_regions(first, first.merge(tokens), tokens, (6, 8), 5).num_clusters
        5
    """
    check_num_clusters(num_clusters, clusters.num_clusters)
    edges = torch.cat([adjacent_clusters(clusters.assignment, grid), _edges_of_empty(clusters.counts)], 1)
    assignment = _joined(representatives.float(), clusters.counts, clusters.assignment, edges, grid, num_clusters)
    return TokenClusters.from_assignment(assignment, num_clusters)


@grid_table
def _next_tokens(grid: Grid, device: torch.device) -> Tensor:
    """The next token along each axis of the grid, LongTensor[N, axes]; the token itself where there is none."""
    tokens = torch.arange(math.prod(grid)).view(grid)
    following = [
        tokens.index_select(axis, torch.arange(1, side + 1).clamp(max=side - 1)) for axis, side in enumerate(grid)
    ]
    return torch.stack(following, -1).flatten(0, -2).to(device)


def adjacent_clusters(owner: Tensor, grid: Grid) -> Tensor:
    """Pairs of adjacent clusters, LongTensor[B, P, 2], from each token's cluster, LongTensor[B, N]; some are loops."""
    following = _next_tokens(grid, owner.device)
    there = owner[:, following.flatten()].unflatten(1, following.shape)
    return torch.stack([owner[..., None].expand_as(there), there], -1).flatten(1, 2)


def _edges_of_empty(counts: Tensor) -> Tensor:
    """Empty clusters touch none: edges to the next and the previous number, LongTensor[B, M - 1, 2]; the rest loops."""
    number = torch.arange(counts.shape[1], device=counts.device).expand(counts.shape)
    is_empty = counts == 0
    following = torch.where(is_empty[:, :-1] | is_empty[:, 1:], number[:, 1:], number[:, :-1])
    return torch.stack([number[:, :-1], following], -1)


def _joined(means: Tensor, sizes: Tensor, owner: Tensor, edges: Tensor, grid: Grid, num_clusters: int) -> Tensor:
    """The new cluster of each token, LongTensor[B, N].

    Args:
        means, sizes: of the old clusters, Tensor[B, n, C] and Tensor[B, n].
        owner: the old cluster of each token, LongTensor[B, N].
        edges: pairs of old clusters that may join, LongTensor[B, P, 2]; loops say nothing.
    """
    # Relative to the image's mean, for precision.
    means = means - means.mean(1, keepdim=True)
    count = means.shape[1]
    is_planar = sum(side > 1 for side in grid) <= 2
    for unions in _rounds(count, num_clusters, SHARE, LEAST_SHARE):
        # A planar graph has fewer than three edges a cluster, and any graph at most one a pair.
        most = min(3 * count if is_planar else edges.shape[1], count * (count - 1) // 2)
        if most < MUCH_FEWER * edges.shape[1]:
            edges = _distinct(edges, count)[:, :most]
        step = united(*_cheapest(means, sizes, edges), unions)
        owner, count = step.gather(1, owner), count - unions
        if count > num_clusters:
            means, sizes = merged(means, sizes, step, count)
            edges = step.gather(1, edges.flatten(1)).view(edges.shape)
    return owner


@grid_table
def _rounds(count: int, num_clusters: int, share: float, least_share: float) -> tuple[int, ...]:
    """How many unions each round makes, from `count` clusters to M."""
    rounds = []
    while count > num_clusters:
        to_go = count - num_clusters
        rounds.append(min(max(int(to_go * share), int(num_clusters * least_share), 1), to_go, count // 2))
        count -= rounds[-1]
    return tuple(rounds)


def _distinct(edges: Tensor, count: int) -> Tensor:
    """Each edge of LongTensor[B, P, 2] once, lower end first; then an edge from 0 to 0 for each repetition or loop."""
    lower, higher = edges.amin(2), edges.amax(2)
    code = torch.where(lower == higher, count * count, lower * count + higher).sort(1).values
    repeated = torch.nn.functional.pad(code[:, 1:] == code[:, :-1], (1, 0))
    code = code.masked_fill(repeated, count * count).sort(1).values
    return torch.stack([code // count % count, code % count], 2)


def _cheapest(means: Tensor, sizes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The adjacent cluster that is cheapest to join: the cost, Tensor[B, n], and its number, LongTensor[B, n]."""
    batch, count, _ = means.shape
    a, b = edges.unbind(2)
    size_a, size_b = sizes.gather(1, a), sizes.gather(1, b)
    squared = _squared_distances(means, a, b)
    cost = (squared * (size_a * size_b / (size_a + size_b))).nan_to_num(torch.finfo(means.dtype).max)
    cost = cost.masked_fill(a == b, torch.inf)
    # By rank, so that no two edges cost the same and the cheapest ones make no cycle.
    order = stable_argsort(cost)
    rank = torch.empty_like(order).scatter(1, order, torch.arange(a.shape[1], device=a.device).expand_as(order))
    cheapest = torch.full((batch, count), a.shape[1] - 1, device=a.device)
    cheapest = cheapest.scatter_reduce(1, a, rank, "amin").scatter_reduce(1, b, rank, "amin")
    edge = order.gather(1, cheapest)
    partner = a.gather(1, edge) + b.gather(1, edge) - torch.arange(count, device=a.device)
    return cost.gather(1, edge), partner


def _squared_distances(means: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Squared distances between rows a and b, LongTensor[B, P] each, of Tensor[B, n, C]: Tensor[B, P]."""
    batch, _, channels = means.shape
    # A compiler gathers and sums in one kernel, and stores no row.
    compiles = torch.compiler.is_compiling()
    at_once = a.shape[1] if compiles else chunk_length(2 * means.element_size() * batch * channels, means.device)
    ends = zip(a.split(at_once, 1), b.split(at_once, 1), strict=True)
    return torch.cat([_rows(means, i).sub_(_rows(means, j)).square_().sum(-1) for i, j in ends], 1)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of each image's table: Tensor[B, n, C] at LongTensor[B, P] to [B, P, C]."""
    batch, count, channels = table.shape
    flat = index + torch.arange(batch, device=index.device)[:, None] * count
    return table.reshape(-1, channels).index_select(0, flat.flatten()).view(batch, -1, channels)
