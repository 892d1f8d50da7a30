"""Configs of 0.1 load, from their own files and from a saved model; JSON, presets, strict values."""

import json

import numpy as np
import pytest
import torch
from models import images, make_model, predict

from ailurus_hf import (
    AiluRusConfig,
    AiluRusDiffusionConfig,
    AiluRusError,
    AiluRusModel,
    Level,
    ailurus_status,
    apply_ailurus,
)
from ailurus_hf.clustering import DensityPeaks, KMeans, LocalKMeans, get_clustering
from ailurus_hf.config_base import FORMAT_VERSION
from ailurus_hf.presets import DIFFUSION_PRESETS, TRANSFORMER_PRESETS, VISION_PRESETS

# What to_dict gave in 0.1.
PAPER_0_1 = {
    "cluster_location": 2,
    "num_clusters": 400,
    "keep_ratio": None,
    "min_keep_ratio": None,
    "clustering": "density_peaks",
    "alpha": 0.9,
    "num_spatial_neighbors": 50,
    "num_density_neighbors": 1,
    "restore": "copy",
    "restore_at": "decoder",
    "restore_location": None,
    "stages": None,
    "check_finite": False,
}
UNET_0_1 = {
    "keep_ratio": {"1": 0.0625, "2": 0.25},
    "min_tokens": 1024,
    "scope": {"1": "attention"},
    "reduce": "kv",
    "cluster_location": 1,
    "cluster_per": "stack",
    "projections": "all",
    "refresh_every": 1,
    "share_cfg": None,
    "unreduced_first_steps": 0,
    "unreduced_last_steps": 0,
    "frames": "each",
    "clustering": "local_kmeans",
    "alpha": 0.9,
    "num_spatial_neighbors": 50,
    "num_density_neighbors": 1,
    "check_finite": False,
}
VISION, DIFFUSION = {"keep_ratio": 0.5}, {}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "saved, want",
    [
        (PAPER_0_1, AiluRusConfig.paper(2, 400)),
        (
            {**PAPER_0_1, "alpha": 0.8, "num_spatial_neighbors": 20, "num_density_neighbors": 2},
            AiluRusConfig(num_clusters=400, clustering=DensityPeaks(0.8, 20, 2), restore="copy", restore_at="decoder"),
        ),
        (
            {
                **PAPER_0_1,
                "cluster_location": [1, 3],
                "num_clusters": None,
                "keep_ratio": [0.65, 0.37],
                "clustering": "pairs",
                "restore_at": None,
            },
            AiluRusConfig.preset("classification"),
        ),
        (
            UNET_0_1,
            AiluRusDiffusionConfig(
                keep_ratio={1: 0.0625, 2: 0.25}, levels={1: Level(scope="attention")}, reduce="kv", cluster_per="stack"
            ),
        ),
        (
            {**UNET_0_1, "scope": {"1": "attention", "2": "blocks"}, "reduce": {"1": "kv", "4": "kv"}},
            AiluRusDiffusionConfig(
                keep_ratio={1: 0.0625, 2: 0.25},
                levels={1: Level(scope="attention", reduce="kv"), 2: Level(scope="blocks"), 4: Level()},
                cluster_per="stack",
            ),
        ),
        (
            {**UNET_0_1, "keep_ratio": 0.5, "scope": "attention", "clustering": "density_peaks", "alpha": 1.0},
            AiluRusDiffusionConfig(
                scope="attention", reduce="kv", cluster_per="stack", clustering=DensityPeaks(alpha=1.0)
            ),
        ),
    ],
)
def test_what_0_1_saved_loads(saved, want):
    assert type(want).from_dict(json.loads(json.dumps(saved))) == want
    assert type(want).from_json(want.to_json()) == want


def test_settings_that_a_clustering_of_0_1_did_not_have_are_told():
    with pytest.warns(UserWarning, match=r"ignoring.*0.5.*only the clustering 'density_peaks'"):
        config = AiluRusConfig.from_dict({**PAPER_0_1, "clustering": "ward", "alpha": 0.5})
    assert config.clustering == "ward"


