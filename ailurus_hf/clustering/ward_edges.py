"""The rounds of `ward` along the edges between adjacent clusters: on a CPU, and where all pairs would be too many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..clusters import stable_argsort
from ..grid_cache import constant, grid_table
from .boruvka import merged, united
from .neighbors import Grid, chunk_length, image_rows

# Repeated edges are removed, by two sorts, where less than this share is left.
MUCH_FEWER = 0.8


def joined_along_edges(
    means: Tensor, sizes: Tensor, owner: Tensor, edges: Tensor, grid: Grid, rounds: Sequence[int]
) -> Tensor:
    """The new cluster of each token, LongTensor[B, N].

    Args:
        means: Tensor[B, n, C], of the old clusters, relative to their image's mean; finite.
        sizes: Tensor[B, n], in tokens, above 0.
        owner: the old cluster of each token, LongTensor[B, N].
        edges: pairs of old clusters that may join, LongTensor[B, P, 2]; loops say nothing.
        rounds: how many unions each round makes.
    """
    count = means.shape[1]
    is_planar = sum(side > 1 for side in grid) <= 2
    for number, unions in enumerate(rounds):
        # A planar graph has fewer than three edges a cluster, and any graph at most one a pair.
        most = min(3 * count if is_planar else edges.shape[1], count * (count - 1) // 2)
        if most < MUCH_FEWER * edges.shape[1]:
            edges = _distinct(edges, count)[:, :most]
        step = united(*_cheapest(means, sizes, edges), unions)
        owner, count = step.gather(1, owner), count - unions
        if number < len(rounds) - 1:
            means, sizes = merged(means, sizes, step, count)
            edges = step.gather(1, edges.flatten(1)).view(edges.shape)
    return owner


def adjacent_clusters(owner: Tensor, grid: Grid) -> Tensor:
    """Pairs of adjacent clusters, LongTensor[B, P, 2], from each token's cluster, LongTensor[B, N]; some are loops."""
    following = _next_tokens(grid, owner.device)
    there = owner[:, following.flatten()].view(owner.shape[0], -1, len(grid))
    return torch.stack([owner[..., None].expand_as(there), there], -1).flatten(1, 2)


def edges_of_empty(counts: Tensor) -> Tensor:
    """Empty clusters touch none: edges to the next and the previous number, LongTensor[B, M - 1, 2]; the rest loops."""
    number = torch.arange(counts.shape[1], device=counts.device).expand(counts.shape)
    is_empty = counts == 0
    following = torch.where(is_empty[:, :-1] | is_empty[:, 1:], number[:, 1:], number[:, :-1])
    return torch.stack([number[:, :-1], following], -1)


def touching(edges: Tensor, count: int) -> Tensor:
    """Tensor[B, n, n]: 1 for the pairs in LongTensor[B, P, 2], else 0."""
    a, b = edges.unbind(2)
    touches = constant(0.0, edges.device).expand(edges.shape[0], count * count)
    one = constant(1.0, edges.device).expand(edges.shape[0], 2 * a.shape[1])
    return touches.scatter(1, torch.cat([a * count + b, b * count + a], 1), one).view(-1, count, count)


@grid_table
def touching_tokens(grid: Grid, device: torch.device) -> Tensor:
    """The same of the tokens of a grid, Tensor[N, N]."""
    itself = torch.arange(math.prod(grid))[None]
    return touching(adjacent_clusters(itself, grid), math.prod(grid))[0].to(device)


@grid_table
def _next_tokens(grid: Grid, device: torch.device) -> Tensor:
    """The next token along each axis of the grid, LongTensor[N, axes]; the token itself where there is none."""
    tokens = torch.arange(math.prod(grid)).view(grid)
    following = [
        tokens.index_select(axis, torch.arange(1, side + 1).clamp(max=side - 1)) for axis, side in enumerate(grid)
    ]
    return torch.stack(following, -1).flatten(0, -2).to(device)


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
    cost = _squared_distances(means, a, b) * (size_a * size_b / (size_a + size_b))
    cost = cost.masked_fill(a == b, torch.inf)
    # By rank, so that no two edges cost the same and the cheapest ones make no cycle.
    order = stable_argsort(cost)
    itself = torch.arange(a.shape[1], device=a.device).expand_as(order)
    rank = constant(0, a.device).expand_as(order).scatter(1, order, itself)
    cheapest = constant(a.shape[1] - 1, a.device).expand(batch, count)
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
    return torch.cat([image_rows(means, i).sub_(image_rows(means, j)).square_().sum(-1) for i, j in ends], 1)
