"""Other ways to choose clusters: each is what its name says, makes M clusters, and is measured beside ours."""

import itertools
import math

import numpy as np
import pytest
import torch
from model_parts import DECODER, segmenter
from models import images, make_model, run
from PIL import Image

from ailurus_hf import SegmenterImageProcessor, ailurus_status, spatial_density_peaks
from ailurus_hf.evaluation.loading import load_model
from ailurus_hf.vision.discovery import find_encoders
from benchmarks import methods
from benchmarks.clustering import clusterings
from benchmarks.harness import datasets, model_flops
from benchmarks.methods import variants
from benchmarks.vision import segmenter_quality

GRID = (6, 8)


def tokens(batch=2, grid=GRID, channels=8):
    return torch.randn(batch, math.prod(grid), channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("cluster", variants.CLUSTERINGS.values(), ids=[*variants.CLUSTERINGS])
@pytest.mark.parametrize("grid, num_clusters", [(GRID, 12), ((23, 5), 40), ((1, 5), 2)])
def test_so_many_clusters_the_same_alone_and_in_a_batch(cluster, grid, num_clusters):
    x = tokens(2, grid)
    clusters = cluster(x, grid, num_clusters)
    assert clusters.num_clusters == num_clusters and clusters.counts.sum() == x.shape[0] * x.shape[1]
    assert clusters.centers is None or clusters.counts.min() >= 1
    alone = cluster(x[1:], grid, num_clusters)
    assert torch.equal(alone.assignment, clusters.assignment[1:])
    assert not torch.equal(alone.assignment, clusters.assignment[:1])


def test_later_centers_are_the_farthest_from_those_before():
    x = tokens(1)
    clusters = variants.peaks_then_farthest(x, GRID, 8)
    apart = torch.cdist(x[0], x[0])
    expected = spatial_density_peaks(x, GRID, 4).centers[0].tolist()
    while len(expected) < 8:
        expected.append(int(apart[:, expected].amin(1).argmax()))
    assert sorted(expected) == clusters.centers[0].tolist()


def variance(x, assignment):
    groups = [x[assignment == label] for label in assignment.unique()]
    return sum(((group - group.mean(0)) ** 2).sum().item() for group in groups)


def test_rounds_of_kmeans_leave_less_variance():
    x = tokens(1)
    first = spatial_density_peaks(x, GRID, 12)
    after = [variants.peaks_then_kmeans(x, GRID, 12, rounds) for rounds in (1, 2)]
    assert variance(x[0], first.assignment[0]) > variance(x[0], after[0].assignment[0])
    assert variance(x[0], after[0].assignment[0]) >= variance(x[0], after[1].assignment[0])


def test_ward_joins_the_adjacent_pair_that_costs_least():
    x, grid = tokens(1, (3, 3)), (3, 3)
    cells = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    near = (cells[:, None] - cells).abs().sum(-1) == 1
    labels = torch.arange(9)
    for left in range(8, 2, -1):
        pairs = [
            (a, b)
            for a, b in itertools.combinations(labels.unique().tolist(), 2)
            if near[labels == a][:, labels == b].any()
        ]
        joined = [torch.where(labels == b, a, labels) for a, b in pairs]
        labels = min(joined, key=lambda each: variance(x[0], each))
        found = variants.exact_ward(x, grid, left).assignment[0]
        same = labels[:, None] == labels
        assert torch.equal(found[:, None] == found, same)


def test_edges_get_more_centers():
    x = torch.zeros(1, 256, 4)
    x.view(16, 16, 4)[:, 8:] = 5  # one edge, through the middle
    x += 0.1 * tokens(1, (16, 16), 4)
    columns = lambda clusters: (clusters.centers % 16 - 7.5).abs()  # noqa: E731
    at_edge = (columns(variants.edges_weighted(x, (16, 16), 64)) < 1).sum()
    assert at_edge > 1.5 * (columns(spatial_density_peaks(x, (16, 16), 64)) < 1).sum()


def test_a_spatial_form_of_no_weight_is_none():
    x = tokens(1)
    none = spatial_density_peaks(x, GRID, 12, num_spatial_neighbors=0)
    assert torch.equal(variants.positions_as_features(x, GRID, 12, weight=0.0).assignment, none.assignment)
    near = variants.positions_as_features(x, GRID, 12, weight=100.0)
    cells = torch.cartesian_prod(*(torch.arange(side) for side in GRID)).float()[None]
    assert (cells - near.unmerge(near.merge(cells))).norm(dim=-1).max() < 3


def test_keys_of_the_layer_after_the_location():
    model, x = make_model("ViTModel"), images(1)
    reduction = methods.apply_method(model, "peaks of keys, copy", methods.Amount(1, 0.25), [lambda: run(model, x)])
    seen = []
    layer = find_encoders(model)[0].layers[1]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]), prepend=True)
    run(model, x)
    hook.remove()
    found = ailurus_status(model).last_clusters
    reduction.undo()
    keys = layer.attention.k_proj(layer.layernorm_before(seen[0][:, 1:]))
    assert torch.equal(found.assignment, spatial_density_peaks(keys, (8, 12), 24).assignment)
    assert not torch.equal(found.assignment, spatial_density_peaks(seen[0][:, 1:], (8, 12), 24).assignment)


