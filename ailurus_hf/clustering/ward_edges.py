"""The rounds of `ward` along the edges between adjacent clusters: on a CPU, and where all pairs would be too many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..grid_cache import constant, grid_table
from .boruvka import merged, united
from .neighbors import Grid
from .rows import image_rows, in_parts, row_norms, row_products


def joined_along_edges(means: Tensor, sizes: Tensor, owner: Tensor, edges: Tensor, rounds: Sequence[int]) -> Tensor:
    """The new cluster of each token, LongTensor[B, N].

    Args:
        means: Tensor[B, n, C], of the old clusters, relative to their image's mean; finite.
        sizes: Tensor[B, n], in tokens, above 0.
        owner: the old cluster of each token, LongTensor[B, N].
        edges: LongTensor[B, P, 1 + axes], rows of an old cluster and those that it may join; itself says nothing.
        rounds: how many unions each round makes.
    """
    count = means.shape[1]
    for number, unions in enumerate(rounds):
        step = united(*_cheapest(means, sizes, edges), unions)
        owner, count = step.gather(1, owner), count - unions
        if number < len(rounds) - 1:
            means, sizes = merged(means, sizes, step, count)
            edges = step.gather(1, edges.flatten(1)).view(edges.shape)
    return owner


def adjacent_clusters(owner: Tensor, grid: Grid) -> Tensor:
    """Each token's cluster and those of the next tokens along each axis: LongTensor[B, N] to [B, N, 1 + axes]."""
    following = _next_tokens(grid, owner.device)
    return owner[:, following.flatten()].view(owner.shape[0], -1, 1 + len(grid))


def edges_of_empty(counts: Tensor, axes: int) -> Tensor:
    """Empty clusters touch none: edges to the next and the previous number, LongTensor[B, M - 1, 1 + axes]."""
    number = torch.arange(counts.shape[1], device=counts.device).expand(counts.shape)
    is_empty = counts == 0
    following = torch.where(is_empty[:, :-1] | is_empty[:, 1:], number[:, 1:], number[:, :-1])
    return torch.stack([number[:, :-1], *[following] * axes], -1)


def touching(edges: Tensor, count: int) -> Tensor:
    """Tensor[B, n, n]: 1 for the pairs in rows of LongTensor[B, P, 1 + axes], else 0."""
    a, b = edges[..., :1], edges[..., 1:]
    there_and_back = torch.cat([a * count + b, b * count + a], 1).flatten(1)
    touches = constant(0.0, edges.device).expand(edges.shape[0], count * count)
    one = constant(1.0, edges.device).expand_as(there_and_back)
    return touches.scatter(1, there_and_back, one).view(-1, count, count)


@grid_table
def touching_tokens(grid: Grid, device: torch.device) -> Tensor:
    """The same of the tokens of a grid, Tensor[N, N]."""
    itself = torch.arange(math.prod(grid))[None]
    return touching(adjacent_clusters(itself, grid), math.prod(grid))[0].to(device)


@grid_table
def _next_tokens(grid: Grid, device: torch.device) -> Tensor:
    """Each token, and the next one along each axis or, where there is none, itself: LongTensor[N, 1 + axes]."""
    tokens = torch.arange(math.prod(grid)).view(grid)
    following = [
        tokens.index_select(axis, torch.arange(1, side + 1).clamp(max=side - 1)) for axis, side in enumerate(grid)
    ]
    return torch.stack([tokens, *following], -1).flatten(0, -2).to(device)


def _cheapest(means: Tensor, sizes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The adjacent cluster that is cheapest to join: the cost, Tensor[B, n], and its number, LongTensor[B, n]."""
    batch, count, _ = means.shape
    a, b = edges[..., :1].expand_as(edges[..., 1:]).flatten(1), edges[..., 1:].flatten(1)
    size_a, size_b = sizes.gather(1, a), sizes.gather(1, b)
    cost = _squared_distances(means, edges) * (size_a * size_b / (size_a + size_b))
    cost = cost.masked_fill(a == b, torch.inf)
    least = constant(torch.inf, a.device).expand(batch, count)
    least = least.scatter_reduce(1, a, cost, "amin").scatter_reduce(1, b, cost, "amin")
    # Of equal ones the first, so that the cheapest edges make no cycle.
    number = torch.arange(a.shape[1], device=a.device).expand_as(a)
    last = constant(a.shape[1] - 1, a.device)
    first = last.expand(batch, count)
    for end in (a, b):
        first = first.scatter_reduce(1, end, torch.where(cost == least.gather(1, end), number, last), "amin")
    return least, a.gather(1, first) + b.gather(1, first) - torch.arange(count, device=a.device)


def _squared_distances(means: Tensor, edges: Tensor) -> Tensor:
    """Squared distances of the first row of Tensor[B, n, C] that LongTensor[B, P, 1 + axes] names to the others:
    Tensor[B, P * axes]."""
    first, others = edges[..., 0], edges[..., 1:]
    norms = row_norms(means)
    scale = norms.gather(1, first)[..., None] + norms.gather(1, others.flatten(1)).view(others.shape)
    parts = in_parts(first, others, means.element_size() * means.shape[0] * means.shape[2])
    products = torch.cat([row_products(image_rows(means, a), means, b) for a, b in parts], 1)
    return torch.sub(scale, products, alpha=2).flatten(1)
