"""Spatial-aware density-peak clustering: the paper's way to pick M representatives (AiluRus, section 3.2, Eq. 1-3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import check_settings
from ..clusters import TokenClusters, stable_argsort
from .neighbors import check_input, grid_neighbors, nearest_marked, neighbor_distances


@torch.no_grad()
def spatial_density_peaks(
    features: Tensor,
    grid: Sequence[int],
    num_clusters: int,
    *,
    num_spatial_neighbors: int = 50,
    alpha: float = 0.9,
    num_density_neighbors: int = 1,
    check_finite: bool = False,
) -> TokenClusters:
    """Picks the M density peaks of a token grid and assigns every token to one of them.

    features: Tensor[B, N, C], any float type; the arithmetic is fp32. No gradient flows through the choice.
    grid: (H, W), or (T, H, W) for video; its product is N.
    num_clusters: M, in [1, N].
    num_spatial_neighbors: λ of Eq. 2, clipped to N - 1. 0 compares all pairs without a spatial term, in O(N²) memory.
    alpha: α of Eq. 2, in [0, 1]: how much a near neighbor's distance is discounted (1: not at all).
    num_density_neighbors: k of Eq. 1, clipped to the number of neighbors.
    check_finite: raise on NaN or infinite features; this waits for the device. Without it they give arbitrary clusters.

    Returns TokenClusters with centers in ascending token order. Equal values always resolve to the lower token index.
    Raises AiluRusError on a grid that does not match N and on settings out of range.
    """
    check_settings(num_spatial_neighbors, alpha, num_density_neighbors)
    grid = check_input(features, grid, num_clusters, check_finite)
    batch, tokens, channels = features.shape
    if num_clusters == tokens:
        every = torch.arange(tokens, device=features.device).expand(batch, -1)
        return TokenClusters(every, every, torch.ones(batch, tokens, device=features.device))

    spatial = num_spatial_neighbors > 0
    neighbors = grid_neighbors(grid, num_spatial_neighbors if spatial else tokens - 1, features.device)
    index = neighbors.index.expand(batch, -1, -1)
    lam = index.shape[2]

    sigma = neighbor_distances(features.float(), neighbors) / math.sqrt(channels)
    s = (1 - alpha) * neighbors.rank / lam + alpha if spatial else 1.0  # Eq. 2
    k = min(num_density_neighbors, lam)
    return density_peaks(sigma * s, index, num_clusters, k, lambda is_center: nearest_marked(is_center, grid))


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
