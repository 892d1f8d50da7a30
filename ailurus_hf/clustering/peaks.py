"""The arithmetic of density peaks: centers and assignment from weighted distances to neighbors (Eq. 1 and 3)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..clusters import TokenClusters, ranks, stable_argsort
from ..grid_cache import constant


def density_peaks(
    weighted: Tensor,
    index: Tensor | None,
    num_clusters: int,
    k: int,
    nearest_center: Callable[[Tensor], Tensor],
    also_near: Tensor | None = None,
) -> TokenClusters:
    """The M density peaks and the tokens of each, from the weighted distances to neighbors alone.

    Args:
        weighted: Tensor[B, N, λ], σ·s to each neighbor; or Tensor[B, N, N], to all tokens, infinite where one is no
            neighbor.
        index: LongTensor[B, N, λ], the neighbors' token indices, ascending; None where `weighted` is of all tokens.
        num_clusters: M.
        k: neighbors that count for the density.
        nearest_center: from BoolTensor[B, N], False for centers, to LongTensor[B, N], the center of tokens from which
            no chain of neighbors leads to one.
        also_near: Tensor[B, N, any], further distances that count for the density alone.

    Returns:
        TokenClusters with centers in ascending token order.
    """
    near = weighted if also_near is None else torch.cat([weighted, also_near], -1)
    # Eq. 1: -log ρ, so the least is the densest.
    sparsity = near.amin(-1) if k == 1 else near.topk(k, largest=False).values.mean(-1)

    # Rank 0 is the densest; of equal densities the lower index counts as denser.
    order = stable_argsort(sparsity)
    itself = torch.arange(weighted.shape[1], device=weighted.device).expand_as(order)
    rank = constant(0, order.device).expand_as(order).scatter(1, order, itself)
    is_no_denser = _of_neighbors(rank, index) >= rank[..., None]
    delta, towards_denser = _least(weighted.masked_fill(is_no_denser, math.inf))  # Eq. 3
    is_peak = delta == math.inf

    centers = _top(delta.log() - sparsity, sparsity.masked_fill(~is_peak, 0.0), num_clusters)
    no_center = constant(True, weighted.device).expand_as(is_peak).scatter(1, centers, False)
    is_center = ~no_center
    to_center, towards_center = _least(weighted.masked_fill(_of_neighbors(no_center, index), math.inf))
    settled = is_center | (to_center < math.inf)
    owner = torch.where(is_center, itself, _pick(index, towards_center))

    # A chain of denser neighbors ends where a token is settled or is a peak. Each pass doubles the steps walked.
    step = torch.where(settled | is_peak, itself, _pick(index, towards_denser))
    for _ in range((itself.shape[1] - 1).bit_length()):
        step = step.gather(1, step)
    owner = torch.where(settled.gather(1, step), owner.gather(1, step), nearest_center(no_center))
    return TokenClusters.from_assignment(ranks(is_center).gather(1, owner), num_clusters, centers)


def _top(score: Tensor, among_infinite: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; ties by the least `among_infinite`, then by lower index."""
    by_second = stable_argsort(among_infinite)
    by_first = stable_argsort(score.gather(1, by_second), descending=True)
    return by_second.gather(1, by_first[:, :count]).sort(dim=1).values


def _least(values: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum along the last axis and its index, the first of equal ones."""
    least = values.min(-1)
    return least.values, least.indices


def _of_neighbors(values: Tensor, index: Tensor | None) -> Tensor:
    """values[b, index[b, n, j]]: Tensor[B, N] to [B, N, λ]; to [B, 1, N] where all are neighbors."""
    return values[:, None] if index is None else values.gather(1, index.flatten(1)).view(index.shape)


def _pick(index: Tensor | None, where: Tensor) -> Tensor:
    """Which token the neighbor at a position is."""
    return where if index is None else index.gather(2, where[..., None]).squeeze(-1)