def test_a_model_that_0_1_saved_loads_and_gives_the_same(tmp_path):
    model = make_model("ViTModel")
    clustering = DensityPeaks(alpha=0.5, num_spatial_neighbors=8)
    expected = predict(
        apply_ailurus(model, num_clusters=20, clustering=clustering, cluster_location=1), "ViTModel", images(2)
    )
    model.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "config.json").read_text())
    assert file["ailurus_config"]["format_version"] == FORMAT_VERSION
    old = {**PAPER_0_1, "cluster_location": 1, "num_clusters": 20, "alpha": 0.5, "num_spatial_neighbors": 8}
    file["ailurus_config"] = {**old, "restore": "residual", "restore_at": None}
    (tmp_path / "config.json").write_text(json.dumps(file))
    loaded = AiluRusModel.from_pretrained(tmp_path)
    assert torch.equal(predict(loaded.eval(), "ViTModel", images(2)), expected)
    assert ailurus_status(loaded).config["clustering"] == clustering.to_dict()


def test_files(tmp_path):
    config = AiluRusConfig(keep_ratio=0.5, clustering=LocalKMeans(num_rounds=2))
    config.save(tmp_path / "ailurus.json")
    assert AiluRusConfig.load(tmp_path / "ailurus.json") == config
    fields = json.loads((tmp_path / "ailurus.json").read_text())
    assert fields["format_version"] == FORMAT_VERSION
    assert fields["clustering"] == {"name": "local_kmeans", "num_rounds": 2, "kernel": "torch"}
    for text in ("keep_ratio: 0.5", "[0.5]"):
        with pytest.raises(AiluRusError, match="JSON"):
            AiluRusConfig.from_json(text)
    with pytest.warns(UserWarning, match="newer"):
        AiluRusConfig.from_dict({**fields, "format_version": 3})
    with pytest.raises(AiluRusError, match="use from_dict"):
        AiluRusConfig(keep_ratio=0.5, format_version=1)
    with pytest.raises(AiluRusError, match="format_version must be a whole number, got 'two'"):
        AiluRusConfig.from_dict({**fields, "format_version": "two"})


@pytest.mark.parametrize("clustering", ["ward", KMeans(num_rounds=1), {"name": "kmeans", "num_rounds": 1}])
@pytest.mark.parametrize("kind, fields", [(AiluRusConfig, VISION), (AiluRusDiffusionConfig, DIFFUSION)])
def test_a_clustering_by_name_object_or_mapping(kind, fields, clustering):
    config = kind(**fields, clustering=clustering)
    assert config.clustering == ("ward" if clustering == "ward" else KMeans(num_rounds=1))
    assert kind.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", ["alpha", "num_spatial_neighbors", "num_density_neighbors"])
@pytest.mark.parametrize("kind, fields", [(AiluRusConfig, VISION), (AiluRusDiffusionConfig, DIFFUSION)])
def test_settings_of_density_peaks_are_sent_to_density_peaks(kind, fields, name):
    with pytest.raises(AiluRusError, match=rf"DensityPeaks\({name}=1\)"):
        kind(**fields, **{name: 1})


@pytest.mark.parametrize(
    "fields, read",
    [
        ({"num_clusters": np.int64(16)}, {"num_clusters": 16}),
        ({"num_clusters": torch.tensor(10)}, {"num_clusters": 10}),
        ({"num_clusters": 10.0}, {"num_clusters": 10}),
        ({"num_clusters": torch.tensor([20, 10]), "cluster_location": np.array([1, 2])}, {"num_clusters": (20, 10)}),
        ({"keep_ratio": 0.5, "cluster_location": np.int64(1)}, {"cluster_location": 1}),
        ({"keep_ratio": [0.5], "cluster_location": [2.0]}, {"keep_ratio": 0.5, "cluster_location": 2}),
        ({"keep_ratio": np.float32(0.25), "check_finite": np.bool_(True)}, {"keep_ratio": 0.25, "check_finite": True}),
        ({"keep_ratio": torch.tensor(0.25), "restore": np.str_("copy")}, {"keep_ratio": 0.25, "restore": "copy"}),
        ({"keep_ratio": 1, "stages": [np.int32(3)]}, {"keep_ratio": 1, "stages": (3,)}),
    ],
)
def test_exact_values_of_other_types_are_read(fields, read):
    config = AiluRusConfig(**fields)
    assert {name: getattr(config, name) for name in read} == read
    assert all(type(getattr(config, name)) is type(value) for name, value in read.items())
    assert AiluRusConfig.from_json(config.to_json()) == config
    hash(config)


