"""Launches are a budget: counted on meta tensors, which take the way of a GPU and raise where a value is read."""

import pytest
import torch
from transformers import ViTConfig, ViTModel

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.clustering import clustering_names, get_clustering
from benchmarks.harness import launches

GRID, NUM_CLUSTERS = (32, 32), 256
# Operators that launch a kernel, for 1024 tokens and 256 clusters: of a clustering, and of merging and unmerging once.
BUDGET = {"local_kmeans": 40, "density_peaks": 60, "ward": 150, "kmeans": 40, "pairs": 100}
MERGE_AND_UNMERGE = 8
# Of a ViT-B at 512², reduced after its second layer.
VIT_B = {"local_kmeans": 215, "density_peaks": 235, "ward": 325}


def test_counts_what_launches_and_no_view():
    x = torch.empty(4, 6, device="meta")
    assert launches(lambda: (x.t().reshape(2, 12) + 1).view(-1)[None].sum()) == {"clone": 1, "add": 1, "sum": 1}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", clustering_names())
def test_clustering_merging_and_unmerging_read_no_value_and_keep_to_the_budget(name, batch):
    clustering = get_clustering(name)
    x = torch.empty(batch, 1024, 768, device="meta")
    counted = launches(lambda: clustering(x, GRID, NUM_CLUSTERS)).total()
    assert counted <= BUDGET[name]

    def merged_and_unmerged():
        clusters = clustering(x, GRID, NUM_CLUSTERS)
        clusters.unmerge(clusters.merge(x))

    def with_a_bias():
        clustering(x, GRID, NUM_CLUSTERS).log_counts(1)

    assert launches(merged_and_unmerged).total() - counted <= MERGE_AND_UNMERGE
    assert launches(with_a_bias).total() - counted <= 2  # for all layers

    def joined():
        clusters = clustering(x, GRID, NUM_CLUSTERS)
        clustering.join(clusters, clusters.merge(x), x, GRID, NUM_CLUSTERS // 2)

    launches(joined)


@pytest.mark.parametrize("name", VIT_B)
def test_a_whole_vit_b_keeps_to_the_budget_and_a_reduced_layer_launches_no_more_than_a_plain_one(name):
    added = []
    for depth in (4, 12):
        with torch.device("meta"):
            model = ViTModel(ViTConfig(image_size=512, num_hidden_layers=depth), add_pooling_layer=False).eval()
        images = torch.empty(1, 3, 512, 512, device="meta")
        plain = launches(lambda model=model, images=images: model(images)).total()
        apply_ailurus(model, cluster_location=2, num_clusters=NUM_CLUSTERS, clustering=name)
        reduced = launches(lambda model=model, images=images: model(images)).total()
        added.append(reduced - plain)
        remove_ailurus(model)
    assert added[0] == added[1]
    assert reduced <= VIT_B[name]
