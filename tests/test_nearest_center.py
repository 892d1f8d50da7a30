"""Nearest centre against a plain loop, its centres on any grid, and batches."""

import math
import sys

import pytest
import torch
from oracle import GRIDS

from ailurus_hf import AiluRusError
from ailurus_hf.clustering import nearest_center
from ailurus_hf.clustering.local_kmeans import grid_cells
from ailurus_hf.clustering.nearest_center import middles


@pytest.mark.parametrize("grid, num_cells", GRIDS)
def test_each_cell_has_its_middle_for_a_centre(grid, num_cells):
    cpu = torch.device("cpu")
    centers, start = middles(grid, num_cells, cpu).tolist(), grid_cells(grid, num_cells, cpu).start.tolist()
    assert centers == sorted(centers)
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid)).double()
    for cell, center in enumerate(centers):
        inside = [i for i, of in enumerate(start) if of == cell]
        apart = [float((places[i] - places[inside].mean(0)).norm()) for i in inside]
        assert center == min(i for i, far in zip(inside, apart) if far < min(apart) + 1e-9)


@pytest.mark.parametrize("grid, num_cells", GRIDS)
def test_equals_a_plain_loop(grid, num_cells):
    count = math.prod(grid)
    x = torch.randn(2, count, 6, generator=torch.Generator().manual_seed(count))
    got = nearest_center(x, grid, num_cells)
    centers = middles(grid, num_cells, torch.device("cpu")).tolist()
    assert got.centers.tolist() == [centers, centers]
    for image in range(2):
        points = (x[image] / x[image].norm(dim=-1, keepdim=True)).double()
        for i, cluster in enumerate(got.assignment[image].tolist()):
            similar = [float(points[i] @ points[center]) for center in centers]
            assert similar[cluster] > max(similar) - 1e-6
            assert i not in centers or centers[cluster] == i


def test_like_tokens_share_a_cluster_wherever_they_are():
    kinds = torch.eye(4)[torch.randint(4, (8, 8), generator=torch.Generator().manual_seed(0))]
    kinds[:2, :2] = torch.eye(4)[[0, 1, 2, 3]].view(2, 2, 4)
    x = kinds.flatten(0, 1)[None]
    clusters = nearest_center(x, (8, 8), 16)
    torch.testing.assert_close(clusters.unmerge(clusters.merge(x)), x)
    assert (clusters.counts > 4).any()  # more than a cell holds


def test_same_alone_in_a_batch_and_in_parts(monkeypatch):
    x = torch.randn(3, 690, 16, generator=torch.Generator().manual_seed(0))
    together = nearest_center(x, (23, 30), 172)
    assert (together.counts.sum(1) == 690).all() and (together.counts >= 1).all()
    monkeypatch.setattr(sys.modules[middles.__module__], "PAIRS_AT_ONCE", 172 * 100)
    for image in range(3):
        alone = nearest_center(x[image : image + 1], (23, 30), 172)
        assert (alone.assignment[0] == together.assignment[image]).float().mean() > 0.995
    half = nearest_center(x.bfloat16(), (23, 30), 172)
    assert (half.assignment == together.assignment).float().mean() > 0.9


def test_copies_of_a_centre_leave_it_its_own_cluster():
    clusters = nearest_center(torch.ones(1, 48, 4), (6, 8), 12)
    assert (clusters.counts >= 1).all()
    assert torch.equal(clusters.assignment[0, clusters.centers[0]], torch.arange(12))


def test_bad_input_is_told():
    with pytest.raises(AiluRusError, match="between 1 and the 48 tokens, got 0"):
        nearest_center(torch.randn(1, 48, 4), (6, 8), 0)
    with pytest.raises(AiluRusError, match="48"):
        nearest_center(torch.randn(1, 48, 4), (6, 9), 12)
    x = torch.randn(1, 48, 4)
    x[0, 3] = math.nan
    with pytest.raises(AiluRusError, match="1 of 48"):
        nearest_center(x, (6, 8), 12, check_finite=True)
