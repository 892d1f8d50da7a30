"""The arithmetic of density peaks: centers and assignment, from weighted distances to neighbors (AiluRus, Eq. 1 and 3)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..clusters import TokenClusters, stable_argsort


def density_peaks(
    weighted: Tensor,
    index: Tensor,
    num_clusters: int,
    k: int,
    nearest_center: Callable[[Tensor], Tensor],
    also_near: Tensor | None = None,
) -> TokenClusters:
    """The M density peaks and who belongs to them, from σ·s to the neighbors alone.

    weighted, index: Tensor[B, N, λ], σ·s to each neighbor, and LongTensor[B, N, λ], which they are, in ascending order.
    nearest_center: from BoolTensor[B, N] of centers to LongTensor[B, N], for tokens from which no neighbors lead to one.
    also_near: Tensor[B, N, any], further distances that count for the density alone.
    """
    near = weighted if also_near is None else torch.cat([weighted, also_near], -1)
    nearest = near.amin(-1) if k == 1 else near.topk(k, largest=False).values.mean(-1)
    log_rho = -nearest  # Eq. 1

    rho_of_neighbor = _of_neighbors(log_rho, index)
    here = torch.arange(weighted.shape[1], device=weighted.device)[:, None]
    denser = (rho_of_neighbor > log_rho[..., None]) | ((rho_of_neighbor == log_rho[..., None]) & (index < here))
    delta, towards_denser = _least(weighted.masked_fill(~denser, math.inf))  # Eq. 3
    is_peak = ~denser.any(-1)

    centers = _top(log_rho + delta.log(), torch.where(is_peak, log_rho, 0.0), num_clusters)
    is_center = torch.zeros_like(is_peak).scatter(1, centers, True)
    owner = _assign(weighted, index, towards_denser, is_peak, is_center, nearest_center)

    rank_of_center = is_center.long().cumsum(1) - 1
    return TokenClusters.from_assignment(rank_of_center.gather(1, owner), num_clusters, centers)


def _top(score: Tensor, among_infinite: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; equal scores by `among_infinite`, then by lower index."""
    by_second = stable_argsort(among_infinite, descending=True)
    by_first = stable_argsort(score.gather(1, by_second), descending=True)
    return by_second.gather(1, by_first[:, :count]).sort(dim=1).values


def _assign(
    weighted: Tensor,
    index: Tensor,
    towards_denser: Tensor,
    is_peak: Tensor,
    is_center: Tensor,
    nearest_center: Callable[[Tensor], Tensor],
) -> Tensor:
    """The center of each token, as a token index: LongTensor[B, N]."""
    tokens = is_center.shape[1]
    itself = torch.arange(tokens, device=is_center.device).expand_as(is_peak)
    center_near = _of_neighbors(is_center, index)
    _, towards_center = _least(weighted.masked_fill(~center_near, math.inf))
    settled = is_center | center_near.any(-1)
    owner = torch.where(is_center, itself, _pick(index, towards_center))

    # A chain of denser neighbors ends where a token is settled or is a peak. Each pass doubles the steps walked.
    step = torch.where(settled | is_peak, itself, _pick(index, towards_denser))
    for _ in range((tokens - 1).bit_length()):
        step = step.gather(1, step)
    return torch.where(settled.gather(1, step), owner.gather(1, step), nearest_center(is_center))


def _least(values: Tensor) -> tuple[Tensor, Tensor]:
    """Least of the last axis and where it stands, the first of equals."""
    where = values.argmin(-1)
    return values.gather(-1, where[..., None]).squeeze(-1), where


def _of_neighbors(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b, n, j]]: Tensor[B, N] to [B, N, k]."""
    return values.gather(1, index.flatten(1)).view(index.shape)


def _pick(index: Tensor, where: Tensor) -> Tensor:
    return index.gather(2, where[..., None]).squeeze(-1)
