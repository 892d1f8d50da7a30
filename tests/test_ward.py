"""Ward's clustering: near to the exact one, of less variance than the other ways, on any grid, alone and in a batch."""

import importlib
import math

import pytest
import torch
from models import images, make_model, run
from oracle import GRIDS

from ailurus_hf import AiluRusError, ailurus_status, apply_ailurus, local_kmeans, remove_ailurus, spatial_density_peaks
from ailurus_hf.clustering.ward import adjacent_places, ward
from benchmarks.variants import exact_ward


def tokens(grid, batch=1, channels=8):
    """Regions of 4 x 4 places, and noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, channels, *(-(-side // 4) for side in grid), generator=generator)
    for axis, side in enumerate(grid):
        coarse = coarse.repeat_interleave(4, axis + 2).narrow(axis + 2, 0, side)
    smooth = coarse.flatten(2).transpose(1, 2)
    return smooth + 0.2 * torch.randn(smooth.shape, generator=generator)


def variance(x, clusters):
    return (x - clusters.unmerge(clusters.merge(x))).square().sum().item()


@pytest.mark.parametrize("grid, num_clusters", GRIDS)
def test_so_many_connected_clusters_the_same_alone_and_in_a_batch(grid, num_clusters):
    x = tokens(grid, 2)
    found = ward(x, grid, num_clusters)
    assert found.num_clusters == num_clusters and found.counts.min() >= 1 and found.centers is None
    assert torch.equal(ward(x[1:], grid, num_clusters).assignment, found.assignment[1:])
    a, b = adjacent_places(tuple(grid), torch.device("cpu")).unbind(1)
    for assignment in found.assignment:
        # From the first token of a cluster, steps between adjacent tokens of it reach all others.
        first = torch.full((num_clusters,), math.prod(grid)).scatter_reduce(
            0, assignment, torch.arange(len(assignment)), "amin"
        )
        reached = torch.zeros(len(assignment), dtype=torch.bool).index_fill(0, first, True)
        inside = assignment[a] == assignment[b]
        for _ in range(len(assignment)):
            reached[b[inside & reached[a]]] = True
            reached[a[inside & reached[b]]] = True
        assert reached.all()


def test_near_to_the_exact_one_and_better_than_the_others(monkeypatch):
    grid, x = (12, 16), tokens((12, 16))
    exact, fast = variance(x, exact_ward(x, grid, 40)), variance(x, ward(x, grid, 40))
    assert exact <= 1.001 * fast
    assert fast < min(variance(x, other(x, grid, 40)) for other in (local_kmeans, spatial_density_peaks))
    # One pair a round, the cheapest: the exact one.
    monkeypatch.setattr(importlib.import_module("ailurus_hf.clustering.ward"), "SHARE", 0.0)
    same = [f(x, grid, 40).assignment[0] for f in (ward, exact_ward)]
    assert torch.equal(*(each[:, None] == each for each in same))


def test_finds_regions_of_any_shape():
    x = torch.zeros(1, 64, 4)
    x.view(1, 8, 8, 4)[:, 1:7, 2:7] = 1
    clusters = ward(x, (8, 8), 2)
    assert sorted(clusters.counts[0].tolist()) == [30, 34]
    torch.testing.assert_close(clusters.unmerge(clusters.merge(x)), x)


def test_nan_gives_some_clusters_and_bad_input_names_the_number():
    x = tokens((6, 8))
    x[0, 3] = math.nan
    assert ward(x, (6, 8), 12).counts.sum() == 48
    with pytest.raises(AiluRusError, match="1 of 48 tokens"):
        ward(x, (6, 8), 12, check_finite=True)
    with pytest.raises(AiluRusError, match="between 1 and the 48 tokens, got 0"):
        ward(x, (6, 8), 0)


@pytest.mark.parametrize("restore", ["copy", "smooth", "residual"])
def test_on_a_model_and_never_silently_in_one_graph(restore):
    model, x = make_model("ViTModel"), images(2)
    before = run(model, x).last_hidden_state
    apply_ailurus(model, cluster_location=1, keep_ratio=0.25, clustering="ward", restore=restore)
    after = run(model, x).last_hidden_state
    assert ailurus_status(model).last_clusters.num_clusters == 24 and not torch.equal(before, after)
    with pytest.raises(Exception):  # noqa: B017 (the compiler has errors of its own, by version)
        torch.compile(model, backend="eager", fullgraph=True)(x, interpolate_pos_encoding=True)
    remove_ailurus(model)
    assert torch.equal(run(model, x).last_hidden_state, before)
