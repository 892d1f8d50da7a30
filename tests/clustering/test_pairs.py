"""Clustering by pairs against plain loops, its invariants on any tokens, and several locations in a row."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import GRIDS, partition, slow_unions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ailurus_hf import TokenClusters
from ailurus_hf.clustering import join_clusters, pairs
from ailurus_hf.clustering.pairs import TILE, _cheapest, _costs


def slow_pairs(points, num_clusters, clusters=None):
    def price(squared, m, n):
        return squared * math.sqrt(m * n / (m + n))

    def unions(count):
        return min(count // 2, count - num_clusters)

    return slow_unions(points, num_clusters, price, lambda a, b: True, unions, clusters)


@pytest.mark.parametrize("grid, num_clusters", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_plain_loops(grid, num_clusters, seed):
    count = min(math.prod(grid), 150)
    x = torch.randn(2, count, 6, generator=torch.Generator().manual_seed(seed))
    num_clusters = min(num_clusters, count)
    found = pairs(x, (1, count), num_clusters)
    assert found.centers is None and found.counts.min() >= 1
    for image in range(2):
        want, fragile = slow_pairs(x[image].double(), num_clusters)
        assert not fragile, "take another seed"
        assert partition(found.assignment[image]) == want


def test_a_second_location_goes_on_where_the_first_ended():
    x = torch.randn(1, 60, 5, generator=torch.Generator().manual_seed(3))
    first = pairs(x, (6, 10), 40)
    second = join_clusters(first, first.merge(x), x, (6, 10), 14)
    want, fragile = slow_pairs(x[0].double(), 14, sorted(partition(first.assignment[0]), key=min))
    assert not fragile and partition(second.assignment[0]) == want
    # An empty cluster, as other ways leave them, is the first to go, however far the others are from 0.
    padded = TokenClusters.from_assignment(first.assignment, 41)
    again = join_clusters(padded, padded.merge(x + 10), x + 10, (6, 10), 40)
    assert partition(again.assignment[0]) == partition(first.assignment[0])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_so_many_clusters_of_any_tokens_and_equal_ones_first(data):
    count = data.draw(st.integers(1, 40))
    # Few whole numbers: equal tokens and ties of every kind.
    values = data.draw(st.lists(st.integers(0, 3), min_size=2 * count, max_size=2 * count))
    x = torch.tensor(values, dtype=torch.float32).view(1, count, 2)
    kinds = len(set(map(tuple, x[0].tolist())))
    num_clusters = data.draw(st.integers(1, count))
    found = pairs(x, (1, count), num_clusters)
    assert found.num_clusters == num_clusters
    assert found.counts.min() >= 1 and found.counts.sum() == count
    assert int(found.assignment.max()) == num_clusters - 1
    if num_clusters >= kinds:
        assert torch.equal(found.unmerge(found.merge(x)), x)


def test_what_is_unlike_all_else_stays_alone_and_what_is_alike_joins_wherever_it_is():
    x = 0.01 * torch.randn(1, 196, 8, generator=torch.Generator().manual_seed(0))
    x[0, [5, 77]] += torch.eye(8)[:2]
    x[0, [40, 190]] -= torch.eye(8)[:1]
    clusters = pairs(x, (14, 14), 20)
    assert clusters.counts[0, clusters.assignment[0, [5, 77, 40, 190]]].tolist() == [1, 1, 2, 2]
    assert clusters.assignment[0, 40] == clusters.assignment[0, 190]


def test_costs_of_nearly_equal_tokens_are_symmetric_and_not_negative():
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(1, 1, 192, generator=generator) + 1e-4 * torch.randn(2, 196, 192, generator=generator)
    tile = (x, x.square().sum(-1), torch.ones(2, 196))
    costs = _costs(tile, tile)
    assert torch.equal(costs, costs.transpose(1, 2)) and costs.min() >= 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tiles_find_what_one_tile_finds(data):
    count, width = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 41))
    # Whole numbers: sums are exact, however they are added up, and ties are many.
    values = data.draw(st.lists(st.integers(0, 3), min_size=4 * count, max_size=4 * count))
    x = torch.tensor(values, dtype=torch.float32).view(2, count, 2)
    sizes = torch.ones(2, count)
    with pytest.MonkeyPatch.context() as patch:
        whole = _cheapest(x, sizes)
        patch.setattr(sys.modules[_cheapest.__module__], "SMALL_TILE", width)
        tiled = _cheapest(x, sizes)
    assert torch.equal(tiled[0], whole[0]) and torch.equal(tiled[1], whole[1])


def test_memory_does_not_grow_as_the_square():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.elements = max([self.elements, *(each.numel() for each in tree_leaves(out) if torch.is_tensor(each))])
            return out

    with Largest() as largest:
        pairs(torch.empty(2, 128 * 128, 8, device="meta"), (128, 128), 2048)
    assert largest.elements == 2 * TILE**2


def test_same_alone_and_in_a_batch_and_in_one_graph():
    x = torch.randn(3, 196, 16, generator=torch.Generator().manual_seed(0))
    together = pairs(x, (14, 14), 60)
    for image in range(3):
        assert torch.equal(pairs(x[image : image + 1], (14, 14), 60).assignment[0], together.assignment[image])
    compiled = torch.compile(pairs, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, (14, 14), 60).assignment, together.assignment)
