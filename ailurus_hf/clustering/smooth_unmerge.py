"""Smooth unmerging: a token takes a mean of its neighbors' representatives, each by how like the neighbor is.

Not in the paper. It is what a bilateral filter (Tomasi and Manduchi, 1998) would make of the unmerged grid, from the
representatives at once: borders between clusters are drawn by the tokens themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clusters import TokenClusters
from .neighbors import Grid, grid_neighbors, neighbor_distances

# The two rings around a token.
NUM_NEIGHBORS = 24
# Squared distance, in those of tokens to their own representatives, at which a neighbor counts 1/e of the token itself.
WIDTH = 1.0


@dataclass(frozen=True, eq=False)
class Smoothing:
    """Which representatives a token takes, and how much of each.

    cluster: LongTensor[B, N, k]. weight: Tensor[B, N, k] (fp32), of sum 1.
    """

    cluster: Tensor
    weight: Tensor

    def unmerge(self, representatives: Tensor) -> Tensor:
        """Gives each token its mean: Tensor[B, M, C] to [B, N, C]. Differentiable."""
        batch, num_clusters, channels = representatives.shape
        first = torch.arange(batch, device=representatives.device)[:, None, None] * num_clusters
        rows = F.embedding_bag(
            (self.cluster + first).flatten(0, 1),
            representatives.reshape(-1, channels),
            per_sample_weights=self.weight.flatten(0, 1).to(representatives.dtype),
            mode="sum",
        )
        return rows.view(batch, -1, channels)


@torch.no_grad()
def smoothing(clusters: TokenClusters, tokens: Tensor, grid: Grid) -> Smoothing:
    """Weights from the tokens that were clustered, Tensor[B, N, C], on their grid. No gradient flows through them."""
    tokens = tokens.float()
    neighbors = grid_neighbors(grid, NUM_NEIGHBORS, tokens.device)
    apart = neighbor_distances(tokens, neighbors).square()
    within = (tokens - clusters.unmerge(clusters.merge(tokens))).square().sum(-1).mean(1)
    # Where all tokens are their representatives, equal ones alone count.
    scale = (WIDTH * within).clamp(min=torch.finfo(torch.float32).tiny)[:, None, None]
    weight = F.pad(-apart / scale, (1, 0)).softmax(-1)
    itself = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
    places = torch.cat([itself, neighbors.index], 1)
    return Smoothing(clusters.assignment[:, places], weight)
