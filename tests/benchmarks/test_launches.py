"""Launches are a budget: counted on meta tensors, which take the way of a GPU and raise where a value is read."""

import pytest
import torch
from transformers import ViTConfig, ViTModel

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.clustering import clustering_names, get_clustering
from benchmarks.harness import launches

GRID, NUM_CLUSTERS = (32, 32), 256
# Operators that launch a kernel, for 1024 tokens and 256 clusters.
BUDGET = {"local_kmeans": 40, "density_peaks": 60, "ward": 150, "kmeans": 40}


def test_counts_what_launches_and_no_view():
    x = torch.empty(4, 6, device="meta")
    assert launches(lambda: (x.t().reshape(2, 12) + 1).view(-1)[None].sum()) == {"clone": 1, "add": 1, "sum": 1}


@pytest.mark.parametrize("name", clustering_names())
def test_clustering_merging_and_unmerging_read_no_value_and_keep_to_the_budget(name):
    clustering = get_clustering(name)
    x = torch.empty(2, 1024, 768, device="meta")
    counted = launches(lambda: clustering(x, GRID, NUM_CLUSTERS))
    if name in BUDGET:
        assert counted.total() <= BUDGET[name]

    def merged_and_unmerged():
        clusters = clustering(x, GRID, NUM_CLUSTERS)
        clusters.unmerge(clusters.merge(x))
        clusters.log_counts(1)

    assert launches(merged_and_unmerged).total() - counted.total() <= 8 + 2  # and a bias for all layers

    def joined():
        clusters = clustering(x, GRID, NUM_CLUSTERS)
        clustering.join(clusters, clusters.merge(x), x, GRID, NUM_CLUSTERS // 2)

    launches(joined)


def test_a_reduced_layer_launches_no_more_than_a_plain_one():
    """A ViT-B at 512²: what reduction adds does not depend on how many layers are reduced."""
    added = []
    for depth in (4, 8):
        config = ViTConfig(image_size=512, num_hidden_layers=depth)
        model = ViTModel(config, add_pooling_layer=False).eval().to("meta")
        images = torch.empty(1, 3, 512, 512, device="meta")
        plain = launches(lambda model=model, images=images: model(images)).total()
        apply_ailurus(model, cluster_location=2, num_clusters=NUM_CLUSTERS, clustering="local_kmeans")
        added.append(launches(lambda model=model, images=images: model(images)).total() - plain)
        remove_ailurus(model)
    assert added[0] == added[1] <= 67  # beside the 148 of a ViT-B, so at most 215
