"""Ward's clustering on the grid graph, in rounds: adjacent clusters are joined where that adds least variance.

Not in the paper. The clusters are regions of any shape and size, with less variance inside than those of density peaks
and local k-means. Few rounds join many pairs each; then tokens at borders move to where they are nearer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_num_clusters
from ..clusters import TokenClusters
from ..exporting import takes_operators
from ..grid_cache import constant, grid_table
from ..profiling import recorded
from .all_pairs import prefers_all_pairs
from .base import Clustering, register_clustering
from .moving import moved, moved_all_pairs
from .neighbors import Grid, check_input
from .ward_all_pairs import joined_all_pairs
from .ward_edges import adjacent_clusters, edges_of_empty, joined_along_edges, touching, touching_tokens

# A round makes at most this share of the unions that are left: less is nearer to Ward, and slower.
SHARE = 0.75
# A round makes at least as many unions as this share of M.
LEAST_SHARE = 1 / 3
# Where clusters join, and no token moves afterwards, rounds are smaller.
SHARE_OF_CLUSTERS, LEAST_SHARE_OF_CLUSTERS = 0.35, 0.05
# How often tokens move to the most similar cluster around them.
MOVES = 2
# Tokens that an empty cluster counts as where a size divides.
SIZE_OF_EMPTY = 1e-6
# Larger numbers are cut off, and NaN is 0: squares of all stay finite, so whatever comes in, clusters come out.
LARGEST = 1e15


@register_clustering("ward")
@dataclass(frozen=True)
class Ward(Clustering):
    """Joins adjacent clusters by Ward's criterion, by `ward`.

    Example:
        >>> config = AiluRusConfig(keep_ratio=0.5, clustering=Ward())
    """

    def cluster(self, features: Tensor, grid: Grid, num_clusters: int) -> TokenClusters:
        if not _is_one_operator(features):
            return ward(features, grid, num_clusters)
        assignment, counts = _ward(features.detach(), grid, num_clusters)
        return TokenClusters(assignment, None, counts)

    def join(
        self, clusters: TokenClusters, representatives: Tensor, tokens: Tensor, grid: Grid, num_clusters: int
    ) -> TokenClusters:
        """In the same way, by `join_regions`."""
        if not _is_one_operator(representatives):
            return recorded("ailurus::cluster", join_regions, clusters, representatives, tokens, grid, num_clusters)
        given = clusters.assignment, clusters.counts, representatives.detach()
        assignment, counts = _join_regions(*given, grid, num_clusters)
        return TokenClusters(assignment, None, counts)


@torch.no_grad()
def ward(features: Tensor, grid: Sequence[int], num_clusters: int, *, check_finite: bool = False) -> TokenClusters:
    """Joins adjacent clusters, from single tokens to M, by Ward's criterion (J. H. Ward, 1963).

    In a round, every cluster has an edge to the adjacent one that is cheapest to join; an edge costs four times as much
    where it is not the cheapest at its other end, too. The cheapest edges are joined. Joining pairs that are each
    other's cheapest, in any order, leads to the same tree as joining the cheapest pair of all each time, so the result
    is near to that. At last, twice, each token moves to the most similar of the clusters that it or a token at its
    sides and corners lies in.

    Args:
        features: Tensor[B, N, C] of any float type; the arithmetic is fp32. No gradient flows through the choice.
        grid: (H, W), or (T, H, W) for video; its product is N. Tokens side by side on it are adjacent.
        num_clusters: M, in [1, N].
        check_finite: raise on NaN or infinite features; this waits for the device.

    Returns:
        TokenClusters without centers; one may end up empty, seldom: count 0, no weight in attention.

    Raises:
        AiluRusError: the grid does not match N, or M is out of range.

    Example:
        >>> clusters = ward(torch.randn(2, 6 * 8, 16), grid=(6, 8), num_clusters=12)
        >>> clusters.assignment.shape, clusters.num_clusters
        (torch.Size([2, 48]), 12)
    """
    grid = check_input(features, grid, num_clusters, check_finite)
    (batch, count), device = features.shape[:2], features.device
    features, sizes = _prepared(features), constant(1.0, device).expand(batch, count)
    rounds = _rounds(count, num_clusters, SHARE, LEAST_SHARE)
    if prefers_all_pairs(count * count, device):
        assignment = joined_all_pairs(features, sizes, touching_tokens(grid, device).expand(batch, -1, -1), rounds)
        move = moved_all_pairs
    else:
        itself = torch.arange(count, device=device).expand(batch, -1)
        assignment = joined_along_edges(features, sizes, itself, adjacent_clusters(itself, grid), rounds)
        move = moved
    for _ in range(MOVES if rounds else 0):
        assignment = move(features, assignment, grid, num_clusters)
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
    edges = torch.cat([adjacent_clusters(clusters.assignment, grid), edges_of_empty(clusters.counts, len(grid))], 1)
    means, sizes = _prepared(representatives), clusters.counts.clamp_min(SIZE_OF_EMPTY)
    count, owner = clusters.num_clusters, clusters.assignment
    rounds = _rounds(count, num_clusters, SHARE_OF_CLUSTERS, LEAST_SHARE_OF_CLUSTERS)
    if prefers_all_pairs(count * count, means.device):
        assignment = joined_all_pairs(means, sizes, touching(edges, count), rounds).gather(1, owner)
    else:
        assignment = joined_along_edges(means, sizes, owner, edges, rounds)
    return TokenClusters.from_assignment(assignment, num_clusters)


def _prepared(features: Tensor) -> Tensor:
    """In fp32, finite, and relative to the image's mean, for precision."""
    finite = features.float().nan_to_num(0.0, 0.0, 0.0).clamp_(-LARGEST, LARGEST)
    return finite.sub_(finite.mean(1, keepdim=True))


