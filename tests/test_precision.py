"""Under autocast, as training in half precision has it, clusters are those of fp32."""

import functools

import pytest
import torch

from ailurus_hf.clustering import (
    join_clusters,
    join_regions,
    kmeans,
    local_kmeans,
    merge_clusters,
    pairs,
    spatial_density_peaks,
    ward,
)
from ailurus_hf.clustering.budget import detail
from ailurus_hf.clustering.smooth_unmerge import smoothing
from ailurus_hf.diffusion.cluster_tokens import cluster_tokens

GRID, COUNT, CLUSTERS = (23, 30), 690, 170


def tokens(channels=64):
    """Small differences beside a large common part, so that half precision cannot tell many of them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 1 + COUNT // 5, channels, generator=generator).repeat_interleave(5, 1)[:, :COUNT]
    return 3 + 0.1 * coarse + 0.01 * torch.randn(2, COUNT, channels, generator=generator)


def nested(join):
    def twice(x, grid, num_clusters):
        first = ward(x, grid, 2 * num_clusters)
        return join(first, first.merge(x), x, grid, num_clusters)

    return twice


WAYS = {
    "density peaks": spatial_density_peaks,
    "local k-means": local_kmeans,
    "k-means": kmeans,
    "pairs": pairs,
    "pairs of clusters": nested(join_clusters),
    "Ward": ward,
    "Ward of clusters": nested(join_regions),
    "density peaks of clusters": nested(merge_clusters),
    "diffusion's": functools.partial(cluster_tokens, local_kmeans),
}


@pytest.mark.parametrize("cluster", WAYS.values(), ids=WAYS)
def test_clusters_are_the_same_under_autocast(cluster):
    x = tokens(640 if cluster is WAYS["diffusion's"] else 64)
    expected = cluster(x, GRID, CLUSTERS)
    with torch.autocast("cpu", torch.bfloat16):
        found = cluster(x, GRID, CLUSTERS)
    assert torch.equal(found.assignment, expected.assignment)


@pytest.mark.parametrize("cluster", [spatial_density_peaks, local_kmeans, pairs, ward])
def test_in_a_compiled_graph_too(cluster):
    x = tokens()
    expected = cluster(x, GRID, CLUSTERS)
    compiled = torch.compile(cluster, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x, GRID, CLUSTERS).assignment, expected.assignment)
    assert torch.equal(compiled(x, GRID, CLUSTERS).assignment, expected.assignment)


def test_smoothing_and_detail_are_the_same_under_autocast():
    x = tokens()
    clusters = local_kmeans(x, GRID, CLUSTERS)
    expected, share = smoothing(clusters, x, GRID), detail(x, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        found, same = smoothing(clusters, x, GRID), detail(x, GRID)
    assert torch.equal(found.weight, expected.weight) and torch.equal(same, share)
