"""Nearest centre: one token of each cell of a regular grid is a centre, and a token joins the most similar, wherever that is.

Not in the paper: the matching of ToMe for Stable Diffusion (Bolya and Hoffman 2023, arXiv 2303.17604) for any grid and M.
Meant for self-attention alone, which looks everywhere: tokens far apart may share a key there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_features, check_num_clusters
from ..clusters import TokenClusters
from .local_kmeans import grid_cells
from .neighbours import Grid, check_grid
from .tables import grid_table

# Pairs of a token and a centre that are compared at once: 64 MB of fp32 an image.
PAIRS_AT_ONCE = 2**24


@torch.no_grad()
def nearest_center(
    features: Tensor, grid: Sequence[int], num_clusters: int, *, check_finite: bool = False
) -> TokenClusters:
    """Assigns each token to the centre of the greatest cosine similarity; M · N of them are computed.

    features: Tensor[B, N, C], any float type; the arithmetic is fp32. No gradient flows through the choice.
    grid: (H, W), or (T, H, W) for video; its product is N.
    num_clusters: M, in [1, N]: so many cells, and the middle token of each is a centre, whatever the image.
    check_finite: raise on NaN or infinite features; this waits for the device.

    Raises AiluRusError on a grid that does not match N and on settings out of range.
    """
    check_features(features, check_finite)
    grid = check_grid(grid, features.shape[1])
    batch, tokens = features.shape[0], math.prod(grid)
    check_num_clusters(num_clusters, tokens)
    centers = middles(grid, num_clusters, features.device).expand(batch, -1)
    unit = F.normalize(features.float(), dim=-1)
    ends = unit.gather(1, centers[..., None].expand(-1, -1, unit.shape[2])).transpose(1, 2)
    rows = max(PAIRS_AT_ONCE // num_clusters, 1)
    nearest = torch.cat([(part @ ends).argmax(-1) for part in unit.split(rows, dim=1)], 1)
    # A centre that equals another stays its own.
    own = torch.arange(num_clusters, device=features.device).expand(batch, -1)
    return TokenClusters.from_assignment(nearest.scatter(1, centers, own), num_clusters, centers)


@grid_table
def middles(grid: Grid, num_cells: int, device: torch.device) -> Tensor:
    """LongTensor[M]: of each cell of `grid_cells`, the place nearest to its middle, the first of several."""
    start = grid_cells(grid, num_cells, torch.device("cpu")).start
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid)).double()
    cells = TokenClusters.from_assignment(start[None], num_cells)
    apart = torch.linalg.vector_norm(places - cells.unmerge(cells.merge(places[None]))[0], dim=-1)
    order = apart.argsort(stable=True)
    first = torch.full((num_cells,), len(start)).scatter_reduce(0, start[order], torch.arange(len(start)), "amin")
    return order[first].to(device)
