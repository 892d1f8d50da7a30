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
from .neighbors import Grid, chunk_length, image_rows


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
    (batch, count, channels), num_around = features.shape, 3 ** len(grid)
    candidates = assignment[:, tokens_around(grid, features.device).index.flatten()].view(batch, count, num_around)
    bytes_each = 2 * features.element_size() * batch * num_around * channels
    at_once = count if torch.compiler.is_compiling() else chunk_length(bytes_each, features.device)
    nearest = []
    for tokens, near in zip(features.split(at_once, 1), candidates.split(at_once, 1), strict=True):
        there = image_rows(means, near.flatten(1)).view(batch, -1, num_around, channels)
        # The token's own cluster comes first: it stays where another is as near.
        nearest.append((there - tokens[:, :, None]).square_().sum(-1).argmin(-1, keepdim=True))
    return candidates.gather(2, torch.cat(nearest, 1)).squeeze(2)


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
