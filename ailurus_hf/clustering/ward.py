"""Ward's clustering on the grid graph, in rounds: adjacent clusters join where that adds least variance.

Not in the paper. Regions of any shape and size come out, of less variance inside than by density peaks and local k-means,
for some ten rounds of which each waits for the device: it costs several times more, breaks a compiled graph and cannot be
exported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..clusters import TokenClusters
from ..errors import AiluRusError
from .neighbours import Grid, check_input
from .tables import grid_table

# Of the unions that are still to be made, the share that one round makes at most: less is nearer to Ward, and slower.
SHARE = 0.25
# And of the clusters to be left, the share that a round may make at least.
LEAST_SHARE = 0.02


@torch.no_grad()
def ward(features: Tensor, grid: Sequence[int], num_clusters: int, *, check_finite: bool = False) -> TokenClusters:
    """Joins adjacent clusters, from single tokens to M, by Ward's criterion (J. H. Ward, 1963).

    features: Tensor[B, N, C], any float type; the arithmetic is fp32. No gradient flows through the choice.
    grid: (H, W), or (T, H, W) for video; its product is N. Tokens side by side on it are adjacent.
    num_clusters: M, in [1, N].
    check_finite: raise on NaN or infinite features.

    In a round, of the pairs that are each other's cheapest, the cheaper ones join. Joining such pairs in any order leads to the
    same tree as the cheapest pair of all each time, so only where the tree is cut differs, and little.
    Returns TokenClusters without centres; none is empty. Raises AiluRusError on a grid that does not match N, on settings
    out of range, and where it is to be compiled.
    """
    if torch.compiler.is_compiling():
        raise AiluRusError("clustering='ward' waits for the device in every round: compile with 'local_kmeans' instead")
    grid = check_input(features, grid, num_clusters, check_finite)
    pairs = adjacent_places(grid, features.device)
    images = [_join(image, pairs, num_clusters) for image in features.float()]
    return TokenClusters.from_assignment(torch.stack(images), num_clusters)


@grid_table
def adjacent_places(grid: Grid, device: torch.device) -> Tensor:
    """Pairs of places side by side, LongTensor[P, 2], the lower first."""
    places = torch.arange(math.prod(grid)).view(grid)
    pairs = [
        torch.stack([places.narrow(axis, 0, side - 1).flatten(), places.narrow(axis, 1, side - 1).flatten()], 1)
        for axis, side in enumerate(grid)
    ]
    return torch.cat(pairs).to(device)


def _join(tokens: Tensor, pairs: Tensor, num_clusters: int) -> Tensor:
    """The cluster of each token of one image, LongTensor[N]; tokens: Tensor[N, C]."""
    count, device = len(tokens), tokens.device
    # Relative to the image's mean: what all tokens share would only cost precision.
    means, sizes = tokens - tokens.mean(0), torch.ones(count, device=device)

    def costs(pairs: Tensor) -> Tensor:
        a, b = pairs.unbind(1)
        return (means[a] - means[b]).square().sum(-1) * (sizes[a] * sizes[b] / (sizes[a] + sizes[b]))

    # A cluster goes by the number of one of its tokens.
    owner, left, cost = torch.arange(count, device=device), count, costs(pairs)
    while left > num_clusters:
        a, b = pairs.unbind(1)
        order = cost.argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=device)
        cheapest = torch.full((count,), len(order), device=device)
        cheapest = cheapest.scatter_reduce(0, a, rank, "amin").scatter_reduce(0, b, rank, "amin")
        mutual = order[((rank == cheapest[a]) & (rank == cheapest[b]))[order]]
        most = max(round((left - num_clusters) * SHARE), int(num_clusters * LEAST_SHARE), 1)
        mutual = mutual[: min(most, left - num_clusters)]
        kept, gone = a[mutual], b[mutual]
        share = (sizes[gone] / (sizes[kept] + sizes[gone]))[:, None]
        means[kept] = torch.lerp(means[kept], means[gone], share)
        sizes[kept] += sizes[gone]
        now = torch.arange(count, device=device)
        now[gone] = kept
        owner, left = now[owner], left - len(mutual)
        # Only pairs of which one has joined cost something else now, or have become one pair with another.
        joined = torch.zeros(count, dtype=torch.bool, device=device).index_fill(0, torch.cat([kept, gone]), True)
        changed = joined[pairs].any(1)
        again = now[pairs[changed]].sort(1).values
        code = (again[:, 0] * count + again[:, 1])[again[:, 0] != again[:, 1]].unique()
        again = torch.stack([code // count, code % count], 1)
        pairs, cost = torch.cat([pairs[~changed], again]), torch.cat([cost[~changed], costs(again)])
    return owner.unique(return_inverse=True)[1]
