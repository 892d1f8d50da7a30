"""One round of Borůvka's algorithm: joins clusters to their cheapest partners, a given number of them; shapes stay
static.

For `pairs`, where any two clusters may be partners, and `ward`, where only adjacent ones may. The edges to cheapest
partners are at least half as many as the clusters, and make no cycle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..clusters import TokenClusters, ranks, stable_argsort
from ..grid_cache import constant

# An edge between two clusters that are not each other's cheapest counts this many times more: such edges make chains.
CHAIN_PENALTY = 4.0


def united(cost: Tensor, partner: Tensor, unions: int) -> Tensor:
    """Joins clusters to their partners by the cheapest edges.

    Args:
        cost: Tensor[B, n], of joining the partner; finite.
        partner: LongTensor[B, n], the other cluster that is cheapest to join; ties the same way for all, or edges make
            cycles.
        unions: how many edges to join, at most half of n.

    Returns:
        LongTensor[B, n], the new cluster of each, in [0, n - unions).
    """
    itself = torch.arange(partner.shape[1], device=partner.device)
    mutual = partner.gather(1, partner) == itself
    # A pair that is each other's cheapest has one edge: the higher index joins the lower. Cheaper by the penalty, and
    # not the others dearer, which could become infinite.
    edges = torch.where(mutual, (cost / CHAIN_PENALTY).masked_fill(itself < partner, torch.inf), cost)
    cheapest = stable_argsort(edges)[:, :unions]
    stays = constant(True, cost.device).expand_as(partner).scatter(1, cheapest, False)
    root = torch.where(stays, itself, partner)
    # A chain has at most as many steps as there are unions; each round doubles the steps walked.
    for _ in range((unions - 1).bit_length()):
        root = root.gather(1, root)
    return ranks(stays).gather(1, root)


def merged(means: Tensor, sizes: Tensor, into: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means and sizes after joining n clusters.

    Args:
        means: Tensor[B, n, C]. sizes: Tensor[B, n], in tokens.
        into: LongTensor[B, n], the new cluster of each.
        count: the number of new clusters.

    Returns:
        Tensor[B, count, C] and Tensor[B, count].
    """
    clusters = TokenClusters.from_assignment(into, count)
    totals = torch.zeros_like(clusters.counts).scatter_add(1, into, sizes)
    weights = sizes / totals.gather(1, into).clamp_min(1)
    return clusters.merge(means * weights[..., None]) * clusters.counts[..., None], totals
