"""compile_clustering: a graph for each size and none for each image, the clusters of the eager form, and no state.

With torch's "eager" backend, as Inductor takes up to a minute; AILURUS_TEST_EVERY=1 compiles them all by Inductor.
"""

import copy
import os
import pickle
from dataclasses import dataclass, field
from functools import partial

import diffusion_models
import pytest
import torch
from models import images, make_model, predict
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from ailurus_hf import AiluRusConfig, AiluRusError, AiluRusProcessor, TokenClusters, apply_ailurus, remove_ailurus
from ailurus_hf.clustering import FromFunction, KMeans, clustering_names, compiled, get_clustering
from ailurus_hf.clustering.compiled import Compiled

EVERY = bool(os.environ.get("AILURUS_TEST_EVERY"))
GRID = (6, 8)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    compiled._graph.cache_clear()


@pytest.fixture
def quick(monkeypatch):
    """torch.compile without code to be generated, and graphs counted from 0."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="inductor" if EVERY else "eager"))
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def tokens(batch=2, seed=0):
    return torch.randn(batch, 48, 16, generator=torch.Generator().manual_seed(seed))


def both(clustering, x):
    """Clusters, and fewer of these."""
    clusters = clustering(x, GRID, 12)
    return clusters, clustering.join(clusters, clusters.merge(x), x, GRID, 5)


@pytest.mark.parametrize("name", clustering_names())
def test_same_clusters_and_nothing_compiles_for_another_image(quick, name):
    eager, in_a_graph = get_clustering(name), Compiled(get_clustering(name))
    for seed in range(3):
        x = tokens(seed=seed)
        for got, want in zip(both(in_a_graph, x), both(eager, x), strict=True):
            assert torch.equal(got.assignment, want.assignment) and torch.equal(got.counts, want.counts)
            assert (got.centers is None) == (want.centers is None)
            assert got.centers is None or torch.equal(got.centers, want.centers)
        assert graphs() == 2


def test_every_size_has_a_graph_and_copies_share_it(quick):
    clustering = Compiled(KMeans())
    for number in range(1, 11):  # more than torch keeps of one function
        clustering(tokens(number), GRID, 12)
    assert graphs() == 10
    for other in (copy.deepcopy(clustering), pickle.loads(pickle.dumps(clustering)), Compiled(KMeans())):
        assert other == clustering
        other(tokens(), GRID, 12)
    assert graphs() == 10
    Compiled(KMeans(num_rounds=1))(tokens(), GRID, 12)
    assert graphs() == 11


@pytest.mark.parametrize("locations, keep", [(1, 0.25), ((1, 2), (0.5, 0.25))])
def test_an_eager_model_with_it(quick, locations, keep):
    fields = {"cluster_location": locations, "keep_ratio": keep, "clustering": "kmeans"}
    name = "ViTForImageClassification"
    model = make_model(name)
    plain = predict(model, name, images())
    want = [predict(apply_ailurus(model, **fields), name, images(seed=seed)) for seed in range(3)]
    assert graphs() == 0
    apply_ailurus(model, **fields, compile_clustering=True)
    once = 1 if locations == 1 else 2
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for seed in range(3):
            torch.testing.assert_close(predict(twin, name, images(seed=seed)), want[seed])
        assert graphs() == once
        assert torch.equal(predict(remove_ailurus(twin), name, images()), plain)


@pytest.mark.parametrize("with_processor", [False, True])
def test_a_diffusion_network_with_it(quick, with_processor):
    fields = {"keep_ratio": 0.25, "min_tokens": 12, "clustering": "kmeans"}
    sample = diffusion_models.latents(diffusion_models.NETWORKS["UNet"].shape)
    outputs, counted = [], []
    for in_a_graph in (False, True):
        network = diffusion_models.make_network("UNet")
        if with_processor:
            processor = AiluRusProcessor(grid=sample.shape[-2:], **fields, compile_clustering=in_a_graph)
            network.set_attn_processor(processor)
        else:
            apply_ailurus(network, **fields, scope="attention", compile_clustering=in_a_graph)
        outputs += [diffusion_models.predict(network, "UNet", sample + number) for number in range(2)]
        counted.append(graphs())
    assert counted[0] == 0 < counted[1]
    torch.testing.assert_close(outputs[2:], outputs[:2])


def test_part_of_a_compiled_model_of_an_exported_one_and_of_what_counts_operators(quick):
    clustering = Compiled(KMeans())

    class Model(torch.nn.Module):
        def forward(self, x):
            return clustering(x, GRID, 12).assignment

    want = KMeans()(tokens(), GRID, 12).assignment
    assert torch.equal(torch.compile(Model(), fullgraph=True)(tokens()), want) and graphs() == 1
    assert torch.equal(torch.export.export(Model(), (tokens(),)).module()(tokens()), want)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(Model()(tokens()), want)
    assert counter.get_total_flops() > 0
    assert Model()(tokens().to("meta")).is_meta


def test_without_a_compiler_an_error_in_words(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing is compiled yet
    # By torch's own patch: monkeypatch deletes the setting when it puts it back, and later graphs fail without it.
    setting = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with setting, pytest.raises(AiluRusError, match=r"KMeans\(.*cannot be compiled here.*needs a C\+\+ compiler"):
        Compiled(KMeans())(tokens(), GRID, 12)


def test_what_makes_no_one_graph_and_what_cannot_be_found_again(quick):
    def halves(features, grid, num_clusters):
        assert features.sum().item() != 0.5
        return TokenClusters.from_assignment(torch.arange(48).expand(len(features), -1) // 24, 2)

    with pytest.raises(AiluRusError, match="cannot be compiled here"):
        Compiled(FromFunction(halves))(tokens(), GRID, 12)

    @dataclass(frozen=True)
    class Listed(KMeans):
        numbers: list = field(default_factory=list)

    with pytest.raises(AiluRusError, match="must be hashable"):
        Compiled(Listed())


def test_settings_with_it_are_saved_and_go_with_what_they_can():
    config = AiluRusConfig(keep_ratio=0.5, compile_clustering=True)
    assert AiluRusConfig.from_json(config.to_json()) == config and not AiluRusConfig(keep_ratio=0.5).compile_clustering
    with pytest.raises(AiluRusError, match="compile_clustering=False"):
        AiluRusConfig(keep_ratio=0.5, min_keep_ratio=0.2, compile_clustering=True)
