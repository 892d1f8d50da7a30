"""k-means against a plain loop, what it starts from on any grid, and batches."""

import math
import sys

import pytest
import torch
from oracle import GRIDS

from ailurus_hf import AiluRusError
from ailurus_hf.clustering import kmeans, local_kmeans
from ailurus_hf.clustering.kmeans import middles
from ailurus_hf.clustering.local_kmeans import grid_cells


@pytest.mark.parametrize("grid, num_cells", GRIDS)
def test_each_cell_starts_from_its_middle(grid, num_cells):
    cpu = torch.device("cpu")
    found, start = middles(grid, num_cells, cpu).tolist(), grid_cells(grid, num_cells, cpu).start.tolist()
    positions = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid)).double()
    for cell, middle in enumerate(found):
        inside = [i for i, of in enumerate(start) if of == cell]
        apart = [float((positions[i] - positions[inside].mean(0)).norm()) for i in inside]
        assert middle == min(i for i, far in zip(inside, apart) if far < min(apart) + 1e-9)


@pytest.mark.parametrize("grid, num_cells", GRIDS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_equals_a_plain_loop(grid, num_cells, rounds):
    count = math.prod(grid)
    x = torch.randn(2, count, 6, generator=torch.Generator().manual_seed(count))
    got = kmeans(x, grid, num_cells, num_rounds=rounds)
    for image in range(2):
        points = x[image].double()
        means = dict(enumerate(points[middles(grid, num_cells, torch.device("cpu"))]))
        for _ in range(rounds):
            assignment = []
            for i in range(count):
                distances = {cluster: float((points[i] - mean).square().sum()) for cluster, mean in means.items()}
                assignment.append(min(distances, key=distances.get))
                # The test says nothing where float32 cannot tell two means apart; these numbers have no such pair.
                nearest, *others = sorted(distances.values())
                assert not others or others[0] > nearest + 1e-5
            members = {c: [i for i in range(count) if assignment[i] == c] for c in set(assignment)}
            means = {c: points[inside].mean(0) for c, inside in members.items()}
        assert got.assignment[image].tolist() == assignment


def test_like_tokens_share_a_cluster_wherever_they_are():
    kinds = torch.eye(16)[torch.randperm(256, generator=torch.Generator().manual_seed(0)) % 16]
    x = kinds[None]
    clusters = kmeans(x, (16, 16), 64)
    torch.testing.assert_close(clusters.unmerge(clusters.merge(x)), x)
    nearby = local_kmeans(x, (16, 16), 64)
    assert not torch.allclose(nearby.unmerge(nearby.merge(x)), x, atol=0.1)


def test_same_alone_in_a_batch_and_in_parts(monkeypatch):
    x = torch.randn(3, 690, 16, generator=torch.Generator().manual_seed(0))
    together = kmeans(x, (23, 30), 172)
    assert (together.counts.sum(1) == 690).all()
    for parts in (False, True):
        if parts:
            monkeypatch.setattr(sys.modules[middles.__module__], "PAIRS_AT_ONCE", 172 * 100)
        for image in range(3):
            alone = kmeans(x[image : image + 1], (23, 30), 172)
            assert torch.equal(alone.assignment[0], together.assignment[image])


def test_an_empty_cluster_has_no_weight():
    clusters = kmeans(torch.ones(1, 48, 4), (6, 8), 12)
    assert clusters.counts[0].tolist() == [48] + [0] * 11
    assert clusters.log_counts()[0, 1:].eq(-math.inf).all()
    # Nor has it a mean, which zeros would be: the tokens between the two kinds stay with those.
    between = kmeans(torch.tensor([1, 0.2, 1, -0.2, -1, 0.1, -1, -0.1]).view(1, 8, 1), (1, 8), 4)
    assert between.counts[0].tolist() == [4, 0, 4, 0]


def test_bad_input_is_told():
    with pytest.raises(AiluRusError, match="between 1 and the 48 tokens, got 0"):
        kmeans(torch.randn(1, 48, 4), (6, 8), 0)
    with pytest.raises(AiluRusError, match="num_rounds must be at least 1, got 0"):
        kmeans(torch.randn(1, 48, 4), (6, 8), 12, num_rounds=0)
    with pytest.raises(AiluRusError, match="48"):
        kmeans(torch.randn(1, 48, 4), (6, 9), 12)
    x = torch.randn(1, 48, 4)
    x[0, 3] = math.nan
    with pytest.raises(AiluRusError, match="1 of 48"):
        kmeans(x, (6, 8), 12, check_finite=True)
