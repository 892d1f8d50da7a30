"""Statistics of a clustering: sizes of clusters, spread inside them, and distances to centers (figure 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clusters import TokenClusters
from ..errors import AiluRusError


@dataclass(frozen=True)
class AssignmentStatistics:
    """Statistics of the clusters of all images of a batch together (the paper's figure 7).

    Args:
        sizes: clusters by their number of tokens, {1: 210, 2: 64, …} (figure 7b; divided by the sum, 7a); empty ones
            are in 0.
        singletons: share of the clusters that hold one token.
        variance: mean squared distance of a token to its cluster's mean, over channels.
        unexplained: its share of the variance of all tokens of the image (0: clusters of equal tokens, 1: no better
            than one mean). NaN where all are equal.
        similarity: mean cosine between a token and its cluster's mean.
        reach: largest distance on the grid, in tokens, between a token and its own center.
        gap: the same between a cell and the nearest center, whoever's it is. Where centers are no tokens, the mean
            position of a cluster stands for one.

    Example:
        >>> tokens = torch.randn(1, 6 * 8, 16)
        >>> assignment_statistics(local_kmeans(tokens, (6, 8), 12), tokens, (6, 8)).gap < 6
        True
    """

    sizes: dict[int, int]
    singletons: float
    variance: float
    unexplained: float
    similarity: float
    reach: float
    gap: float


@torch.no_grad()
def assignment_statistics(clusters: TokenClusters, tokens: Tensor, grid: Sequence[int]) -> AssignmentStatistics:
    """Statistics of an assignment: sizes, spread inside clusters, distances to centers (the paper's figure 7).

    Args:
        clusters: the assignment.
        tokens: what was clustered, Tensor[B, N, C].
        grid: (H, W) or (T, H, W); its product is N.

    Returns:
        Statistics of all images together.

    Raises:
        AiluRusError: the grid or the tokens do not match the assignment.

    Example:
        >>> tokens = torch.randn(1, 6 * 8, 16)
        >>> statistics = assignment_statistics(local_kmeans(tokens, (6, 8), 12), tokens, (6, 8))
        >>> sum(statistics.sizes.values())
        12
    """
    if math.prod(grid) != clusters.num_tokens:
        raise AiluRusError(f"grid {tuple(grid)} has {math.prod(grid)} cells, the assignment {clusters.num_tokens}")
    tokens = tokens.float()
    means = clusters.unmerge(clusters.merge(tokens))
    inside = (tokens - means).square().mean().item()
    around = (tokens - tokens.mean(1, keepdim=True)).square().mean().item()
    cells = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid)).float()
    cells = cells.to(tokens.device).expand(tokens.shape[0], -1, -1)
    if clusters.centers is None:
        centers = clusters.centroids(tuple(grid))
    else:
        centers = cells.gather(1, clusters.centers[..., None].expand(-1, -1, len(grid)))
    nearest = torch.cdist(cells, centers).masked_fill((clusters.counts == 0)[:, None], math.inf).amin(-1)
    counts = clusters.counts.long().flatten()
    sizes = counts.bincount()
    return AssignmentStatistics(
        sizes={size: number for size, number in enumerate(sizes.tolist()) if number},
        singletons=(counts == 1).float().mean().item(),
        variance=inside,
        unexplained=inside / around if around else math.nan,
        similarity=F.cosine_similarity(tokens, means, dim=-1).mean().item(),
        reach=torch.linalg.vector_norm(cells - clusters.unmerge(centers), dim=-1).max().item(),
        gap=nearest.max().item(),
    )
