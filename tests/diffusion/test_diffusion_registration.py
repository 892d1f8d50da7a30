"""A network from outside the package is declared and reduced; settings travel with networks and pipelines."""

import copy
import importlib
import logging
import pickle
import pkgutil

import diffusers
import diffusers.models.controlnets
import diffusers.models.transformers
import diffusers.models.unets
import pytest
import torch
from diffusers import DDIMScheduler, HunyuanDiT2DControlNetModel, StableDiffusionControlNetPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_utils import ModelMixin
from diffusion_models import NETWORKS, SETTINGS, generate, latents, make_network, make_pipeline, predict, sharpen
from diffusion_pipelines import ours, text_to_image
from packaging.version import Version
from torch import nn
from traces import traces

from ailurus_hf import (
    AiluRusDiffusionConfig,
    AiluRusError,
    UnsupportedModelError,
    ailurus_status,
    apply_ailurus,
    remove_ailurus,
)
from ailurus_hf.diffusion import IMAGE_ONLY, DiffusionNetwork, OwnProcessor, register_network
from ailurus_hf.diffusion.declarations import DECLARATIONS
from ailurus_hf.diffusion.networks import reason_against
from ailurus_hf.diffusion.refused import LISTS, REFUSED


class Patches(ModelMixin, ConfigMixin):
    """A transformer on patches, as someone else may write it."""

    @register_to_config
    def __init__(self, patch_size=2, width=16):
        super().__init__()
        self.embed = nn.Conv2d(4, width, patch_size, patch_size)
        self.layers = nn.ModuleList(BasicTransformerBlock(width, 2, 8) for _ in range(3))
        self.head = nn.ConvTranspose2d(width, 4, patch_size, patch_size)

    def forward(self, sample, timestep=None):
        maps = self.embed(sample)
        tokens = maps.flatten(2).transpose(1, 2)
        for block in self.layers:
            tokens = block(tokens)
        return self.head(tokens.transpose(1, 2).reshape(maps.shape))


class LargerPatches(Patches):
    pass


def test_a_network_from_outside_is_declared_in_one_line_and_reduced(monkeypatch):
    torch.manual_seed(0)
    network, x = sharpen(LargerPatches()), latents((4, 16, 24))
    with pytest.raises(UnsupportedModelError, match="LargerPatches holds no network"):
        apply_ailurus(network, **SETTINGS)
    from ailurus_hf.diffusion import networks

    monkeypatch.setattr(networks, "_DECLARED", dict(networks._DECLARED))
    register_network(DiffusionNetwork(Patches, blocks=("layers",), token_order=IMAGE_ONLY))
    with torch.no_grad():
        plain, before = network(x), traces(network)
        for way in ({}, {"scope": "attention"}, {"scope": "attention", "reduce": "kv"}):
            reduced = apply_ailurus(network, **SETTINGS, **way)(x)
            assert (reduced - plain).abs().max() > 1e-3 * plain.abs().max()
            location = ailurus_status(network).locations[0]
            assert (location.num_tokens, location.num_clusters) == (96, 24) and 0 < location.flops_saved < 1
            assert torch.equal(remove_ailurus(network)(x), plain) and traces(network) == before
        # The same where no token has to go.
        apply_ailurus(network, **{**SETTINGS, "keep_ratio": 1.0})
        torch.testing.assert_close(network(x), plain)


def test_wrong_declarations_are_refused(monkeypatch):
    for fields, message in (
        ({"network": "Patches"}, "class of torch modules, got 'Patches'"),
        ({"network": Patches, "layout": "rows"}, "'tokens' or 'maps', got 'rows'"),
        ({"network": Patches, "attention": "bias"}, "'mask' or OwnProcessor"),
        ({"network": Patches, "layout": "maps", "attention": OwnProcessor()}, "leave attention='mask'"),
    ):
        with pytest.raises(AiluRusError, match=message):
            DiffusionNetwork(**fields)
    from ailurus_hf.diffusion import networks

    class TakesNoMask(Patches):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 16) for _ in range(2)])

    monkeypatch.setattr(networks, "_DECLARED", dict(networks._DECLARED))
    register_network(DiffusionNetwork(TakesNoMask, blocks=("layers",)))
    with pytest.raises(UnsupportedModelError, match=r"TransformerEncoderLayer takes no attention_mask.*OwnProcessor"):
        apply_ailurus(TakesNoMask())


# Settings


@pytest.mark.parametrize("name", NETWORKS)
def test_settings_are_saved_with_a_network_and_taken_from_it(name, tmp_path):
    if name == "ControlNet-XS":
        pytest.skip("what diffusers loads is not quite what it saved, without AiluRus, too")
    network, x = make_network(name), latents(NETWORKS[name].shape)
    config = AiluRusDiffusionConfig(**SETTINGS, scope="attention", reduce="kv")
    before = dict(network.config)
    reduced = predict(apply_ailurus(network, config), name, x)
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    assert "it was saved with settings" in str(ailurus_status(loaded))
    # Without AiluRus it is a plain network.
    assert not ailurus_status(loaded).active
    torch.testing.assert_close(predict(apply_ailurus(loaded), name, x), reduced)
    assert ailurus_status(loaded).config == config.to_dict()
    assert before.items() <= dict(remove_ailurus(network).config).items() and "ailurus_config" not in network.config
    assert "ailurus_config" not in remove_ailurus(loaded).config
    apply_ailurus(loaded)
    assert ailurus_status(loaded).config == AiluRusDiffusionConfig().to_dict()


