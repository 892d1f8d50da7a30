"""Unions: from the cheapest partner that every cluster has, a round that joins so many of them; shapes stay static.

Of `pairs`, where any two clusters may be partners, and of `ward`, where only adjacent ones may. A round is one of Borůvka's:
there are at least half as many edges to partners as there are clusters, and they make no circle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..clusters import TokenClusters, stable_argsort

# Of two clusters that are not each other's cheapest, so many times the cost: such unions make chains.
CHAIN_PENALTY = 4.0


def united(cost: Tensor, partner: Tensor, unions: int) -> Tensor:
    """Joins clusters to their partners by the so many cheapest edges: LongTensor[B, n], the new cluster, of n - unions, of each.

    partner: LongTensor[B, n], the other cluster that is cheapest to join; ties the same way for all, or edges make circles.
    cost: Tensor[B, n], of joining it. unions: at most half of n.
    """
    batch, count = partner.shape
    itself = torch.arange(count, device=partner.device)
    mutual = partner.gather(1, partner) == itself
    # Of a pair that is each other's cheapest, one edge: the higher index joins the lower. NaN stays before the other.
    edges = torch.where(mutual, cost, cost * CHAIN_PENALTY).nan_to_num(torch.finfo(cost.dtype).max)
    edges = edges.masked_fill(mutual & (itself < partner), torch.inf)
    joins = torch.zeros(batch, count, dtype=torch.bool, device=partner.device)
    joins = joins.scatter(1, stable_argsort(edges)[:, :unions], True)
    root = torch.where(joins, partner, itself)
    # A chain has at most as many steps as there are unions; each round doubles what one goes.
    for _ in range((unions - 1).bit_length()):
        root = root.gather(1, root)
    return ((~joins).cumsum(1) - 1).gather(1, root)


def merged(means: Tensor, sizes: Tensor, into: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means and sizes of what LongTensor[B, n] makes of n clusters, Tensor[B, n, C] and [B, n]: so many clusters."""
    clusters = TokenClusters.from_assignment(into, count)
    totals = torch.zeros_like(clusters.counts).scatter_add(1, into, sizes)
    weights = sizes / totals.gather(1, into).clamp_min(1)
    return clusters.merge(means * weights[..., None]) * clusters.counts[..., None], totals
