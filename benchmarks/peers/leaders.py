"""Merges told by leaders: every token names the token it goes to, and a leader names itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ailurus_hf import TokenClusters


def numbered(leader: Tensor) -> Tensor:
    """Clusters counted from 0 in the order of their leaders: LongTensor[B, L] of indices to the same of clusters."""
    leads = leader == torch.arange(leader.shape[1], device=leader.device)
    return (leads.long().cumsum(1) - 1).gather(1, leader)


def each_its_own(like: Tensor) -> Tensor:
    """LongTensor[B, L] in which every token leads itself; like: Tensor[B, L, ...]."""
    return torch.arange(like.shape[1], device=like.device).repeat(like.shape[0], 1)


def means_by_size(tokens: Tensor, sizes: Tensor, assignment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means of clusters, weighted by how many patches each token holds, and the patches that each cluster holds.

    Tensor[B, L, C], Tensor[B, L] and LongTensor[B, L] to Tensor[B, count, C] and Tensor[B, count]. Where a cluster's
    sizes are all 0 (padding), so is its mean.
    """
    clusters = TokenClusters.from_assignment(assignment, count)
    merged_sizes = clusters.merge(sizes[..., None])[..., 0] * clusters.counts
    sums = clusters.merge(tokens * sizes[..., None].to(tokens.dtype)) * clusters.counts[..., None].to(tokens.dtype)
    return sums / merged_sizes[..., None].clamp(min=1).to(tokens.dtype), merged_sizes.round()