NUMBERS = [
    "10",
    float("nan"),
    float("inf"),
    -1,
    True,
    np.bool_(True),
    torch.tensor([[1]]),
    None,
    2 + 0j,
    b"1",
    "nan",
    {},
]
STRINGS = ["", "Copy", 1, True, None, torch.tensor(1), np.array("copy"), ["copy"], {"copy": 1}]
FLAGS = ["yes", 0, 1, 1.0, "True", float("nan"), torch.tensor(1), [True], {}]
WRONG = [
    *((AiluRusConfig, "num_clusters", value, VISION) for value in (*NUMBERS, 10.5, np.float64(10.5), 0)),
    *((AiluRusConfig, "keep_ratio", value, {}) for value in (*NUMBERS, 0, 1.5)),
    *((AiluRusConfig, "min_keep_ratio", value, VISION) for value in NUMBERS if value is not None),
    *((AiluRusConfig, "cluster_location", value, VISION) for value in (*NUMBERS, 2.5, ())),
    *((AiluRusConfig, "restore_location", value, VISION) for value in (*NUMBERS, 3.5) if value is not None),
    *((AiluRusConfig, "stages", value, VISION) for value in ("3", 3, [True], [2.5], [float("nan")], ["3"], [-1], [])),
    *((AiluRusConfig, name, v, VISION) for name in ("restore", "restore_at") for v in STRINGS if v is not None),
    *(
        (kind, "clustering", v, f)
        for kind, f in ((AiluRusConfig, VISION), (AiluRusDiffusionConfig, {}))
        for v in STRINGS
    ),
    *(
        (kind, "check_finite", v, f)
        for kind, f in ((AiluRusConfig, VISION), (AiluRusDiffusionConfig, {}))
        for v in FLAGS
    ),
    *(
        (AiluRusDiffusionConfig, "keep_ratio", value, {})
        for value in (*NUMBERS, 0, 1.5, {"a": 0.5}, {1.5: 0.5}, {1: "x"})
    ),
    *(
        (AiluRusDiffusionConfig, name, value, {})
        for name in ("min_tokens", "cluster_location", "refresh_every", "unreduced_first_steps", "unreduced_last_steps")
        for value in (*NUMBERS, 1.5)
    ),
    *(
        (AiluRusDiffusionConfig, name, value, {})
        for name in ("scope", "reduce", "cluster_per", "projections", "frames")
        for value in STRINGS
    ),
    *((AiluRusDiffusionConfig, "share_cfg", value, {}) for value in FLAGS),
    *((AiluRusDiffusionConfig, "levels", v, {}) for v in (1, "x", [1], {1: 0.5}, {"a": {}}, {1: {"keep_ratio": True}})),
    *((LocalKMeans, "num_rounds", value, {}) for value in (*NUMBERS, 1.5, 0)),
    *((LocalKMeans, "kernel", value, {}) for value in (*STRINGS, "Triton")),
    *((KMeans, "num_rounds", value, {}) for value in (*NUMBERS, 1.5, 0)),
    *(
        (DensityPeaks, name, v, {})
        for name in ("num_spatial_neighbors", "num_density_neighbors")
        for v in (*NUMBERS, 1.5)
    ),
    *((DensityPeaks, "alpha", value, {}) for value in (*NUMBERS, 1.5)),
]


