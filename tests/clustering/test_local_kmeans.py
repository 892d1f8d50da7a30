"""Local k-means against a plain loop, its cells on any grid, and batches."""

import math

import pytest
import torch
from oracle import GRIDS

from ailurus_hf import AiluRusError, local_kmeans
from ailurus_hf.clustering.local_kmeans import grid_cells


@pytest.mark.parametrize("grid, num_cells", GRIDS)
def test_cells_are_exactly_so_many_and_of_like_size(grid, num_cells):
    cells = grid_cells(grid, num_cells, torch.device("cpu"))
    sizes = cells.start.bincount(minlength=num_cells)
    assert len(sizes) == num_cells and sizes.min() >= 1
    assert sizes.max() <= 2 ** len(grid) * math.ceil(math.prod(grid) / num_cells)
    assert (cells.candidates == cells.start[:, None]).any(1).all()
    assert cells.candidates.shape == (math.prod(grid), 3 ** len(grid))


def test_candidates_are_the_cells_around():
    cells = grid_cells((8, 8), 16, torch.device("cpu"))
    candidates = cells.candidates.view(8, 8, 9)
    assert sorted(set(candidates[3, 3].tolist())) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert sorted(set(candidates[0, 0].tolist())) == [0, 1, 4, 5]


@pytest.mark.parametrize("grid, num_cells", GRIDS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_equals_a_plain_loop(grid, num_cells, rounds):
    count = math.prod(grid)
    x = torch.randint(-9, 10, (2, count, 6), generator=torch.Generator().manual_seed(count)).float()
    got = local_kmeans(x, grid, num_cells, num_rounds=rounds)
    cells = grid_cells(grid, num_cells, torch.device("cpu"))
    for image in range(2):
        points, assignment = x[image].double(), cells.start.tolist()
        for _ in range(rounds):
            means = {}
            for cell in set(assignment):
                means[cell] = points[[i for i in range(count) if assignment[i] == cell]].mean(0)
            nearest = []
            for i in range(count):
                distances = [
                    float((points[i] - means[c]).square().sum()) if c in means else math.inf
                    for c in cells.candidates[i].tolist()
                ]
                best = min(distances)
                nearest.append([c for c, d in zip(cells.candidates[i].tolist(), distances) if d < best + 1e-4])
            if any(len(set(options)) > 1 for options in nearest):
                break  # too close for float32 to tell; the loop and the function may part ways from here
            assignment = [options[0] for options in nearest]
        else:
            assert got.assignment[image].tolist() == assignment


def test_same_alone_and_in_a_batch_and_counts_add_up():
    x = torch.randn(4, 690, 16, generator=torch.Generator().manual_seed(0))
    together = local_kmeans(x, (23, 30), 172)
    assert together.centers is None
    assert torch.equal(together.counts.sum(1), torch.full((4,), 690.0))
    for image in range(4):
        assert torch.equal(local_kmeans(x[image : image + 1], (23, 30), 172).assignment[0], together.assignment[image])


def test_finds_regions_that_the_cells_cut():
    x = torch.zeros(1, 64, 4)
    x.view(1, 8, 8, 4)[:, :, 3:] = 1
    clusters = local_kmeans(x, (8, 8), 16)
    torch.testing.assert_close(clusters.unmerge(clusters.merge(x)), x)


def test_bad_input_names_the_number():
    with pytest.raises(AiluRusError, match="between 1 and the 48 tokens, got 0"):
        local_kmeans(torch.randn(1, 48, 4), (6, 8), 0)
    with pytest.raises(AiluRusError, match="at least 1, got 0"):
        local_kmeans(torch.randn(1, 48, 4), (6, 8), 12, num_rounds=0)
    with pytest.raises(AiluRusError, match="1 of 48 tokens"):
        x = torch.randn(1, 48, 4)
        x[0, 3, 1] = math.nan
        local_kmeans(x, (6, 8), 12, check_finite=True)