@grid_table
def _rounds(count: int, num_clusters: int, share: float, least_share: float) -> tuple[int, ...]:
    """How many unions each round makes, from `count` clusters to M."""
    rounds = []
    while count > num_clusters:
        to_go = count - num_clusters
        rounds.append(min(max(int(to_go * share), int(num_clusters * least_share), 1), to_go, count // 2))
        count -= rounds[-1]
    return tuple(rounds)


# A graph compiled for a CPU calls Ward as an operator that torch knows by name: its 30 kernels would take longer to
# compile than all layers of a ViT. An exported graph has to do without this package.


def _is_one_operator(features: Tensor) -> bool:
    return torch.compiler.is_compiling() and takes_operators(features)


@torch.library.custom_op("ailurus_hf::ward", mutates_args=())
def _ward(features: Tensor, grid: Sequence[int], num_clusters: int) -> tuple[Tensor, Tensor]:
    clusters = ward(features, grid, num_clusters)
    return clusters.assignment.contiguous(), clusters.counts


@_ward.register_fake
def _(features: Tensor, grid: Sequence[int], num_clusters: int) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape[:2], dtype=torch.long), _no_counts(features, num_clusters)


@torch.library.custom_op("ailurus_hf::join_regions", mutates_args=())
def _join_regions(
    assignment: Tensor, counts: Tensor, representatives: Tensor, grid: Sequence[int], num_clusters: int
) -> tuple[Tensor, Tensor]:
    clusters = TokenClusters(assignment, None, counts)
    joined = join_regions(clusters, representatives, representatives, tuple(grid), num_clusters)
    return joined.assignment.clone(), joined.counts


@_join_regions.register_fake
def _(
    assignment: Tensor, counts: Tensor, representatives: Tensor, grid: Sequence[int], num_clusters: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(assignment), _no_counts(representatives, num_clusters)


def _no_counts(features: Tensor, num_clusters: int) -> Tensor:
    return features.new_empty(features.shape[0], num_clusters, dtype=torch.float32)
