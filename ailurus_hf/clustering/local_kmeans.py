"""Local k-means: starts from a regular grid of cells, then a few rounds among the cells nearby (as in SLIC
superpixels).

Not in the paper; an alternative to density peaks that costs less, and whose centers are means and not tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_at_least, check_choice
from ..choices import KERNELS, Kernel
from ..clusters import TokenClusters
from ..exporting import leaves_package
from ..grid_cache import grid_table
from .all_pairs import AllCells, kmeans_rounds, prefers_all_pairs
from .base import Clustering, register_clustering
from .neighbors import Grid, TilePlan, candidate_scores, check_input, tile_plan


@register_clustering("local_kmeans")
@dataclass(frozen=True)
class LocalKMeans(Clustering):
    """Rounds of k-means among the cells around each token, by `local_kmeans`.

    Args:
        num_rounds: rounds of assignment, at least 1.
        kernel: what runs the rounds: "torch", or "triton" (the extra "triton"), two launches a round on a GPU. The
            clusters are the same but for rounding. No GPU was measured yet, so it runs only where somebody asks for it.

    Example:
        >>> config = AiluRusConfig(keep_ratio=0.5, clustering=LocalKMeans(num_rounds=5))
    """

    num_rounds: int = 3
    kernel: Kernel = "torch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, num_rounds=self.num_rounds)

    def cluster(self, features: Tensor, grid: Grid, num_clusters: int) -> TokenClusters:
        return local_kmeans(features, grid, num_clusters, num_rounds=self.num_rounds, kernel=self.kernel)


@torch.no_grad()
def local_kmeans(
    features: Tensor,
    grid: Sequence[int],
    num_clusters: int,
    *,
    num_rounds: int = 3,
    kernel: Kernel = "torch",
    check_finite: bool = False,
) -> TokenClusters:
    """Assigns each token to the most similar of the cells around it, for a few rounds.

    Source: the assignment step of SLIC superpixels (R. Achanta et al., PAMI 34, 2012), on features.

    Args:
        features: Tensor[B, N, C] of any float type; the arithmetic is fp32. No gradient flows through the choice.
        grid: (H, W), or (T, H, W) for video; its product is N.
        num_clusters: M, in [1, N].
        num_rounds: rounds of hard assignment to the cells' means.
        kernel: "torch", or "triton" for a GPU, as in `LocalKMeans`. Exported graphs hold torch's operators either way.
        check_finite: raise on NaN or infinite features; this waits for the device.

    Returns:
        TokenClusters without centers; a cell may end up empty: count 0, no weight in attention.

    Raises:
        AiluRusError: the grid does not match N, or a setting is out of range; of kernel="triton", Triton is not there,
            or the features are on a CPU.

    Example:
        >>> clusters = local_kmeans(torch.randn(2, 6 * 8, 16), grid=(6, 8), num_clusters=12)
        >>> clusters.assignment.shape, clusters.num_clusters
        (torch.Size([2, 48]), 12)
    """
    check_choice("kernel", kernel, KERNELS)
    features, grid = prepared(features, grid, num_clusters, num_rounds, check_finite)
    batch = features.shape[0]
    if kernel == "triton" and not leaves_package():
        from .local_kmeans_triton import rounds

        cells = grid_cells(grid, num_clusters, features.device)
        around = tokens_around(grid, num_clusters, features.device)
        assignment = rounds(features, cells.start, cells.candidates, around, num_rounds)
        return TokenClusters.from_assignment(assignment, num_clusters)
    if prefers_all_pairs(features.shape[1] * num_clusters, features.device):
        assignment, counts = kmeans_rounds(features, all_cells(grid, num_clusters, features.device), num_rounds)
        return TokenClusters(assignment, None, counts)
    cells = grid_cells(grid, num_clusters, features.device)
    clusters = TokenClusters.from_assignment(cells.start.expand(batch, -1), num_clusters)
    for _ in range(num_rounds):
        scores = candidate_scores(features, clusters.merge(features), cells.candidates, cells.plan)
        # A cell without tokens has no mean.
        empty = (clusters.counts == 0).gather(1, cells.candidates.flatten().expand(batch, -1))
        scores = scores.masked_fill(empty.view_as(scores), math.inf)
        nearest = scores.argmin(-1, keepdim=True)
        chosen = cells.candidates.expand(batch, -1, -1).gather(2, nearest).squeeze(-1)
        clusters = TokenClusters.from_assignment(chosen, num_clusters)
    return clusters


def prepared(
    features: Tensor, grid: Sequence[int], num_clusters: int, num_rounds: int, check_finite: bool
) -> tuple[Tensor, Grid]:
    """The input of k-means, checked: features in fp32, relative to their image's mean, and the grid."""
    check_at_least(1, num_rounds=num_rounds)
    grid = check_input(features, grid, num_clusters, check_finite)
    features = features.float()
    # What all tokens share would only cost precision.
    return features - features.mean(1, keepdim=True), grid


