"""A clustering from outside the package: one class in one file, then a name like any other; bad ones are refused."""

import copy
import json
import pickle
from dataclasses import dataclass

import pytest
import torch
from models import images, make_model, predict

from ailurus_hf import AiluRusConfig, AiluRusError, TokenClusters, ailurus_status, apply_ailurus, clustering
from ailurus_hf.choices import CLUSTERING_CLASSES, clustering_names
from ailurus_hf.cli import build_parser
from ailurus_hf.clustering import Clustering, DensityPeaks, get_clustering, register_clustering
from ailurus_hf.clustering.budget import ByContent
from ailurus_hf.clustering.local_kmeans import grid_cells

GRID = (4, 6)
NAME = "ViTModel"


@pytest.fixture(autouse=True)
def names_are_free_again():
    before = dict(CLUSTERING_CLASSES)
    yield
    CLUSTERING_CLASSES.clear()
    CLUSTERING_CLASSES.update(before)


@dataclass(frozen=True)
class Stripes(Clustering):
    """Runs of tokens as they are counted, shifted by some."""

    shift: int = 0

    def cluster(self, features, grid, num_clusters):
        index = (torch.arange(features.shape[1], device=features.device) + self.shift) % features.shape[1]
        of_each = index * num_clusters // features.shape[1]
        return TokenClusters.from_assignment(of_each.expand(features.shape[0], -1), num_clusters)


@pytest.fixture
def stripes():
    return register_clustering("stripes")(Stripes)


