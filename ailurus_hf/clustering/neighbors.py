"""Spatial neighbors on a token grid: the nearest tokens of each (cached tables), and feature distances to just those.

Tables depend on the grid alone and not on an image, so they are made once per grid and device. Distances are row
products on a CPU, and elsewhere matrix products over tiles of the grid: for each tile of tokens, one product with the
union of its neighbors.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_features, check_num_clusters
from ..clusters import stable_argsort
from ..errors import AiluRusError
from ..exporting import is_exporting, takes_operators
from ..grid_cache import grid_table
from ..precision import without_autocast
from .rows import chunk_length, row_norms, row_products

Grid = tuple[int, ...]

# Up to this many multiply-adds, distances of all pairs are computed by subtraction, which is exact for near-equal
# tokens.
DIRECT_DISTANCE_LIMIT = 2**22
# A tile's side: 8 was fastest on 32x32 to 128x128 grids (4 copies more, 16 multiplies more).
TILE_SIDE = 8
# Squared distances below this share of the squared norms are rounding errors: such tokens count as equal.
EQUALITY_TOLERANCE = 2e-6


def check_grid(grid: Sequence[int], num_tokens: int) -> Grid:
    """The grid as a tuple, (H, W) or (T, H, W); raises AiluRusError where its product is not the number of tokens."""
    # operator.index also makes a size that torch.compile keeps symbolic a number: tables exist for numbers only.
    checked = tuple(operator.index(side) for side in grid)
    if len(checked) not in (2, 3) or min(checked) < 1:
        raise AiluRusError(f"grid must be (H, W) or (T, H, W) with sides of at least 1, got {tuple(grid)}")
    if math.prod(checked) != num_tokens:
        raise AiluRusError(f"grid {checked} has {math.prod(checked)} cells, but there are {num_tokens} tokens")
    return checked


def check_input(features: Tensor, grid: Sequence[int], num_clusters: int, check_finite: bool) -> Grid:
    """The grid as a tuple; AiluRusError unless features are Tensor[B, N, C], the grid is theirs and M in [1, N]."""
    check_features(features, check_finite)
    grid = check_grid(grid, features.shape[1])
    check_num_clusters(num_clusters, math.prod(grid))
    return grid


@dataclass(frozen=True, eq=False)
class TilePlan:
    """How to compute products of tokens and their candidates, tile by tile.

    Args:
        queries: LongTensor[tiles, Q], the token indices of each tile.
        keys: LongTensor[tiles, K], the union of the candidates of a tile's tokens, padded by repetition.
        local: LongTensor[tiles, Q, k], the positions of each token's candidates in `keys`.
        slot: LongTensor[N], each token's position in the flattened tiles.
    """

    queries: Tensor
    keys: Tensor
    local: Tensor
    slot: Tensor


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The k nearest tokens of each token on the grid, itself left out.

    Args:
        index: LongTensor[N, k], ascending, so that the first of equal minima is the one of lowest index.
        rank: Tensor[N, k] (fp32), the neighbor's rank by grid distance: 1 is nearest, ties to the lower index.
        plan: how to compare tokens with these neighbors.
    """

    index: Tensor
    rank: Tensor
    plan: TilePlan


@grid_table
def grid_neighbors(grid: Grid, num_neighbors: int, device: torch.device) -> Neighbors:
    """The `num_neighbors` nearest tokens of each token on a grid (clipped to N - 1), exact at the borders."""
    count = min(num_neighbors, math.prod(grid) - 1)
    index, rank = _nearest_tokens(grid, count)
    by_index = index.argsort(dim=1)
    index, rank = index.gather(1, by_index), rank.gather(1, by_index)
    return Neighbors(index.to(device), rank.float().to(device), tile_plan(grid, index, device))


def tile_plan(grid: Grid, candidates: Tensor, device: torch.device) -> TilePlan:
    """Tiles for products between the tokens of a grid and their candidates, LongTensor[N, k] (tokens or clusters)."""
    tokens = torch.arange(math.prod(grid)).view(grid)
    starts = [_tile_starts(side) for side in grid]
    tiles = [tokens[tuple(slice(s, s + TILE_SIDE) for s in corner)].flatten() for corner in itertools.product(*starts)]
    unions = [torch.unique(candidates[tile]) for tile in tiles]
    width = max(len(union) for union in unions)
    # An unpadded union is sorted, so a candidate is found by bisection; the padding repeats the last entry.
    keys = torch.stack([torch.cat([u, u[-1:].expand(width - len(u))]) if len(u) else u for u in unions])
    queries = torch.stack(tiles)
    wanted = candidates[queries].flatten(1)
    local = torch.searchsorted(keys, wanted).view(*queries.shape, -1)
    slot = torch.empty(math.prod(grid), dtype=torch.long)
    # Flush border tiles overlap their neighbors; any one copy of a token serves.
    slot[queries.flatten()] = torch.arange(queries.numel())
    return TilePlan(queries.to(device), keys.to(device), local.to(device), slot.to(device))


def neighbor_distances(features: Tensor, neighbors: Neighbors) -> Tensor:
    """Euclidean distance of each token to its neighbors: Tensor[B, N, C] (fp32) to [B, N, k]."""
    batch, tokens, channels = features.shape
    if tokens * tokens * channels <= DIRECT_DISTANCE_LIMIT and not torch.onnx.is_in_onnx_export():
        every = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        return every.gather(2, neighbors.index.expand(batch, -1, -1))
    relative = features - middle_token(features)
    norms = row_norms(relative)
    scale = norms[..., None] + norms[:, neighbors.index]
    squared = scale - 2 * _products(relative, relative, neighbors.index, neighbors.plan)
    return torch.where(squared <= EQUALITY_TOLERANCE * scale, 0.0, squared).sqrt()


