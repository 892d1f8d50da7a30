"""The rounds of `ward` by a few dense products over all pairs of clusters: on a GPU a launch costs more than those."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..grid_cache import grid_table
from ..precision import without_autocast
from .all_pairs import membership
from .boruvka import united


@without_autocast
def joined_all_pairs(means: Tensor, sizes: Tensor, touches: Tensor, rounds: Sequence[int]) -> Tensor:
    """The new cluster of each old one, LongTensor[B, n].

    Products of means and borders are kept for all pairs; a round of unions is two matrix products on both at once.

    Args:
        means: Tensor[B, n, C], of the old clusters, relative to their image's mean; finite.
        sizes: Tensor[B, n], in tokens, above 0.
        touches: Tensor[B, n, n], positive where two clusters may join, else 0; the diagonal does not matter.
        rounds: how many unions each round makes.
    """
    batch, count, _ = means.shape
    owner = None
    sizes = sizes[:, None]
    both = torch.cat([means @ means.transpose(1, 2), touches], 2)
    for number, unions in enumerate(rounds):
        products, touches = both.view(batch, count, 2, count).unbind(2)
        step = united(*_cheapest(products, sizes, touches), unions)
        owner = step if owner is None else step.gather(1, owner)
        if number < len(rounds) - 1:
            count -= unions
            member = membership(step, count)
            totals = sizes @ member
            # Times means: the new means.
            share = member * (sizes.transpose(1, 2) / totals)
            both = (share.transpose(1, 2) @ both).view(batch, 2 * count, -1) @ share
            both = both.view(batch, count, 2 * count)
            sizes = totals
    return torch.arange(count, device=means.device).expand(batch, -1) if owner is None else owner


def _cheapest(products: Tensor, sizes: Tensor, touches: Tensor) -> tuple[Tensor, Tensor]:
    """The adjacent cluster that is cheapest to join: the cost, Tensor[B, n], and its number, LongTensor[B, n].

    Args:
        products: Tensor[B, n, n], of the means of all pairs.
        sizes: Tensor[B, 1, n]. touches: Tensor[B, n, n].
    """
    norms = products.diagonal(dim1=1, dim2=2)
    squared = torch.sub(norms[:, :, None] + norms[:, None], products, alpha=2)
    # Exactly symmetric, or rounding could make three clusters each other's cheapest in a cycle.
    squared = torch.minimum(squared, squared.transpose(1, 2))
    inverse = sizes.reciprocal()
    cost = squared / (inverse.transpose(1, 2) + inverse)
    cost = cost.masked_fill(touches <= _itself(touches.shape[1], touches.device), math.inf)
    # The first of equal ones: the lowest number, so ties make no cycle either.
    found = cost.min(-1)
    return found.values, found.indices


@grid_table
def _itself(count: int, device: torch.device) -> Tensor:
    """Tensor[n, n]: infinite on the diagonal, else 0."""
    return torch.zeros(count, count).fill_diagonal_(math.inf).to(device)
