"""Expedite (Liang et al. 2022, arXiv:2210.01035): soft k-means super-pixels after layer L, unmerged at the end.

Token clustering layer: centers start as an adaptive average pool of the grid; a token may belong to the cells around
its own; `iterations` times, memberships are the softmax of -tau d² over those cells and centers the weighted means.
Token reconstruction layer: a token takes the sum of its `num_neighbors` nearest centers, weighted exp(-tau d²) by the
distances between tokens and centers at the clustering layer, weights of unit L2 norm. A decoder on tokens runs on the
centers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ailurus_hf.vision.discovery import FoundEncoder

from .hooks import Applied, Peer, Unmerge, attach, two_cells


def cells_near(grid: tuple[int, int], cells: tuple[int, int], reach: int, device: torch.device) -> Tensor:
    """BoolTensor[N, M]: which cells lie at most `reach` rows and columns from a token's own."""
    masks = []
    for side, count in zip(grid, cells, strict=True):
        own = torch.arange(side, device=device) * count // side
        masks.append((own[:, None] - torch.arange(count, device=device)).abs() <= reach)
    rows, columns = masks
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def squared_distances(tokens: Tensor, centers: Tensor) -> Tensor:
    """Tensor[B, N, C] and [B, M, C] to [B, N, M], in fp32."""
    return torch.cdist(tokens.float(), centers.float()).square()


def cluster(
    tokens: Tensor, grid: tuple[int, int], cells: tuple[int, int], tau: float, iterations: int, reach: int
) -> Tensor:
    """The token clustering layer: Tensor[B, N, C] on a grid to centers [B, M, C]."""
    image = tokens.float().transpose(1, 2).unflatten(2, grid)
    centers = F.adaptive_avg_pool2d(image, cells).flatten(2).transpose(1, 2)
    far = ~cells_near(grid, cells, reach, tokens.device)
    for _ in range(iterations):
        logits = (-tau * squared_distances(tokens, centers)).masked_fill(far, -torch.inf)
        membership = logits.softmax(-1)
        centers = membership.transpose(1, 2) @ tokens.float() / membership.sum(1)[..., None].clamp(min=1e-16)
    return centers.to(tokens.dtype)


def reconstruction(tokens: Tensor, centers: Tensor, tau: float, num_neighbors: int) -> Unmerge:
    """The token reconstruction layer, from tokens and centers at the clustering layer."""
    distances, index = squared_distances(tokens, centers).topk(min(num_neighbors, centers.shape[1]), largest=False)
    # Relative to the nearest: the norm takes a common factor out, and exp of a large distance is zero.
    weights = F.normalize((-tau * (distances - distances[..., :1])).exp(), dim=-1)
    batch, count, _ = tokens.shape
    flat = (index + torch.arange(batch, device=index.device)[:, None, None] * centers.shape[1]).flatten(0, 1)

    def unmerge(values: Tensor) -> Tensor:
        bags = weights.flatten(0, 1).to(values.dtype)
        return F.embedding_bag(flat, values.reshape(-1, values.shape[-1]), per_sample_weights=bags, mode="sum").view(
            batch, count, -1
        )

    return unmerge


class Expedite(Peer):
    """location: after this layer. cells: (h, w) centers. reach: half the window of cells. The rest as in the paper."""

    def __init__(
        self,
        found: FoundEncoder,
        location: int,
        cells: Sequence[int],
        tau: float = 0.02,
        iterations: int = 5,
        reach: int = 2,
        num_neighbors: int = 20,
        restore_at: str = "decoder",
    ) -> None:
        super().__init__(found, restore_at)
        self.check_location(location)
        self.location, self.cells = location, two_cells(cells)
        self.tau, self.iterations, self.reach, self.num_neighbors = tau, iterations, reach, num_neighbors

    def add_hooks(self) -> None:
        self.merge_before(self.location, self.merge)

    def merge(self, tokens: Tensor) -> Tensor:
        if self.cells[0] * self.cells[1] >= self.num_tokens:
            return tokens
        centers = cluster(tokens, self.grid, self.cells, self.tau, self.iterations, self.reach)
        self.unmerge = reconstruction(tokens, centers, self.tau, self.num_neighbors)
        return centers


def apply(model: nn.Module, **settings: Any) -> Applied:
    """Expedite on a transformers model; settings as of `Expedite`."""
    return attach(model, Expedite, **settings)
