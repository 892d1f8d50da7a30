"""Clusters from products over all pairs: the same as from neighbors tile by tile, which the oracles hold."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle import GRIDS

from ailurus_hf.clustering import all_pairs, join_regions, local_kmeans, spatial_density_peaks, ward


def in_both_forms(cluster, *args, **kwargs):
    """Clusters of the same input, from neighbors alone and from all pairs."""
    found = []
    for prefers in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            # The packages' functions stand before the modules of the same name.
            for module in ("local_kmeans", "density_peaks", "ward"):
                name = f"ailurus_hf.clustering.{module}"
                patch.setattr(sys.modules[name], "prefers_all_pairs", lambda *_, prefers=prefers: prefers)
            found.append(cluster(*args, **kwargs))
    return found


def equal(one, other):
    same = torch.equal(one.assignment, other.assignment) and torch.equal(one.counts, other.counts)
    return same and (one.centers is None or torch.equal(one.centers, other.centers))


@pytest.mark.parametrize("grid, num_clusters", [*GRIDS, ((24, 32), 100), ((1, 2), 1)])
@pytest.mark.parametrize("channels", [6, 200])
@pytest.mark.parametrize("lam, k", [(50, 1), (7, 3), (0, 1)])
def test_density_peaks_are_the_same(grid, num_clusters, channels, lam, k):
    generator = torch.Generator().manual_seed(math.prod(grid))
    options = {"num_spatial_neighbors": lam, "num_density_neighbors": k}
    for x in (
        torch.randn(2, math.prod(grid), channels, generator=generator),
        torch.randint(-2, 3, (2, math.prod(grid), channels), generator=generator).float(),
    ):
        assert equal(*in_both_forms(spatial_density_peaks, x, grid, num_clusters, **options))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_density_peaks_are_the_same_on_ties(data):
    grid = data.draw(st.sampled_from([(4, 7), (1, 9), (3, 4, 5)]), label="grid")
    count = math.prod(grid)
    x = torch.from_numpy(data.draw(arrays("int8", (2, count, 3), elements=st.integers(-2, 2)), label="x")).float()
    num_clusters = data.draw(st.integers(1, count), label="num_clusters")
    lam, k = data.draw(st.sampled_from([0, 1, 5, 50]), label="lambda"), data.draw(st.integers(1, 4), label="k")
    alpha = data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]), label="alpha")
    options = {"num_spatial_neighbors": lam, "num_density_neighbors": k, "alpha": alpha}
    assert equal(*in_both_forms(spatial_density_peaks, x, grid, num_clusters, **options))


@pytest.mark.parametrize("grid, num_clusters", [*GRIDS, ((24, 32), 100)])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_local_kmeans_are_the_same(grid, num_clusters, rounds, dtype):
    x = torch.randn(3, math.prod(grid), 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert equal(*in_both_forms(local_kmeans, x, grid, num_clusters, num_rounds=rounds))


@pytest.mark.parametrize("grid, num_clusters", [*GRIDS, ((24, 32), 100), ((3, 4), 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ward_and_its_join_are_the_same(grid, num_clusters, dtype):
    x = torch.randn(3, math.prod(grid), 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    edges, pairs = in_both_forms(ward, x, grid, num_clusters)
    assert equal(edges, pairs)
    for fewer in {1, max(num_clusters // 2, 1), num_clusters}:
        joined = in_both_forms(join_regions, edges, edges.merge(x.float()), x, grid, fewer)
        assert equal(*joined)


def test_ward_joins_empty_clusters_in_both_forms():
    x = torch.zeros(1, 64, 4)
    x.view(1, 8, 8, 4)[:, :, 3:] = 1
    first = local_kmeans(x, (8, 8), 16)
    assert (first.counts == 0).any()
    for joined in in_both_forms(join_regions, first, first.merge(x), x, (8, 8), 3):
        assert joined.counts.sum() == 64 and joined.num_clusters == 3
        torch.testing.assert_close(joined.unmerge(joined.merge(x)), x)


def test_a_cell_without_tokens_stays_empty_in_both():
    # Two values: cells in the middle of a region lose all their tokens to those around them.
    x = torch.zeros(1, 64, 4)
    x.view(1, 8, 8, 4)[:, :, 3:] = 1
    neighbors, pairs = in_both_forms(local_kmeans, x, (8, 8), 16)
    assert (neighbors.counts == 0).any() and equal(neighbors, pairs)


def test_products_are_in_fp32_under_autocast():
    x = 100 + torch.randn(1, 192, 32, generator=torch.Generator().manual_seed(0))
    for cluster in (local_kmeans, spatial_density_peaks, ward):
        _, want = in_both_forms(cluster, x, (12, 16), 48)
        with torch.autocast("cpu", torch.bfloat16):
            _, got = in_both_forms(cluster, x, (12, 16), 48)
        assert equal(got, want)


def test_nan_is_no_crash_and_no_wrong_index():
    x = torch.randn(1, 48, 4)
    x[0, 7] = math.nan
    for cluster in (local_kmeans, spatial_density_peaks, ward):
        _, found = in_both_forms(cluster, x, (6, 8), 12)
        assert found.assignment.min() >= 0 and found.assignment.max() < 12


def test_a_cpu_compares_neighbors_and_another_device_all_pairs_while_they_are_few():
    assert not all_pairs.prefers_all_pairs(1, torch.device("cpu"))
    assert all_pairs.prefers_all_pairs(1024 * 256, torch.device("cuda"))
    assert not all_pairs.prefers_all_pairs(all_pairs.MOST_PAIRS + 1, torch.device("cuda"))
