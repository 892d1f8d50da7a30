"""Ward's clustering against plain loops and exact Ward, on any grid, in batches, in one graph, in several steps."""

import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import images, make_model, predict
from oracle import GRIDS, partition, slow_unions
from torch.library import opcheck

from ailurus_hf import TokenClusters, ailurus_status, apply_ailurus, local_kmeans, remove_ailurus
from ailurus_hf.clustering import Ward, get_clustering, rows
from ailurus_hf.clustering.ward import (
    LEAST_SHARE,
    LEAST_SHARE_OF_CLUSTERS,
    MOVES,
    SHARE,
    SHARE_OF_CLUSTERS,
    adjacent_clusters,
    join_regions,
    ward,
)
from benchmarks.methods.variants import exact_ward


def tokens(grid, batch=1, channels=8):
    """Regions of 4 x 4 tokens, and noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, channels, *(-(-side // 4) for side in grid), generator=generator)
    for axis, side in enumerate(grid):
        coarse = coarse.repeat_interleave(4, axis + 2).narrow(axis + 2, 0, side)
    smooth = coarse.flatten(2).transpose(1, 2)
    return smooth + 0.2 * torch.randn(smooth.shape, generator=generator)


def variance(x, clusters):
    return (x - clusters.unmerge(clusters.merge(x))).square().sum().item()


def slow_ward(points, grid, num_clusters, clusters=None):
    cells = list(itertools.product(*map(range, grid)))
    share, least_share = (SHARE, LEAST_SHARE) if clusters is None else (SHARE_OF_CLUSTERS, LEAST_SHARE_OF_CLUSTERS)

    def near(a, b):
        return any(math.dist(cells[i], cells[j]) == 1 for i in a for j in b)

    def unions(count):
        to_go = count - num_clusters
        return min(max(int(to_go * share), int(num_clusters * least_share), 1), to_go, count // 2)

    joined, fragile = slow_unions(
        points, num_clusters, lambda squared, m, n: squared * m * n / (m + n), near, unions, clusters
    )
    # Clusters that join clusters stay whole.
    for _ in range(MOVES if clusters is None and len(points) > num_clusters else 0):
        joined, doubtful = slow_moves(points, cells, joined)
        fragile |= doubtful
    return joined, fragile


def slow_moves(points, cells, clusters):
    """Each token in the most similar of the clusters that lie at its sides and corners, and whether rounding decided
    it."""
    clusters = sorted(clusters, key=min)
    owner = {i: number for number, cluster in enumerate(clusters) for i in cluster}
    means = [points[list(cluster)].mean(0) for cluster in clusters]
    found, fragile = [set() for _ in clusters], False
    for i, cell in enumerate(cells):
        around = {owner[j] for j, other in enumerate(cells) if max(abs(a - b) for a, b in zip(cell, other)) <= 1}
        costs = sorted((float((points[i] - means[c]).square().sum()), c != owner[i], c) for c in around)
        fragile |= len(costs) > 1 and costs[1][0] < costs[0][0] * (1 + 1e-5)
        found[costs[0][2]].add(i)
    return {frozenset(cluster) for cluster in found if cluster}, fragile


@pytest.mark.parametrize("grid, num_clusters", [(grid, count) for grid, count in GRIDS if math.prod(grid) < 150])
def test_equals_plain_loops(grid, num_clusters):
    x = torch.randn(2, math.prod(grid), 6, generator=torch.Generator().manual_seed(0))
    found = ward(x, grid, num_clusters)
    for image in range(2):
        want, fragile = slow_ward(x[image].double(), grid, num_clusters)
        assert not fragile, "take another seed"
        assert partition(found.assignment[image]) == want


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 2**22])
def test_edges_gathered_in_chunks_make_the_same_clusters(chunk_bytes, monkeypatch):
    x = tokens((8, 12), batch=2)
    in_one_pass = ward(x, (8, 12), 20)
    monkeypatch.setattr(rows, "takes_operators", lambda table: False)
    monkeypatch.setitem(rows.CHUNK_BYTES, "cpu", chunk_bytes)
    assert torch.equal(ward(x, (8, 12), 20).assignment, in_one_pass.assignment)


def test_a_second_location_goes_on_where_the_first_ended():
    grid = (6, 10)
    x = torch.randn(1, 60, 5, generator=torch.Generator().manual_seed(3))
    first = ward(x, grid, 40)
    second = join_regions(first, first.merge(x), x, grid, 14)
    want, fragile = slow_ward(x[0].double(), grid, 14, sorted(partition(first.assignment[0]), key=min))
    assert not fragile and partition(second.assignment[0]) == want


@pytest.mark.parametrize("name", ["local_kmeans", "kmeans", "density_peaks"])
def test_joins_clusters_of_any_clustering_also_empty_ones(name):
    x = tokens((6, 8), batch=3)
    # Half of the tokens are the same, so that local k-means leaves clusters empty.
    x[:, :24] = x[:, :1]
    first = get_clustering(name)(x, (6, 8), 20)
    second = get_clustering("ward").join(first, first.merge(x), x, (6, 8), 7)
    assert second.counts.sum(1).tolist() == [48] * 3
    for old, new in zip(first.assignment, second.assignment, strict=True):
        assert all(len(new[old == cluster].unique()) == 1 for cluster in old.unique())
    alone = TokenClusters.from_assignment(first.assignment[1:2], 20)
    alone = get_clustering("ward").join(alone, alone.merge(x[1:2]), x[1:2], (6, 8), 7)
    assert torch.equal(alone.assignment, second.assignment[1:2])
    if name == "local_kmeans":
        assert (first.counts == 0).any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_so_many_clusters_of_any_tokens_and_equal_neighbors_first(data):
    grid = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 6)))
    count = math.prod(grid)
    # Few whole numbers: equal tokens and ties of every kind.
    values = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    x = torch.tensor(values, dtype=torch.float32).view(1, count, 1)
    num_clusters = data.draw(st.integers(1, count))
    found = ward(x, grid, num_clusters)
    assert found.num_clusters == num_clusters and found.counts.sum() == count
    if variance(x, exact_ward(x, grid, num_clusters)) == 0:
        assert variance(x, found) == 0


@pytest.mark.parametrize("grid, num_clusters", GRIDS)
def test_so_many_clusters_the_same_alone_and_in_a_batch_connected_until_tokens_move(grid, num_clusters, monkeypatch):
    x = tokens(grid, 2)
    found = ward(x, grid, num_clusters)
    assert torch.equal(ward(x[1:], grid, num_clusters).assignment, found.assignment[1:])
    monkeypatch.setattr(importlib.import_module("ailurus_hf.clustering.ward"), "MOVES", 0)
    found = ward(x, grid, num_clusters)
    assert found.num_clusters == num_clusters and found.counts.min() >= 1 and found.centers is None
    assert torch.equal(ward(x[1:], grid, num_clusters).assignment, found.assignment[1:])
    a, *following = adjacent_clusters(torch.arange(math.prod(grid))[None], tuple(grid))[0].unbind(1)
    a, b = a.repeat(len(grid)), torch.cat(following)
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


def test_near_to_the_exact_one_and_better_than_regular_cells(monkeypatch):
    grid, x = (12, 16), tokens((12, 16))
    for num_clusters in (20, 40, 80):
        exact, fast = variance(x, exact_ward(x, grid, num_clusters)), variance(x, ward(x, grid, num_clusters))
        assert fast < 1.04 * exact
        assert fast < 0.95 * variance(x, local_kmeans(x, grid, num_clusters))
    assert variance(x, exact_ward(x, grid, 40)) <= 1.001 * variance(x, ward(x, grid, 40))
    # One pair a round, the cheapest: the exact one.
    for name in ("SHARE", "LEAST_SHARE", "MOVES"):
        monkeypatch.setattr(importlib.import_module("ailurus_hf.clustering.ward"), name, 0)
    same = [f(x, grid, 40).assignment[0] for f in (ward, exact_ward)]
    assert torch.equal(*(each[:, None] == each for each in same))


def test_finds_regions_of_any_shape():
    x = torch.zeros(1, 64, 4)
    x.view(1, 8, 8, 4)[:, 1:7, 2:7] = 1
    clusters = ward(x, (8, 8), 2)
    assert sorted(clusters.counts[0].tolist()) == [30, 34]
    torch.testing.assert_close(clusters.unmerge(clusters.merge(x)), x)


def test_the_same_in_one_graph():
    compiled = torch.compile(ward, backend="eager", fullgraph=True)
    for grid in ((14, 14), (9, 20), (5, 31)):
        x = tokens(grid, 2)
        assert torch.equal(compiled(x, grid, 40).assignment, ward(x, grid, 40).assignment)


def test_a_graph_for_a_cpu_calls_it_as_one_operator_and_an_exported_one_holds_its_steps():
    cluster = Ward()

    class Twice(torch.nn.Module):
        def forward(self, x):
            first = cluster(x, (6, 8), 12)
            return first.assignment, cluster.join(first, first.merge(x), x, (6, 8), 5).assignment

    graphs, x = [], tokens((6, 8), 2)
    compiled = torch.compile(Twice(), backend=lambda graph, given: graphs.append(graph) or graph, fullgraph=True)
    for got, want in zip(compiled(x), Twice()(x), strict=True):
        assert torch.equal(got, want)
    exported = torch.export.export(Twice(), (x,)).graph_module
    ours = [[node for node in graph.graph.nodes if "ailurus" in str(node.target)] for graph in (graphs[0], exported)]
    assert len(ours[0]) == 2 and not ours[1]


@pytest.mark.parametrize("num_clusters", [48, 12, 1])
def test_its_operators_keep_what_torch_asks_of_operators(num_clusters):
    x = tokens((6, 8), 2)
    clusters = Ward()(x, (6, 8), num_clusters)
    representatives = clusters.merge(x).bfloat16()
    opcheck(torch.ops.ailurus_hf.ward, (x, [6, 8], num_clusters))
    for fewer in (num_clusters, 1):
        given = (clusters.assignment, clusters.counts, representatives, [6, 8], fewer)
        opcheck(torch.ops.ailurus_hf.join_regions, given)


@pytest.mark.parametrize("restore", ["copy", "smooth", "residual"])
def test_on_a_model_eager_and_compiled_in_two_steps(restore):
    name = "ViTModel"
    model, x = make_model(name), images(2)
    before = predict(model, name, x)
    settings = {"clustering": "ward", "restore": restore}
    apply_ailurus(model, cluster_location=(1, 2), keep_ratio=(0.5, 0.25), **settings)
    after = predict(model, name, x)
    status = ailurus_status(model)
    assert [location.num_clusters for location in status.locations] == [48, 24] and not torch.equal(before, after)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(predict(compiled, name, x), after)
    remove_ailurus(model)
    assert torch.equal(predict(model, name, x), before)