@dataclass(frozen=True, eq=False)
class Cells:
    """A grid divided into M cells of about equal size, in rows; a video's cells reach through time as far as possible.

    Args:
        start: LongTensor[N], the cell that each token lies in.
        candidates: LongTensor[N, 9] (27 in 3-D), that cell and those around it; at borders some appear twice.
        plan: how to compare tokens with their candidates.
    """

    start: Tensor
    candidates: Tensor
    plan: TilePlan


@grid_table
def grid_cells(grid: Grid, num_cells: int, device: torch.device) -> Cells:
    """Divides a grid into exactly `num_cells` cells, as square in space as possible."""
    coordinates = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid))
    candidates = _cells_around(coordinates, grid, num_cells)
    start = candidates[:, candidates.shape[1] // 2]
    return Cells(start.contiguous().to(device), candidates.to(device), tile_plan(grid, candidates, device))


@grid_table
def all_cells(grid: Grid, num_cells: int, device: torch.device) -> AllCells:
    """The same cells, as what they say of all pairs of a token and a cell."""
    cells = grid_cells(grid, num_cells, torch.device("cpu"))
    closed = torch.full((len(cells.start), num_cells), math.inf).scatter(1, cells.candidates, 0.0)
    member = torch.eye(num_cells)[cells.start].t()
    return AllCells(closed.to(device), (member / member.sum(1, keepdim=True)).to(device))


@grid_table
def tokens_around(grid: Grid, num_cells: int, device: torch.device) -> Tensor:
    """The tokens that each cell is a candidate of: LongTensor[M, K], ascending, the rest -1."""
    candidates = grid_cells(grid, num_cells, torch.device("cpu")).candidates
    count = len(candidates)
    # At borders a token has some candidates twice.
    pairs = (candidates * count + torch.arange(count)[:, None]).unique()
    cell, token = pairs // count, pairs % count
    sizes = cell.bincount(minlength=num_cells)
    place = torch.arange(len(pairs)) - (sizes.cumsum(0) - sizes)[cell]
    table = torch.full((num_cells, int(sizes.max())), -1)
    table[cell, place] = token
    return table.to(device)


def _cells_around(coordinates: Tensor, grid: Grid, num_cells: int) -> Tensor:
    """The cells around each token of LongTensor[P, axes]: LongTensor[P, 3 ** axes], its own in the middle.

    Rows along the first axis share the cells as evenly as whole numbers allow; each row is divided in the same way.
    """
    rows = _num_rows(grid, num_cells)
    row = coordinates[:, 0] * rows // grid[0]
    around = [(row + step).clamp(0, rows - 1) for step in (-1, 0, 1)]
    if len(grid) == 1:
        return torch.stack(around, 1)
    fewer, remainder = divmod(num_cells, rows)
    cells_before = torch.arange(rows + 1) * remainder // rows + torch.arange(rows + 1) * fewer
    has_more = cells_before.diff() > fewer
    within = _cells_around(coordinates[:, 1:], grid[1:], fewer)
    within_more = _cells_around(coordinates[:, 1:], grid[1:], fewer + 1) if remainder else within
    return torch.cat(
        [cells_before[r][:, None] + torch.where(has_more[r][:, None], within_more, within) for r in around], 1
    )


def _num_rows(grid: Grid, num_cells: int) -> int:
    """The number of rows that makes cells square, or one near it that divides them evenly; through time the fewest."""
    if len(grid) == 1:
        return num_cells
    rest = math.prod(grid[1:])
    least, most = -(-num_cells // rest), min(grid[0], num_cells)
    if len(grid) == 3:
        # Frames differ less than regions of a frame, above all where frames share their noise: on real clips, cells
        # that are long in time and small in space kept far more than cubes.
        return least
    square = grid[0] * (num_cells / (grid[0] * rest)) ** (1 / len(grid))
    near = [rows for rows in range(least, most + 1) if abs(math.log(rows / square)) < 0.15]
    return min(near or range(least, most + 1), key=lambda rows: (bool(near) * (num_cells % rows), abs(rows - square)))
