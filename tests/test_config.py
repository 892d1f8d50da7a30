"""AiluRusConfig: checks, M for N, the paper's form, and the way through JSON."""

import json

import pytest

from ailurus_hf import AiluRusConfig, AiluRusError
from ailurus_hf.clustering import DensityPeaks, get_clustering


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "exactly one of num_clusters and keep_ratio"),
        ({"keep_ratio": 0.5, "num_clusters": 9}, "num_clusters=9 and keep_ratio=0.5"),
        ({"keep_ratio": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"keep_ratio": 1.5}, "got 1.5"),
        ({"keep_ratio": float("nan")}, "got nan"),
        ({"num_clusters": 0}, "at least 1, got 0"),
        ({"keep_ratio": 0.5, "cluster_location": -1}, "got -1"),
        ({"keep_ratio": 0.5, "clustering": {"name": "density_peaks", "alpha": 2.0}}, "between 0 and 1, got 2.0"),
        (
            {"keep_ratio": 0.5, "clustering": "dbscan"},
            "'density_peaks', 'local_kmeans', 'kmeans', 'pairs', 'ward', got 'dbscan'",
        ),
        ({"keep_ratio": 0.5, "restore": "mean"}, "got 'mean'"),
        ({"keep_ratio": 0.5, "restore": "residual", "restore_at": "decoder"}, "use restore_at='backbone'"),
        ({"keep_ratio": 0.5, "cluster_location": 4, "restore_location": 4}, "past cluster_location 4, got 4"),
        ({"keep_ratio": 0.5, "restore_location": 9, "restore_at": "decoder"}, "restore_location 9"),
    ],
)
def test_bad_fields_name_the_number(fields, message):
    with pytest.raises(AiluRusError, match=message):
        AiluRusConfig(**{"cluster_location": 2, **fields})


@pytest.mark.parametrize(
    "fields, num_tokens, want",
    [
        ({"keep_ratio": 0.25}, 1600, 400),
        ({"keep_ratio": 0.001}, 100, 1),
        ({"keep_ratio": 1.0}, 7, 7),
        ({"num_clusters": 400}, 1600, 400),
        ({"num_clusters": 400}, 196, 196),
    ],
)
def test_clusters_for(fields, num_tokens, want):
    assert AiluRusConfig(cluster_location=2, **fields).clusters_for(num_tokens) == want


def test_paper_is_the_paper_whatever_the_defaults():
    config = AiluRusConfig.paper(2, 400)
    assert (config.cluster_location, config.num_clusters, config.clustering) == (2, 400, "density_peaks")
    clustering = get_clustering(config.clustering)
    assert clustering == DensityPeaks(alpha=0.9, num_spatial_neighbors=50, num_density_neighbors=1)
    assert (config.restore, config.restore_at, config.restore_location) == ("copy", "decoder", None)


def test_what_a_decoder_restores_is_copied():
    assert AiluRusConfig(keep_ratio=0.5).restore == "residual"
    assert AiluRusConfig(keep_ratio=0.5, restore_at="decoder").restore == "copy"
    assert AiluRusConfig(keep_ratio=0.5, restore="copy").restores_after_decoder


def test_json_round_trip_and_unknown_fields():
    config = AiluRusConfig(cluster_location=3, keep_ratio=0.4, restore="residual")
    fields = json.loads(json.dumps(config.to_dict()))
    assert AiluRusConfig.from_dict(fields) == config
    with pytest.warns(UserWarning, match="from_the_future"):
        assert AiluRusConfig.from_dict({**fields, "from_the_future": 1}) == config
