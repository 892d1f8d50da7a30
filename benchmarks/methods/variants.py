"""Other ways to choose clusters than the library's, to see whether one of them is better.

Each is a function from Tensor[B, N, C], the grid and M to TokenClusters. The registry of methods has them under the
names of CLUSTERINGS. Those that need the model (attention keys) are made for it by OF_MODEL.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ailurus_hf import TokenClusters, spatial_density_peaks
from ailurus_hf.clustering import ClusterFunction, kmeans, local_kmeans
from ailurus_hf.clustering.density_peaks import density_peaks
from ailurus_hf.clustering.neighbors import grid_neighbors, nearest_unmasked, neighbor_distances
from ailurus_hf.clustering.ward import adjacent_clusters
from ailurus_hf.vision.discovery import find_encoders

from ..peers.controls import to_nearest_center

NEIGHBORS, ALPHA = 50, 0.9
# Adjacent tokens, sides and corners; and two rings of them.
ADJACENT, AROUND = 8, 24


@torch.no_grad()
def peaks_then_farthest(tokens: Tensor, grid: tuple[int, ...], num_clusters: int) -> TokenClusters:
    """Half of the centers are density peaks; each next one is the token that is least like all centers so far."""
    tokens = tokens.float()
    batch, count = tokens.shape[:2]
    first = spatial_density_peaks(tokens, grid, -(-num_clusters // 2)).centers
    assert first is not None
    is_center = torch.zeros(batch, count, dtype=torch.bool, device=tokens.device).scatter(1, first, True)
    chosen = tokens.gather(1, first[..., None].expand(-1, -1, tokens.shape[2]))
    apart = torch.cdist(tokens, chosen).amin(-1)
    for _ in range(num_clusters - first.shape[1]):
        farthest = apart.masked_fill(is_center, -1.0).argmax(1, keepdim=True)
        is_center.scatter_(1, farthest, True)
        center = tokens.gather(1, farthest[..., None].expand(-1, -1, tokens.shape[2]))
        apart = torch.minimum(apart, torch.linalg.vector_norm(tokens - center, dim=-1))
    centers = is_center.nonzero()[:, 1].view(batch, num_clusters)
    return to_nearest_center(tokens, grid, centers)


@torch.no_grad()
def peaks_then_kmeans(tokens: Tensor, grid: tuple[int, ...], num_clusters: int, num_rounds: int = 2) -> TokenClusters:
    """Density peaks, then rounds in which each token goes to the most similar mean of the clusters that touch it."""
    tokens = tokens.float()
    clusters = spatial_density_peaks(tokens, grid, num_clusters)
    index = grid_neighbors(grid, AROUND, tokens.device).index
    own = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
    positions = torch.cat([own, index], 1)
    rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None]
    for _ in range(num_rounds):
        candidates = clusters.assignment[:, positions]
        means = clusters.merge(tokens)[rows, candidates]
        nearest = (means - tokens[:, :, None]).square().sum(-1).argmin(-1, keepdim=True)
        # Centers need not stay in their own clusters, so there are none.
        clusters = TokenClusters.from_assignment(candidates.gather(2, nearest).squeeze(-1), num_clusters)
    return clusters


@torch.no_grad()
def edges_weighted(tokens: Tensor, grid: tuple[int, ...], num_clusters: int) -> TokenClusters:
    """Density peaks whose distances count more where a token differs from what is around it: more centers at edges."""
    tokens = tokens.float()
    around = neighbor_distances(tokens, grid_neighbors(grid, ADJACENT, tokens.device)).mean(-1)
    edge = around / around.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    def weighted(sigma: Tensor, rank: Tensor, index: Tensor) -> Tensor:
        return _by_rank(sigma, rank, index) * (edge[..., None] + edge[:, index]) / 2

    return _density_peaks(tokens, grid, num_clusters, weighted)


@torch.no_grad()
def by_distance(tokens: Tensor, grid: tuple[int, ...], num_clusters: int) -> TokenClusters:
    """Density peaks whose spatial term grows with the distance on the grid and not with the rank of it."""
    reach = (NEIGHBORS / math.pi) ** 0.5

    def weighted(sigma: Tensor, rank: Tensor, index: Tensor) -> Tensor:
        positions = _coordinates(grid, tokens.device)
        apart = torch.linalg.vector_norm(positions[:, None] - positions[index], dim=-1)
        return sigma * ((1 - ALPHA) * apart / reach + ALPHA)

    return _density_peaks(tokens.float(), grid, num_clusters, weighted)


@torch.no_grad()
def positions_as_features(
    tokens: Tensor, grid: tuple[int, ...], num_clusters: int, weight: float = 1.0
) -> TokenClusters:
    """Density peaks of all pairs on features to which row and column are appended; no other spatial term.

    weight: how far apart two tokens at λ's distance are, in standard deviations of the tokens.
    """
    tokens = tokens.float()
    spread = (tokens - tokens.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()[:, None, None]
    positions = _coordinates(grid, tokens.device) * weight * spread / (NEIGHBORS / math.pi) ** 0.5
    both = torch.cat([tokens, positions], -1) * (1 + len(grid) / tokens.shape[2]) ** 0.5  # σ is divided by √C
    return spatial_density_peaks(both, grid, num_clusters, num_spatial_neighbors=0)


def exact_ward(tokens: Tensor, grid: tuple[int, ...], num_clusters: int) -> TokenClusters:
    """Ward's clustering on the grid graph: of adjacent clusters, those two are joined whose union adds least variance.

    Greedy, one pair at a time, by the variance inside clusters, on the CPU: a reference for `ward`, and far slower.
    """
    assignments = [_ward(image, grid, num_clusters) for image in tokens.float().cpu()]
    return TokenClusters.from_assignment(torch.stack(assignments).to(tokens.device), num_clusters)


def _ward(tokens: Tensor, grid: tuple[int, ...], num_clusters: int) -> Tensor:
    count = len(tokens)
    means, sizes = list(tokens.double().numpy()), [1] * count
    near: list[set[int]] = [set() for _ in range(count)]

    def cost(a: int, b: int) -> float:
        difference = means[a] - means[b]
        return sizes[a] * sizes[b] / (sizes[a] + sizes[b]) * float(difference @ difference)

    heap = []
    itself, *following = adjacent_clusters(torch.arange(count)[None], grid)[0].unbind(1)
    for a, b in torch.cat([torch.stack([itself, there], 1)[itself != there] for there in following]).tolist():
        near[a].add(b)
        near[b].add(a)
        heap.append((cost(a, b), a, b))
    heapq.heapify(heap)
    # Every union is a new cluster; `parent` leads from what it was made of to it.
    parent, alive, left = list(range(count)), [True] * count, count
    while left > num_clusters:
        _, a, b = heapq.heappop(heap)
        if not (alive[a] and alive[b]):
            continue
        left -= 1
        new, size = len(means), sizes[a] + sizes[b]
        means.append((sizes[a] * means[a] + sizes[b] * means[b]) / size)
        sizes.append(size)
        parent[a] = parent[b] = new
        parent.append(new)
        alive[a] = alive[b] = False
        alive.append(True)
        near.append((near[a] | near[b]) - {a, b})
        for other in near[new]:
            near[other] -= {a, b}
            near[other].add(new)
            heapq.heappush(heap, (cost(new, other), new, other))
    for child in reversed(range(len(parent))):
        parent[child] = parent[parent[child]]
    _, labels = torch.tensor(parent[:count]).unique(return_inverse=True)
    return labels


def keys_at(model: nn.Module, location: int, clustering: ClusterFunction) -> ClusterFunction:
    """The clustering on the attention keys that the layer after `location` computes, instead of the tokens."""
    layer = find_encoders(model)[0].layers[location]

    @torch.no_grad()
    def cluster(tokens: Tensor, grid: tuple[int, ...], num_clusters: int) -> TokenClusters:
        return clustering(layer.attention.k_proj(layer.layernorm_before(tokens)), grid, num_clusters)

    return cluster


def _coordinates(grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Tensor[N, dimensions]: row and column of each token."""
    return torch.cartesian_prod(*(torch.arange(side, device=device) for side in grid)).float()