def middle_token(features: Tensor) -> Tensor:
    """Each image's token of median norm, Tensor[B, N, C] to [B, 1, C], to take all others relative to it.

    |a - b|^2 = |a|^2 + |b|^2 - 2ab loses the distance where norms are large beside it. The token of median norm is no
    outlier, and subtracting a token (and not the mean) leaves whole numbers whole, and so equal distances equal.
    """
    _, tokens, channels = features.shape
    middle = stable_argsort(torch.linalg.vector_norm(features, dim=-1))[:, (tokens - 1) // 2]
    return features.gather(1, middle[:, None, None].expand(-1, 1, channels))


def candidate_scores(tokens: Tensor, centers: Tensor, candidates: Tensor, plan: TilePlan) -> Tensor:
    """|center|^2 / 2 - token . center of each token's candidates: [B, N, C], [B, M, C] to [B, N, k]; least is
    nearest."""
    return centers.square().sum(-1)[:, candidates] / 2 - _products(tokens, centers, candidates, plan)


def nearest_unmasked(masked: Tensor, grid: Grid) -> Tensor:
    """The token nearest on the grid that is not masked: BoolTensor[B, N] to LongTensor[B, N], ties to the lower index.

    An exact distance transform, one axis after the other, over keys (squared distance, index): memory N times a side.
    """
    tokens = math.prod(grid)
    index = torch.arange(tokens, device=masked.device)
    far = tokens * (sum(side * side for side in grid) + 1)
    # 32-bit keys halve the time, and are wide enough for all but huge grids.
    kind = torch.int32 if far < 2**30 else torch.int64
    key = torch.where(masked, far, index).to(kind).view(-1, *grid)
    for axis, side in enumerate(grid, start=1):
        step = torch.arange(side, device=masked.device)
        gap = ((step[:, None] - step).square() * tokens).to(kind)
        # Reduced over a middle dimension, which vectorizes: [B, from, to, the other axes].
        along = key.movedim(axis, 1).contiguous()
        nearest = (along.unsqueeze(2) + gap.view(side, side, *(1,) * (len(grid) - 1))).amin(1)
        key = nearest.movedim(1, axis)
    return (key % tokens).flatten(1).long()


def _nearest_tokens(grid: Grid, count: int) -> tuple[Tensor, Tensor]:
    """Indices and ranks (1: nearest) of each token's `count` nearest, LongTensor[N, count] each, sorted by rank."""
    tokens = math.prod(grid)
    coordinates = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(tokens, len(grid))
    sides = torch.tensor(grid)
    # A corner has the fewest tokens near it, so a radius that suffices there suffices everywhere.
    from_corner = coordinates.square().sum(1).sort().values
    radius = math.isqrt(int(from_corner[count]) - 1) + 1 if count else 0
    window = torch.minimum(torch.tensor(2 * radius + 1), sides)
    start = torch.minimum((coordinates - radius).clamp(min=0), sides - window)
    offsets = torch.cartesian_prod(*(torch.arange(int(side)) for side in window)).view(-1, len(grid))
    # Tokens at the same position in their window have the same order of neighbors: sort once per position.
    strides = torch.tensor([math.prod(window[axis + 1 :].tolist()) for axis in range(len(grid))])
    positions, pattern = ((coordinates - start) * strides).sum(1).unique(return_inverse=True)
    squared = (offsets[positions][:, None, :] - offsets).square().sum(-1)
    order = squared.argsort(dim=1, stable=True)[:, 1 : count + 1]
    grid_strides = torch.tensor([math.prod(grid[axis + 1 :]) for axis in range(len(grid))])
    index = (start * grid_strides).sum(1)[:, None] + (offsets * grid_strides).sum(1)[order[pattern]]
    rank = torch.arange(1, count + 1).expand(tokens, count)
    return index, rank


def _tile_starts(side: int) -> list[int]:
    last = max(side - TILE_SIDE, 0)
    return [min(start, last) for start in range(0, side, TILE_SIDE)]


@without_autocast
def _products(tokens: Tensor, others: Tensor, candidates: Tensor, plan: TilePlan) -> Tensor:
    """Products of each token with its candidates: [B, N, C], [B, L, C] and LongTensor[N, k] to [B, N, k]."""
    batch, _, channels = tokens.shape
    if takes_operators(tokens):
        return row_products(tokens, others, candidates.expand(batch, -1, -1))
    tiles, tile_size = plan.queries.shape
    bytes_per_tile = 4 * channels * (tile_size + plan.keys.shape[1])
    at_once = chunk_length(bytes_per_tile, tokens.device)
    products = []
    pairs = torch.arange(batch * tiles, device=tokens.device)
    # An exported program takes any batch: how many chunks there are must not depend on it.
    for chunk in (pairs,) if is_exporting() else pairs.split(at_once):
        image, tile = chunk // tiles, chunk % tiles
        queries, keys = _rows(tokens, plan.queries, image, tile), _rows(others, plan.keys, image, tile)
        products.append((queries @ keys.transpose(1, 2)).gather(2, plan.local[tile]))
    return torch.cat(products).view(batch, tiles * tile_size, -1).index_select(1, plan.slot)


def _rows(table: Tensor, index: Tensor, image: Tensor, tile: Tensor) -> Tensor:
    """table[image, index[tile]] for each pair: [B, L, C] to [pairs, I, C]."""
    flat = (index[tile] + image[:, None] * table.shape[1]).flatten()
    return table.flatten(0, 1).index_select(0, flat).view(-1, index.shape[1], table.shape[2])
