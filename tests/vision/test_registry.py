"""A family from outside the package, as the how-to in CONTRIBUTING.md adds one; what is registered twice."""

import copy
import pickle

import pytest
import torch
from models import GRID, PATCH, blocky_images_for, images
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ailurus_hf import (
    AiluRusError,
    Family,
    Reader,
    TokenDecoder,
    UnsupportedModelError,
    ailurus_status,
    apply_ailurus,
    register_family,
    register_reader,
    register_token_decoder,
    remove_ailurus,
)
from ailurus_hf.vision import registry


class PlainConfig(PreTrainedConfig):
    model_type = "plain-vit"

    def __init__(self, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, patch_size=PATCH, **kwargs):
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.patch_size = num_attention_heads, patch_size
        super().__init__(**kwargs)


class PlainAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        heads = self.config.num_attention_heads
        query, key, value = self.qkv(hidden_states).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, sdpa_attention_forward)
        return self.o_proj(attend(self, query, key, value, None, **kwargs)[0].flatten(2))


class PlainLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.norm = PlainAttention(config), nn.LayerNorm(config.hidden_size)
        self.mlp = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.attention(self.norm(hidden_states), **kwargs)
        return hidden_states + self.mlp(hidden_states).relu()


class PlainViT(PreTrainedModel):
    config_class = PlainConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.cls = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.layers = nn.ModuleList([PlainLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, pixel_values):
        patches = self.embed(pixel_values).flatten(2).transpose(1, 2)
        hidden_states = torch.cat([self.cls.expand(len(patches), -1, -1), patches], 1)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


FAMILY = Family("plain ViT", PlainViT, prefix=1)


@pytest.fixture(autouse=True)
def registered():
    """The family is there for these tests alone: tables of what the package declares are made in the same process."""
    tables = registry.FAMILIES, registry.TOKEN_DECODERS, registry.READERS
    before = [dict(table) for table in tables]
    register_family(FAMILY)
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


class Undeclared(PlainViT):
    pass


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = PlainViT(PlainConfig()).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.qkv.weight[:64] *= 3
            layer.attention.qkv.weight.mul_(4)
    return model


@torch.no_grad()
def test_a_family_from_outside_is_reduced_and_undone(model):
    x = images()
    plain, before = model(x), [sorted(vars(module)) for module in model.modules()]
    reduced = apply_ailurus(model, cluster_location=1, keep_ratio=0.25)(x)
    (row,) = ailurus_status(model).locations
    assert (row.num_tokens, row.num_clusters) == (GRID[0] * GRID[1], 24)
    assert reduced.shape == plain.shape and (reduced - plain).abs().max() > 1e-2 * plain.abs().max()
    assert torch.equal(copy.deepcopy(model)(x), reduced) and torch.equal(pickle.loads(pickle.dumps(model))(x), reduced)
    assert torch.equal(remove_ailurus(model)(x), plain)
    assert [sorted(vars(module)) for module in model.modules()] == before


@torch.no_grad()
def test_a_family_from_outside_counts_tokens(model):
    x = blocky_images_for("ViTModel")
    plain = model(x)
    apply_ailurus(model, cluster_location=1, keep_ratio=0.25)
    torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    apply_ailurus(model, cluster_location=1, keep_ratio=1.0)
    assert torch.equal(model(x), plain)


def test_registering_again_is_nothing_and_otherwise_an_error():
    assert register_family(Family("plain ViT", f"{__name__}.PlainViT", prefix=1)) is FAMILY
    with pytest.raises(AiluRusError, match=r"PlainViT is registered already, with other settings.*prefix=1"):
        register_family(Family("plain ViT", PlainViT))
    for register, made, other in (
        (register_token_decoder, lambda: TokenDecoder(PlainLayer), TokenDecoder(PlainLayer, suffix="classes")),
        (register_reader, lambda: Reader(Undeclared, len), Reader(Undeclared, sum)),
    ):
        assert register(made()) is register(made())
        with pytest.raises(AiluRusError, match="registered already"):
            register(other)
    with pytest.raises(AiluRusError, match="class or its qualified name with the module, got 'ViT'"):
        Family("ViT", "ViT")


def test_a_subclass_is_another_class():
    with pytest.raises(UnsupportedModelError, match="Undeclared is a subclass of PlainViT that nobody declared"):
        apply_ailurus(Undeclared(PlainConfig()), keep_ratio=0.5)


def test_layers_that_hand_nothing_on_are_refused(model):
    class Blind(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states

    model.layers = nn.ModuleList([Blind() for _ in model.layers])
    with pytest.raises(UnsupportedModelError, match="takes no attention_mask, only hidden_states, kwargs"):
        apply_ailurus(model, cluster_location=1, keep_ratio=0.5)
