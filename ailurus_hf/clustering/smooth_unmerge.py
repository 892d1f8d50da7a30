"""Smooth unmerging: a token takes a mean of its neighbors' representatives, weighted by how alike the neighbors are.

Not in the paper. It is a bilateral filter (Tomasi and Manduchi, 1998) on the unmerged grid, computed from the
representatives directly: the tokens themselves draw the borders between clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clusters import TokenClusters
from ..exporting import is_exporting
from .neighbors import Grid, grid_neighbors, neighbor_distances

# The two rings around a token.
NUM_NEIGHBORS = 24
# The squared distance at which a neighbor weighs 1/e of the token itself, relative to the mean squared distance of
# tokens to their representatives.
WIDTH = 1.0


@dataclass(frozen=True, eq=False)
class Smoothing:
    """Which representatives a token takes, and how much of each.

    Args:
        cluster: LongTensor[B, N, k], the clusters.
        weight: Tensor[B, N, k] (fp32), their weights, of sum 1.
    """

    cluster: Tensor
    weight: Tensor

    def unmerge(self, representatives: Tensor) -> Tensor:
        """Each token's weighted mean of representatives: Tensor[B, M, C] to [B, N, C]. Differentiable."""
        batch, num_clusters, channels = representatives.shape
        if is_exporting() or torch.onnx.is_in_onnx_export():
            # Runtimes have no weighted bags of rows: ONNX none at all, OpenVINO none in a batch of any size (2026.4).
            share = representatives.new_zeros(*self.cluster.shape[:2], num_clusters)
            return share.scatter_add(2, self.cluster, self.weight.to(representatives.dtype)) @ representatives
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
    """Weights from the tokens that were clustered; no gradient flows through them.

    Args:
        clusters: of the N tokens.
        tokens: Tensor[B, N, C] of any float type.
        grid: of the N tokens.
    """
    tokens = tokens.float()
    neighbors = grid_neighbors(grid, NUM_NEIGHBORS, tokens.device)
    apart = neighbor_distances(tokens, neighbors).square()
    within = (tokens - clusters.unmerge(clusters.merge(tokens))).square().sum(-1).mean(1)
    # Where all tokens equal their representatives, only equal neighbors weigh.
    scale = (WIDTH * within).clamp(min=torch.finfo(torch.float32).tiny)[:, None, None]
    weight = F.pad(-apart / scale, (1, 0)).softmax(-1)
    itself = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
    around = torch.cat([itself, neighbors.index], 1)
    return Smoothing(clusters.assignment[:, around], weight)
