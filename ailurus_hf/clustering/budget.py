"""M by content: more clusters for images with more detail, between two bounds (not in the paper)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..clusters import TokenClusters
from ..config import rounded_share
from ..errors import AiluRusError
from .base import Clustering
from .neighbors import Grid, check_grid, grid_neighbors, neighbor_distances

# The tokens at every side and corner of a token.
ADJACENT = 8
# A token stands out where all adjacent ones differ from it by more than this share of the image's typical distance.
STANDS_OUT = 0.25
# Distances below this share of a token's norm count as rounding: an image of equal tokens is flat.
ROUNDING = 0.01


@torch.no_grad()
def detail(features: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The share of tokens that stand out from all their neighbors, from 0 (flat) to 1 (noise).

    A token stands out where its most similar adjacent token is further from it than a quarter of the median distance of
    the image's tokens from their mean. Neither a factor nor a constant added to all features changes it.

    Args:
        features: Tensor[B, N, C] of any float type.
        grid: (H, W), or (T, H, W) for video; its product is N.

    Returns:
        Tensor[B].
    """
    features = features.float()
    grid = check_grid(grid, features.shape[1])
    if features.shape[1] == 1:
        return features.new_zeros(len(features))
    nearest = neighbor_distances(features, grid_neighbors(grid, ADJACENT, features.device)).amin(-1)
    typical = torch.linalg.vector_norm(features - features.mean(1, keepdim=True), dim=-1).median(1, keepdim=True).values
    rounding = ROUNDING * torch.linalg.vector_norm(features, dim=-1)
    return ((nearest > STANDS_OUT * typical) & (nearest > rounding)).float().mean(1)


@dataclass(frozen=True)
class ByContent(Clustering):
    """Another clustering, with an M that depends on what is in the image.

    M is then known once the device is done, and batches and compiled graphs need one M: they raise AiluRusError.

    Args:
        clustering: the one that makes the clusters.
        min_keep_ratio: round(min_keep_ratio * N) is the least M; the M that is asked for is the most.
    """

    clustering: Clustering
    min_keep_ratio: float

    def cluster(self, features: Tensor, grid: Grid, num_clusters: int) -> TokenClusters:
        if torch.compiler.is_compiling():
            raise AiluRusError(
                "min_keep_ratio makes shapes depend on the image: use keep_ratio alone in compiled graphs"
            )
        if len(features) != 1:
            raise AiluRusError(
                f"min_keep_ratio gives each image a number of tokens of its own, which {len(features)} images in one "
                "tensor cannot have: use a batch of 1, or keep_ratio alone"
            )
        least = min(rounded_share(self.min_keep_ratio, features.shape[1]), num_clusters)
        count = least + round((num_clusters - least) * detail(features, grid).item())
        return self.clustering.cluster(features, grid, count)

    def join(
        self, clusters: TokenClusters, representatives: Tensor, tokens: Tensor, grid: Grid, num_clusters: int
    ) -> TokenClusters:
        """As the other clustering does."""
        return self.clustering.join(clusters, representatives, tokens, grid, num_clusters)


def by_content(clustering: Clustering, min_keep_ratio: float) -> Clustering:
    """The clustering with the M that it is asked for as the most, and round(min_keep_ratio * N) as the least."""
    return ByContent(clustering, min_keep_ratio)
