"""Tokens move to the most similar of the clusters around them: what joining in few rounds got wrong at borders."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..clusters import TokenClusters
from ..grid_cache import grid_table
from ..precision import without_autocast
from .all_pairs import all_scores, membership
from .neighbors import Grid
from .rows import row_norms, row_products


def moved(features: Tensor, assignment: Tensor, grid: Grid, num_clusters: int) -> Tensor:
    """The cluster of each token after one step of k-means among the clusters of the tokens around it.

    Args:
        features: Tensor[B, N, C] (fp32), relative to their image's mean; finite.
        assignment: LongTensor[B, N], in [0, M).
        grid: of the tokens.
        num_clusters: M.

    Returns:
        LongTensor[B, N]. A cluster may lose all its tokens at once.
    """
    means = TokenClusters.from_assignment(assignment, num_clusters).merge(features)
    candidates = assignment[:, tokens_around(grid, features.device).index.flatten()].view(*assignment.shape, -1)
    norms = row_norms(means).gather(1, candidates.flatten(1)).view(candidates.shape)
    # The token's own cluster comes first: it stays where another is as near.
    nearest = (norms / 2 - row_products(features, means, candidates)).argmin(-1, keepdim=True)
    return candidates.gather(2, nearest).squeeze(2)


@without_autocast
def moved_all_pairs(features: Tensor, assignment: Tensor, grid: Grid, num_clusters: int) -> Tensor:
    """The same by a few dense products, where a launch costs more than arithmetic."""
    member = membership(assignment, num_clusters)
    means = member.transpose(1, 2) @ features / member.sum(1).clamp_min(1)[..., None]
    is_far = _is_around(grid, features.device).expand(member.shape[0], -1, -1) @ member == 0
    return all_scores(features, means).masked_fill(is_far, math.inf).argmin(-1)


@dataclass(frozen=True, eq=False)
class Around:
    """What lies around each token of a grid. A class: torch.compile mixes up the sizes of tables that are tensors.

    index: LongTensor[N, 3 ** axes], the token itself and those at its sides and corners; at borders some appear twice.
    """

    index: Tensor


@grid_table
def tokens_around(grid: Grid, device: torch.device) -> Around:
    """The tokens around each token of a grid."""
    tokens = torch.arange(math.prod(grid)).view(grid)
    around = []
    for steps in sorted(itertools.product((-1, 0, 1), repeat=len(grid)), key=any):
        there = tokens
        for axis, (step, side) in enumerate(zip(steps, grid, strict=True)):
            there = there.index_select(axis, (torch.arange(side) + step).clamp(0, side - 1))
        around.append(there.flatten())
    return Around(torch.stack(around, 1).to(device))


@grid_table
def _is_around(grid: Grid, device: torch.device) -> Tensor:
    """The same, as what it says of all pairs of tokens: Tensor[N, N], 1 where one is around the other, else 0."""
    index = tokens_around(grid, torch.device("cpu")).index
    return torch.zeros(len(index), len(index)).scatter(1, index, 1.0).to(device)
