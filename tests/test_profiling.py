"""A profiler shows what clustering, merging and unmerging cost; graphs hold nothing of it."""

import math

import pytest
import torch
from models import images, make_model, predict
from torch.profiler import profile

from ailurus_hf import AiluRusConfig, TokenClusters, apply_ailurus
from ailurus_hf.clustering import get_clustering

GRID = (4, 6)
NAMES = ("ailurus::cluster", "ailurus::merge", "ailurus::unmerge")


def tokens():
    return torch.randn(2, math.prod(GRID), 8, generator=torch.Generator().manual_seed(0))


def counted(call):
    """How often each name is in the trace of a call."""
    with profile() as trace:
        call()
    names = [event.name for event in trace.events()]
    return [names.count(name) for name in NAMES]


def test_clusters_have_names_in_a_trace():
    clusters = get_clustering("local_kmeans")(tokens(), GRID, 5)
    assert counted(lambda: clusters.unmerge(clusters.merge(tokens()))) == [0, 1, 1]


@pytest.mark.parametrize("name", ["density_peaks", "local_kmeans", "kmeans", "pairs", "ward"])
def test_clustering_and_joining_have_names_in_a_trace(name):
    clustering, x = get_clustering(name), tokens()
    clusters = clustering(x, GRID, 8)
    assert counted(lambda: clustering(x, GRID, 8))[0] == 1
    assert counted(lambda: clustering.join(clusters, clusters.merge(x), x, GRID, 4))[0] == 1


def test_a_model_has_them():
    model = apply_ailurus(make_model("ViTModel"), AiluRusConfig(cluster_location=1, keep_ratio=0.25))
    assert all(counted(lambda: predict(model, "ViTModel", images(1))))
    # One that no profiler watches has the same output.
    out = []
    counted(lambda: out.append(predict(model, "ViTModel", images(1))))
    assert torch.equal(out[0], predict(model, "ViTModel", images(1)))


class Merging(torch.nn.Module):
    def forward(self, x):
        clusters = TokenClusters.from_assignment(torch.arange(24).expand(2, -1) // 6, 4)
        return clusters.unmerge(clusters.merge(x))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_graphs_hold_no_names(strict):
    with profile():
        graph = torch.export.export(Merging(), (tokens(),), strict=strict)
    assert "record_function" not in str(graph)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_traced_graphs_hold_no_names():
    with profile():
        graph = torch.jit.trace(Merging(), (tokens(),))
    assert "record_function" not in str(graph.graph)