@pytest.mark.parametrize("kind, name, value, fields", WRONG)
def test_wrong_values_are_named_when_a_config_is_made(kind, name, value, fields):
    with pytest.raises(AiluRusError) as error:
        kind(**{**(fields if name != "num_clusters" else {}), name: value})
    assert name in str(error.value) or name == "levels"


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_presets_of_vision(name):
    config = AiluRusConfig.preset(name)
    assert AiluRusConfig.from_json(config.to_json()) == config
    assert AiluRusConfig.preset(name, check_finite=True) == AiluRusConfig(
        **{**VISION_PRESETS[name], "check_finite": True}
    )
    one = AiluRusConfig.preset(name, cluster_location=3, keep_ratio=0.4)
    assert (one.num_clusters, one.keep_ratio, one.cluster_location) == (None, 0.4, 3)
    assert one.clustering == config.clustering and one.restore == config.restore
    one = AiluRusConfig.preset(name, cluster_location=3, num_clusters=9)
    assert (one.num_clusters, one.keep_ratio) == (9, None)


def test_presets_are_those_of_the_tables():
    assert AiluRusConfig.preset("paper") == AiluRusConfig.paper(2, 400)
    assert AiluRusConfig.preset("dense").clusters_for(2700) == 675
    assert AiluRusConfig.preset("classification").clusters_for(196, 1) == 73
    with pytest.raises(AiluRusError, match="'paper', 'dense', 'classification', got 'fast'"):
        AiluRusConfig.preset("fast")
    with pytest.raises(AiluRusError, match="'fast', 'balanced', 'faithful', got 'paper'"):
        AiluRusDiffusionConfig.preset("paper")
    with pytest.raises(AiluRusError, match=r"keep_ration.*the fields are"):
        AiluRusDiffusionConfig.preset("fast", keep_ration=1)


@pytest.mark.parametrize("name", DIFFUSION_PRESETS)
def test_presets_of_diffusion(name):
    config = AiluRusDiffusionConfig.preset(name)
    assert AiluRusDiffusionConfig.from_json(config.to_json()) == config
    assert AiluRusDiffusionConfig.preset(name, keep_ratio=0.5).keep_ratio == 0.5
    kept = 256 if name == "fast" else 512
    assert config.clusters_for(4096, 1, largest=True) == kept and not config.merges_queries(1)
    # The layers that run in all steps are a UNet's alone.
    assert config.inner_every == {"fast": 5, "balanced": 3, "faithful": 2}[name] and config.extrapolate


@pytest.mark.parametrize("name", TRANSFORMER_PRESETS)
def test_presets_of_transformers(name):
    config = AiluRusDiffusionConfig.preset(name, network="transformer")
    assert AiluRusDiffusionConfig.from_json(config.to_json()) == config
    assert config.levels is None and isinstance(config.keep_ratio, float)
    assert config != AiluRusDiffusionConfig.preset(name)
    assert AiluRusDiffusionConfig.preset(name, "transformer", min_tokens=256).min_tokens == 256
    with pytest.raises(AiluRusError, match="network must be one of 'unet', 'transformer', got 'dit'"):
        AiluRusDiffusionConfig.preset(name, "dit")


def test_levels_take_what_they_leave_out_from_the_config():
    config = AiluRusDiffusionConfig(
        keep_ratio=0.5, levels={1: Level(scope="attention", reduce="kv"), 2: Level(keep_ratio=0.25)}
    )
    assert [config.clusters_for(4096, level) for level in (1, 2, 4)] == [2048, 1024, 2048]
    assert [config.scope_at(level) for level in (1, 2, 4)] == ["attention", "blocks", "blocks"]
    assert [config.merges_queries(level) for level in (1, 2, 4)] == [False, True, True]
    assert config.has_scope("attention") and config.has_scope("blocks")
    assert AiluRusDiffusionConfig(levels={"2": {"keep_ratio": 0.25}}) == AiluRusDiffusionConfig(
        levels={2: Level(keep_ratio=0.25)}
    )


def test_every_clustering_is_made_from_its_settings():
    for name in ("density_peaks", "local_kmeans", "kmeans", "pairs", "ward"):
        clustering = get_clustering(name)
        assert get_clustering(json.loads(json.dumps(clustering.to_dict()))) == clustering and clustering.name == name