def tokens(batch=2, grid=GRID, channels=8):
    return torch.randn(batch, grid[0] * grid[1], channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("asked", ["stripes", {"name": "stripes", "shift": 5}, Stripes(shift=5)])
@pytest.mark.parametrize("locations", [1, (1, 2)])
def test_one_class_in_one_file_is_a_clustering_like_any_other(stripes, asked, locations, tmp_path):
    fields = {"num_clusters": 9} if locations == 1 else {"num_clusters": (9, 4)}
    config = AiluRusConfig(cluster_location=locations, **fields, clustering=asked)
    assert AiluRusConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = make_model(NAME)
    plain = predict(model, NAME, images(2))
    apply_ailurus(model, config)
    reduced = predict(model, NAME, images(2))
    assert (reduced - plain).abs().max() > 1e-3
    found = ailurus_status(model).last_clusters
    if locations == 1:
        want = get_clustering(asked)(torch.zeros(2, found.num_tokens, 1), ailurus_status(model).last_grid, 9)
        assert torch.equal(found.assignment, want.assignment)
    assert found.num_clusters == (9 if locations == 1 else 4)
    model.save_pretrained(tmp_path)
    loaded = apply_ailurus(type(model).from_pretrained(tmp_path)).eval()
    assert torch.equal(predict(loaded, NAME, images(2)), reduced)


def test_the_command_line_knows_it(stripes):
    parsed = build_parser(["classify"]).parse_args(["classify", "a.png", "--model", "m", "--clustering", "stripes"])
    assert parsed.clustering == "stripes"


def test_names_are_taken_once(stripes):
    for name in ("stripes", "ward"):
        with pytest.raises(AiluRusError, match=f"'{name}' is taken by"):
            register_clustering(name)(dataclass(frozen=True)(type("Other", (Stripes,), {})))
    for name in ("", None, Stripes):
        with pytest.raises(AiluRusError, match="needs a name"):
            register_clustering(name)


def test_what_is_no_frozen_dataclass_is_refused():
    class Forgotten(Clustering):
        shift: int = 0

    with pytest.raises(AiluRusError, match=r"Forgotten must be a frozen dataclass: write @dataclass\(frozen=True\)"):
        register_clustering("forgotten")(Forgotten)
    with pytest.raises(AiluRusError, match="must derive from Clustering"):
        register_clustering("function")(lambda features, grid, num_clusters: None)
    assert "forgotten" not in CLUSTERING_CLASSES


def test_what_is_not_registered_runs_and_says_that_it_cannot_be_saved():
    config = AiluRusConfig(num_clusters=9, cluster_location=1, clustering=Stripes())
    with pytest.raises(AiluRusError, match="register_clustering"):
        config.to_dict()
    assert Stripes()(tokens(), GRID, 6).num_clusters == 6


@pytest.mark.parametrize("value", [3, None, Stripes, {"name": "nobody"}, {"shift": 1}, "nobody", []])
def test_anything_else_is_refused_with_the_names_that_there_are(value):
    with pytest.raises(AiluRusError, match="'density_peaks', 'local_kmeans', 'kmeans', 'pairs', 'ward'"):
        get_clustering(value)


def test_unknown_settings_are_told(stripes):
    with pytest.warns(UserWarning, match=r"unknown Stripes settings \['width'\]"):
        assert get_clustering({"name": "stripes", "shift": 2, "width": 3}) == Stripes(2)
    with pytest.raises(AiluRusError, match="'density_peaks', got 'stripes'"):
        DensityPeaks.from_dict({"name": "stripes"})
    assert DensityPeaks.from_dict({"alpha": 0.5}) == DensityPeaks(alpha=0.5)


def test_input_is_checked_before_and_output_after():
    with pytest.raises(AiluRusError, match="grid"):
        Stripes()(tokens(), (5, 5), 6)
    with pytest.raises(AiluRusError, match="between 1 and the 24 tokens, got 25"):
        Stripes()(tokens(), GRID, 25)
    bad = tokens()
    bad[0, 3, 1] = torch.nan
    Stripes()(bad, GRID, 6)
    with pytest.raises(AiluRusError, match="1 of 48 tokens are not finite"):
        Stripes()(bad, GRID, 6, check_finite=True)
    with pytest.raises(AiluRusError, match=r"must assign \(2, 24\) tokens to 6 clusters, got \(2, 24\) and 7"):
        get_clustering(lambda features, grid, m: Stripes().cluster(features, grid, m + 1))(tokens(), GRID, 6)


@pytest.mark.parametrize("name", ["density_peaks", "local_kmeans", "kmeans", "pairs", "ward"])
def test_an_object_is_the_function_of_its_name(name):
    functions = {**vars(clustering), "density_peaks": clustering.spatial_density_peaks}
    want = functions[name](tokens(), GRID, 7)
    for made in (
        get_clustering(name),
        copy.deepcopy(get_clustering(name)),
        pickle.loads(pickle.dumps(get_clustering(name))),
    ):
        assert torch.equal(made(tokens(), GRID, 7).assignment, want.assignment)
    assert 2 <= ByContent(get_clustering(name), 0.1)(tokens(1), GRID, 7).num_clusters <= 7


def test_settings_reach_the_clustering_and_its_joins():
    x = tokens(grid=(8, 8))
    of = lambda **settings: get_clustering({"name": "density_peaks", **settings})  # noqa: E731
    first = of()(x, (8, 8), 20)
    assert not torch.equal(first.assignment, of(num_spatial_neighbors=4, alpha=0.1)(x, (8, 8), 20).assignment)
    joined = [
        of(**settings).join(first, first.merge(x), x, (8, 8), 5).assignment
        for settings in ({}, {"num_spatial_neighbors": 3, "alpha": 0.1})
    ]
    assert not torch.equal(*joined)


class Reduced(torch.nn.Module):
    """From tokens to how they are clustered, or to how clusters of a grid's cells are joined."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, tokens):
        if self.name in clustering_names():
            return get_clustering(self.name)(tokens, (8, 8), 32).assignment
        cells = TokenClusters.from_assignment(grid_cells((8, 8), 32, tokens.device).start[None], 32)
        return getattr(clustering, self.name)(cells, cells.merge(tokens), tokens, (8, 8), 16).assignment


@pytest.mark.parametrize("name", [*clustering_names(), "merge_clusters", "join_regions", "join_clusters"])
def test_exported_programs_hold_no_stable_sort(name):
    """OpenVINO's takes time with the square of what it sorts, and ONNX has none."""
    tokens = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(Reduced(name), (tokens,))
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert not [node for graph in graphs for node in graph.nodes if "sort.stable" in str(node.target)]
    assert torch.equal(program.module()(tokens), Reduced(name)(tokens))
