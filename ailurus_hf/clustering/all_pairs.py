"""The same clusters from a few dense products over all pairs, where a launch costs more than arithmetic.

On a CPU tokens are compared with their neighbors alone, tile by tile (neighbors.py). A GPU multiplies a 1024 x 256
matrix in the time that a launch takes, so there all pairs are compared and those that are not wanted are masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid_cache import grid_table
from ..precision import without_autocast
from .neighbors import DIRECT_DISTANCE_LIMIT, EQUALITY_TOLERANCE, Grid, grid_neighbors, middle_token

# Pairs of one image: a matrix of 16 MB in fp32.
MOST_PAIRS = 2**22


def prefers_all_pairs(pairs: int, device: torch.device) -> bool:
    """Whether to compare all pairs of an image on a device. What it costs on a GPU was counted, not measured."""
    return device.type != "cpu" and pairs <= MOST_PAIRS


@dataclass(frozen=True, eq=False)
class AllPairs:
    """What a grid says of all pairs of its tokens.

    weight: Tensor[N, N] (fp32), s of Eq. 2: the discount on a neighbor's distance.
    is_no_neighbor: BoolTensor[N, N].
    squared_distance: Tensor[N, N] (fp32), on the grid.
    """

    weight: Tensor
    is_no_neighbor: Tensor
    squared_distance: Tensor

    def nearest_unmasked(self, masked: Tensor) -> Tensor:
        """The nearest unmasked token on the grid: BoolTensor[B, N] to LongTensor[B, N], ties to the lower index."""
        return self.squared_distance.masked_fill(masked[:, None], math.inf).argmin(-1)


@grid_table
def all_pairs(grid: Grid, num_neighbors: int, alpha: float, device: torch.device) -> AllPairs:
    """Weights of the `num_neighbors` nearest tokens on the grid, and all distances on it."""
    neighbors = grid_neighbors(grid, num_neighbors, torch.device("cpu"))
    count = math.prod(grid)
    rank = torch.zeros(count, count).scatter(1, neighbors.index, neighbors.rank)
    cells = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(count, -1)
    # Whole numbers, so exact; one axis at a time, to hold no [N, N, axes].
    squared = sum((axis[:, None] - axis).square() for axis in cells.unbind(1))
    assert isinstance(squared, Tensor)
    weight = (1 - alpha) * rank / num_neighbors + alpha
    return AllPairs(weight.to(device), (rank == 0).to(device), squared.float().to(device))


@without_autocast
def pairwise_distances(features: Tensor) -> Tensor:
    """Euclidean distances of all tokens, Tensor[B, N, C] (fp32) to [B, N, N]; computed as in `neighbor_distances`."""
    tokens, channels = features.shape[1:]
    if tokens * tokens * channels <= DIRECT_DISTANCE_LIMIT:
        return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    features = features - middle_token(features)
    norms = features.square().sum(-1)
    scale = norms[:, :, None] + norms[:, None]
    squared = torch.baddbmm(scale, features, features.transpose(1, 2), alpha=-2)
    return squared.masked_fill(squared <= EQUALITY_TOLERANCE * scale, 0.0).sqrt()


@dataclass(frozen=True, eq=False)
class AllCells:
    """What a grid divided into M cells says of all pairs of a token and a cell.

    closed: Tensor[N, M], infinite where a cell is not around a token, else 0.
    share: Tensor[M, N], 1 / size for the tokens of each cell: times features, the cells' means.
    """

    closed: Tensor
    share: Tensor


@grid_table
def _one_hot(count: int, device: torch.device) -> Tensor:
    """Tensor[count, count], a row for each number, 1 at the number."""
    return torch.eye(count).to(device)


def membership(assignment: Tensor, num_clusters: int) -> Tensor:
    """LongTensor[B, N] in [0, M) as Tensor[B, N, M] (fp32), 1 at each token's cluster, else 0; one launch."""
    rows = _one_hot(num_clusters, assignment.device).index_select(0, assignment.flatten())
    return rows.view(*assignment.shape, num_clusters)


def all_scores(features: Tensor, means: Tensor) -> Tensor:
    """|mean|^2 / 2 - token . mean of all pairs: [B, N, C], [B, M, C] to [B, N, M]; least is nearest."""
    half_norms = means.square().sum(-1)[:, None]
    return torch.baddbmm(half_norms, features, means.transpose(1, 2), beta=0.5, alpha=-1)


@without_autocast
def kmeans_rounds(features: Tensor, cells: AllCells, num_rounds: int) -> tuple[Tensor, Tensor]:
    """The cell that each token joins in rounds of k-means among the cells around it, and how many join each.

    Args:
        features: Tensor[B, N, C] (fp32), of mean 0.
        cells: of the features' grid.
        num_rounds: at least 1.

    Returns:
        LongTensor[B, N] and Tensor[B, M].
    """
    batch = features.shape[0]
    num_cells = cells.share.shape[0]
    # One product gives sums and counts.
    counted = torch.nn.functional.pad(features, (0, 1), value=1.0)
    means = cells.share.expand(batch, -1, -1) @ features
    is_empty = None
    for number in range(num_rounds):
        scores = all_scores(features, means) + cells.closed
        if is_empty is not None:
            scores = scores.masked_fill(is_empty, math.inf)
        assignment = scores.argmin(-1)
        member = membership(assignment, num_cells)
        if number == num_rounds - 1:
            return assignment, member.sum(1)
        sums = member.transpose(1, 2) @ counted
        counts = sums[..., -1:]
        means = sums[..., :-1] / counts.clamp_min(1)
        # A cell that lost all its tokens has no mean to be near to.
        is_empty = counts.transpose(1, 2) == 0
    raise AssertionError("num_rounds is at least 1")
