"""CTM of TCFormer (Zeng et al. 2022, arXiv:2204.08680) in a ViT: density peaks over all pairs, plain means.

Density is exp of minus the mean squared distance to the k nearest tokens, with a little noise against ties; a token's
other number is its distance to the nearest denser one; the M largest products are centers and each token goes to the
nearest of them, wherever it lies (Eq. 1-3). TCFormer merges by learned scores: untrained there are none, so all
tokens weigh the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ailurus_hf import AiluRusConfig, TokenClusters
from ailurus_hf.vision.discovery import FoundEncoder

from .hooks import Applied, Peer, attach

NOISE = 1e-6


@torch.no_grad()
def dpc_knn(tokens: Tensor, num_clusters: int, num_neighbors: int = 5) -> TokenClusters:
    """Density peaks of Tensor[B, N, C] over all pairs, without the grid."""
    batch, count, channels = tokens.shape
    distance = torch.cdist(tokens.float(), tokens.float()) * channels**-0.5
    nearest = distance.topk(
        min(num_neighbors, count), largest=False
    ).values  # a token itself counts, as in the paper's k
    density = (-nearest.square().mean(-1)).exp()
    noise = torch.rand(count, generator=torch.Generator().manual_seed(0)).to(density.device)
    density = density + NOISE * noise
    denser = density[:, None, :] > density[:, :, None]
    farthest = distance.flatten(1).amax(-1)[:, None, None]
    indicator = torch.where(denser, distance, farthest).amin(-1)
    centers = (indicator * density).topk(num_clusters).indices.sort(dim=1).values
    to_centers = distance.gather(2, centers[:, None].expand(-1, count, -1))
    assignment = to_centers.argmin(-1)
    # Of equal tokens that are both centers, each is its own.
    own = torch.arange(num_clusters, device=tokens.device).expand(batch, -1)
    return TokenClusters.from_assignment(assignment.scatter(1, centers, own), num_clusters, centers)


class CTM(Peer):
    """location: after this layer. num_clusters or keep: M, or M as a share of N."""

    def __init__(
        self,
        found: FoundEncoder,
        location: int,
        num_clusters: int | None = None,
        keep: float | None = None,
        num_neighbors: int = 5,
        restore_at: str = "backbone",
    ) -> None:
        super().__init__(found, restore_at)
        self.check_location(location)
        self.location, self.num_neighbors = location, num_neighbors
        self.budget = AiluRusConfig(cluster_location=location, num_clusters=num_clusters, keep_ratio=keep)

    def add_hooks(self) -> None:
        self.merge_before(self.location, self.merge)

    def merge(self, tokens: Tensor) -> Tensor:
        num_clusters = self.budget.clusters_for(tokens.shape[1])
        if num_clusters == tokens.shape[1]:
            return tokens
        clusters = dpc_knn(tokens, num_clusters, self.num_neighbors)
        self.unmerge = clusters.unmerge
        return clusters.merge(tokens)


def apply(model: nn.Module, **settings: Any) -> Applied:
    """CTM on a transformers model; settings as of `CTM`."""
    return attach(model, CTM, **settings)