def test_settings_are_saved_with_a_pipeline(tmp_path):
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS, levels={1: {"scope": "attention"}})
    reduced = generate(pipe)
    pipe.save_pretrained(tmp_path)
    # The pipeline's parts that are not networks are not saved: it has no text encoder.
    loaded = text_to_image()[0]
    loaded.unet = type(pipe.unet).from_pretrained(tmp_path / "unet")
    torch.testing.assert_close(generate(apply_ailurus(loaded)), reduced)
    remove_ailurus(loaded).save_pretrained(tmp_path / "plain")
    assert "ailurus" not in (tmp_path / "plain" / "unet" / "config.json").read_text()


# Copies


@pytest.mark.parametrize("name", ["UNet", "PixArt", "Flux", "Wan"])
@pytest.mark.parametrize("scope", ["blocks", "attention"])
def test_a_pickle_is_reduced_and_on_its_own(name, scope):
    network, x = make_network(name), latents(NETWORKS[name].shape)
    plain = predict(network, name, x)
    reduced = predict(apply_ailurus(network, **SETTINGS, scope=scope), name, x)
    twin = pickle.loads(pickle.dumps(network))
    remove_ailurus(network)
    assert torch.equal(predict(twin, name, x), reduced)
    assert torch.equal(predict(remove_ailurus(twin), name, x), plain)
    assert traces(twin) == traces(network)


def test_a_copied_pipeline_is_reduced_and_on_its_own():
    pipe = text_to_image()[0]
    plain = generate(pipe)
    for scope in ("blocks", "attention"):
        reduced = generate(apply_ailurus(pipe, **SETTINGS, scope=scope))
        twin = copy.deepcopy(pipe)
        assert torch.equal(generate(remove_ailurus(pipe)), plain)
        assert torch.equal(generate(twin), reduced)
        assert torch.equal(generate(remove_ailurus(twin)), plain)


# What is left whole


def classes_of_diffusers():
    """Every transformer, UNet and ControlNet, by name."""
    found = {}
    for package in (diffusers.models.transformers, diffusers.models.unets, diffusers.models.controlnets):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if info.name.endswith("_flax"):
                continue  # diffusers 0.39 has some, which need flax
            for kind in vars(importlib.import_module(info.name)).values():
                if isinstance(kind, type) and issubclass(kind, ModelMixin) and kind.__module__ == info.name:
                    found[kind.__name__] = kind
    return found


def test_every_network_of_diffusers_is_supported_or_refused():
    known = classes_of_diffusers()
    supported = {declared.network.__name__ for declared in DECLARATIONS}
    assert not supported & set(REFUSED) and not supported & set(LISTS) and not set(REFUSED) & set(LISTS)
    assert known.keys() - supported - set(REFUSED) - set(LISTS) == set()
    if Version(diffusers.__version__) >= Version("0.42"):
        assert (supported | set(REFUSED) | set(LISTS)) == known.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_network_says_why(name):
    kind = classes_of_diffusers().get(name)
    if kind is None:
        pytest.skip("this version of diffusers has no such network")
    # Its weights do not matter.
    network = kind.__new__(kind)
    nn.Module.__init__(network)
    with pytest.raises(UnsupportedModelError) as error:
        apply_ailurus(network)
    assert str(error.value).startswith(f"{name} is not supported: {REFUSED[name]}. Supported networks: ")
    # A class that derives from it may be declared.
    subclass = type("Mine", (kind,), {})
    network.__class__ = subclass
    assert reason_against(network) == REFUSED[name]


def test_every_supported_network_has_gone_through_the_suite():
    tested = {type(NETWORKS[name].make()) for name in NETWORKS}
    assert {declared.network for declared in DECLARATIONS} == tested - {type(None)}


def test_controls_that_are_left_whole_are_named(caplog):
    pipe = make_pipeline(StableDiffusionControlNetPipeline, controlnet=LargerPatches())
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        apply_ailurus(pipe, **SETTINGS)
    assert [record.getMessage() for record in ours(caplog)] == [
        "controlnet is left whole: a LargerPatches is no network that AiluRus can reduce"
    ]
    rows = [row for row in ailurus_status(pipe).locations if row.where == "controlnet"]
    assert len(rows) == 1 and "left whole" in rows[0].restored and "left whole" in str(ailurus_status(pipe))


def test_a_refused_control_is_left_whole_and_the_reason_said(caplog):
    sizes = {"hidden_size": 16, "cross_attention_dim": 16, "cross_attention_dim_t5": 16, "pooled_projection_dim": 16}
    control = HunyuanDiT2DControlNetModel(
        **sizes, num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, transformer_num_layers=6
    )
    pipe = make_pipeline(StableDiffusionControlNetPipeline, controlnet=control)
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        apply_ailurus(pipe, **SETTINGS)
    (record,) = ours(caplog)
    assert "controlnet is left whole" in record.getMessage() and REFUSED["HunyuanDiT2DControlNetModel"] in caplog.text
    assert [row.where for row in ailurus_status(pipe).locations if "left whole" in row.restored] == ["controlnet"]


def test_what_is_no_network_is_refused():
    with pytest.raises(UnsupportedModelError, match="DDIMScheduler is no network"):
        apply_ailurus(DDIMScheduler())