@pytest.mark.parametrize("restore", ["copy", "smooth", "residual"])
def test_methods_of_the_table_are_in_the_registry(restore):
    names = clusterings.chosen_methods(restore, 2, 0.25, 8, batch_size=1)
    together = clusterings.chosen_methods(restore, 2, 0.25, 8, batch_size=16)
    assert [name for name in names if "min_keep_ratio" not in name] == together != names
    assert len(names) >= 13 and all(methods.parsed(name) for name in names)


def test_flops_and_clusters_of_two_reductions():
    model, x = make_model("ViTModel"), images(1)
    two = "density peaks, copy (the paper):cluster_location=(1,2),keep_ratio=(0.5,0.25)"
    shares, full = {}, model_flops(lambda: run(model, x))
    for name, amount in ((two, methods.Amount(1, 0.5)), (methods.PAPER, methods.Amount(1, 0.5))):
        reduction = methods.apply_method(model, name, amount, [lambda: run(model, x)])
        run(model, x)
        shares[name] = reduction.flops(full, lambda: run(model, x)), reduction.num_clusters()
        reduction.undo()
        counted = methods.flops_with(
            methods.EVERY[methods.PAPER], model, amount, [lambda: run(model, x)], methods.parsed(name)[1]
        )
        # Counted by torch, clustering and all; the FLOPs of the layers alone are somewhat less.
        assert 0.8 * counted < shares[name][0] <= counted
    assert shares[two][0] < shares[methods.PAPER][0] and (shares[two][1], shares[methods.PAPER][1]) == (24, 48)


def test_rows_hold_what_clusters_are_like_and_what_the_model_makes_of_them(tmp_path):
    rng = np.random.default_rng(0)
    for folder, shape in (("images", (32, 48, 3)), ("labels", (32, 48))):
        (tmp_path / "val" / folder).mkdir(parents=True)
        suffix = "jpg" if folder == "images" else "png"
        Image.fromarray(rng.integers(0, 11, shape, dtype=np.uint8)).save(tmp_path / f"val/{folder}/a.{suffix}")
    segmenter("vit", decoder_config=DECODER, num_labels=11).save_pretrained(tmp_path / "model")
    SegmenterImageProcessor().save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), None, "cpu", "float32", None)
    segmenter_quality.at_size(loaded.processor, 64)
    data = datasets.SegmentationData("camvid", tmp_path)
    task = segmenter_quality.segmentation(loaded.model, loaded.processor, data)
    names = [methods.PAPER, "exact Ward, copy", "local k-means, copy:restore_location=3"]
    inputs = [loaded.prepare(data.image(0))]
    plain, *rows = clusterings.measure(loaded, task, inputs, names, methods.Amount(1, 0.25), 1)
    assert plain["method"] == "plain" and [r["method"] for r in rows] == names
    for row in rows:
        assert row["num_clusters"] == 96 and row["lost"] == pytest.approx(plain["miou"] - row["miou"])
        assert 0 < row["unexplained"] < 1 and row["cluster_ms"] > 0 and -1 <= row["last"] < 1
    assert rows[1]["unexplained"] < rows[0]["unexplained"]
    assert not loaded.model._forward_pre_hooks