def _by_rank(sigma: Tensor, rank: Tensor, index: Tensor) -> Tensor:
    return sigma * ((1 - ALPHA) * rank / rank.shape[1] + ALPHA)  # Eq. 2


def _density_peaks(
    tokens: Tensor, grid: tuple[int, ...], num_clusters: int, weighted: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> TokenClusters:
    """Density peaks (k = 1) by another weight than Eq. 2's: from σ, ranks and the neighbors' indices."""
    neighbors = grid_neighbors(grid, NEIGHBORS, tokens.device)
    sigma = neighbor_distances(tokens, neighbors) / math.sqrt(tokens.shape[2])
    distances = weighted(sigma, neighbors.rank, neighbors.index)
    index = neighbors.index.expand(len(tokens), -1, -1)
    return density_peaks(distances, index, num_clusters, 1, lambda no_center: nearest_unmasked(no_center, grid))


CLUSTERINGS: dict[str, ClusterFunction] = {
    "peaks, then farthest": peaks_then_farthest,
    "peaks, then k-means": peaks_then_kmeans,
    "edges weighted": edges_weighted,
    "by distance": by_distance,
    "positions as features": positions_as_features,
    "exact Ward": exact_ward,
}
OF_MODEL: dict[str, Callable[[nn.Module, int], ClusterFunction]] = {
    "peaks of keys": functools.partial(keys_at, clustering=spatial_density_peaks),
    "local k-means of keys": functools.partial(keys_at, clustering=local_kmeans),
    "k-means of keys": functools.partial(keys_at, clustering=kmeans),
}
