"""Smooth unmerging against plain loops, and where it must be the plain unmerging."""

import math

import pytest
import torch

from ailurus_hf import local_kmeans, spatial_density_peaks
from ailurus_hf.clustering.neighbors import grid_neighbors
from ailurus_hf.clustering.smooth_unmerge import NUM_NEIGHBORS, WIDTH, smoothing


def tokens(grid, batch=2, channels=6, seed=0):
    return torch.randn(batch, math.prod(grid), channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [(5, 7), (9, 4), (1, 40), (2, 4, 5), (1, 2)])
@pytest.mark.parametrize("clustering", [spatial_density_peaks, local_kmeans])
def test_equals_plain_loops(grid, clustering):
    x = tokens(grid)
    count = math.prod(grid)
    clusters = clustering(x, grid, max(count // 4, 1))
    values = torch.randn(2, clusters.num_clusters, 3, generator=torch.Generator().manual_seed(1))
    got = smoothing(clusters, x, grid).unmerge(values)
    neighbors = grid_neighbors(grid, NUM_NEIGHBORS, x.device).index
    own = clusters.unmerge(clusters.merge(x))
    for b in range(2):
        within = (x[b] - own[b]).double().square().sum(-1).mean()
        for i in range(count):
            near = [i, *neighbors[i].tolist()]
            weight = [math.exp(-(x[b, i] - x[b, j]).double().square().sum() / (WIDTH * within)) for j in near]
            want = sum(w * values[b, clusters.assignment[b, j]] for w, j in zip(weight, near, strict=True)) / sum(
                weight
            )
            torch.testing.assert_close(got[b, i], want.float(), rtol=1e-4, atol=1e-5)


def test_tokens_that_equal_their_representatives_take_them_alone():
    grid = (6, 8)
    regions = torch.arange(48).view(grid) // 16  # three bands of two rows
    x = tokens((1, 3), batch=1)[:, regions.flatten()]
    clusters = spatial_density_peaks(x, grid, 3)
    values = tokens((1, 3), batch=1, seed=3)
    torch.testing.assert_close(smoothing(clusters, x, grid).unmerge(values), clusters.unmerge(values))


def test_a_constant_image_stays_finite():
    x = torch.ones(1, 48, 4)
    clusters = local_kmeans(x, (6, 8), 12)
    out = smoothing(clusters, x, (6, 8)).unmerge(torch.ones(1, 12, 4))
    torch.testing.assert_close(out, torch.ones(1, 48, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_representatives_alone(dtype):
    x = tokens((6, 8)).to(dtype).requires_grad_()
    clusters = local_kmeans(x, (6, 8), 12)
    values = tokens((3, 4)).to(dtype).requires_grad_()
    out = smoothing(clusters, x, (6, 8)).unmerge(values)
    assert out.dtype == dtype and out.shape == (2, 48, 6)
    out.sum().backward()
    assert x.grad is None
    torch.testing.assert_close(values.grad.sum().float(), torch.tensor(2.0 * 48 * 6), rtol=2e-2, atol=0)


def test_an_image_is_unmerged_alike_alone_and_in_a_batch():
    x = tokens((6, 8), batch=3) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    values = tokens((3, 4), batch=3)
    together = smoothing(local_kmeans(x, (6, 8), 12), x, (6, 8)).unmerge(values)
    for image in range(3):
        one = slice(image, image + 1)
        alone = smoothing(local_kmeans(x[one], (6, 8), 12), x[one], (6, 8)).unmerge(values[one])
        torch.testing.assert_close(alone[0], together[image])
