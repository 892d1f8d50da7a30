"""apply, remove, status: errors that name the number and leave the model as it was, settings, numbers of the table."""

import subprocess
import sys

import pytest
import torch
import transformers as hf
from diffusion_models import make_network
from model_parts import DEPTH, GRID
from models import images, make_model, predict, run
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from traces import traces
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel
from transformers.models.vit.modeling_vit import ViTLayer

from ailurus_hf import (
    AiluRusConfig,
    AiluRusError,
    AiluRusModel,
    UnsupportedModelError,
    ailurus_enabled,
    ailurus_status,
    apply_ailurus,
    remove_ailurus,
)
from ailurus_hf.evaluation import layer_flops

NAME = "ViTForImageClassification"


@pytest.mark.parametrize("on_before", [False, True])
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"cluster_location": DEPTH, "keep_ratio": 0.5}, f"cluster_location {DEPTH} leaves none of the {DEPTH} layers"),
        ({"cluster_location": 99, "keep_ratio": 0.5}, f"use 0 to {DEPTH - 1}"),
        ({"restore_location": 9, "keep_ratio": 0.5}, f"restore_location 9 is past the {DEPTH} layers"),
        ({"keep_ratio": 1.5}, "got 1.5"),
        ({"stages": (3,), "cluster_location": 99, "keep_ratio": 0.5}, r"no stages to choose from.*got stages=\(3,\)"),
        ({"num_clusters": 0}, "at least 1, got 0"),
        ({"keep_ratio": 0.5, "location": 2}, "location.*the fields are cluster_location"),
    ],
)
def test_a_wrong_setting_leaves_the_model_as_it_was(on_before, fields, message):
    model, x = make_model(NAME), images()
    if on_before:
        apply_ailurus(model, cluster_location=1, keep_ratio=0.25)
    before, output = traces(model), predict(model, NAME, x)
    with pytest.raises(AiluRusError, match=message):
        apply_ailurus(model, **fields)
    assert traces(model) == before
    assert torch.equal(predict(model, NAME, x), output)


def test_what_cannot_be_reduced_is_refused_by_name():
    class MyViT(ViTModel):
        pass

    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    for target, message in (
        (resnet, "ResNetModel holds no encoder whose tokens can be reduced. Supported encoders: ViT, DeiT"),
        (MyViT(ViTConfig(**tiny, image_size=8, patch_size=4)), "MyViT is a subclass of ViTModel that nobody declared"),
        (nn.Linear(2, 2), "Linear holds no encoder"),
        ("google/vit-base-patch16-224", "str is no torch module"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            apply_ailurus(target, cluster_location=0, keep_ratio=0.5)


STAGES = {"depths": [1, 1], "num_heads": [1, 1], "embed_dim": 8, "image_size": 32}
FOUR = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "image_size": 32}
HIERA_DET = {"blocks_per_stage": [1] * 4, "embed_dim_per_stage": [8] * 4, "num_attention_heads_per_stage": [1] * 4}
PLAIN = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
NOT_REDUCED = {
    "Swin": lambda: hf.SwinModel(hf.SwinConfig(**STAGES, window_size=4)),
    "Swinv2": lambda: hf.Swinv2Model(hf.Swinv2Config(**STAGES, window_size=4)),
    "Hiera": lambda: hf.HieraModel(
        hf.HieraConfig(
            **{**STAGES, "image_size": [32, 32]}, query_stride=[2, 2], num_query_pool=1, masked_unit_size=[2, 2]
        )
    ),
    "Pvt": lambda: hf.PvtModel(hf.PvtConfig(**FOUR)),
    "PvtV2": lambda: hf.PvtV2Model(hf.PvtV2Config(**FOUR)),
    "Sam2Vision": lambda: hf.Sam2VisionModel(
        hf.Sam2VisionConfig(
            backbone_config=hf.Sam2HieraDetConfig(hidden_size=8, num_attention_heads=1, **HIERA_DET),
            backbone_channel_list=[8] * 4,
        )
    ),
    "InternVLVision": lambda: hf.InternVLVisionModel(hf.InternVLVisionConfig(**PLAIN, image_size=8, patch_size=4)),
}


@pytest.mark.parametrize("name", NOT_REDUCED)
def test_the_reason_of_a_refusal_is_given(name):
    reason = "its layers hand neither a mask nor a bias" if name == "InternVLVision" else "it halves its grid"
    with pytest.raises(UnsupportedModelError, match=f"{name}Model is refused because {reason}"):
        apply_ailurus(NOT_REDUCED[name](), cluster_location=0, keep_ratio=0.5)


def test_a_layer_that_takes_no_mask_is_refused():
    class Blind(nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    model = make_model(NAME)
    model.vit.layers = nn.ModuleList([Blind() for _ in range(DEPTH)])
    with pytest.raises(UnsupportedModelError, match=r"Blind\.forward takes no attention_mask"):
        apply_ailurus(model, keep_ratio=0.5, cluster_location=1)
    model.vit.layers = nn.ModuleList([Blind() for _ in range(DEPTH - 1)])
    with pytest.raises(UnsupportedModelError, match=f"0 lists of {DEPTH} layers"):
        apply_ailurus(model, keep_ratio=0.5, cluster_location=1)


def test_layers_that_do_not_run_as_modules_are_no_silence():
    model = apply_ailurus(make_model("ViTModel"), cluster_location=1, keep_ratio=0.5)

    def forward(pixel_values):
        hidden_states = model.embeddings(pixel_values, interpolate_pos_encoding=True)
        for layer in model.layers:
            hidden_states = layer.forward(hidden_states)
        return model.layernorm(hidden_states)

    model.forward = forward
    with pytest.raises(UnsupportedModelError, match="ViTModel ran without calling its layers as modules"):
        model(images())
    apply_ailurus(model, cluster_location=1, keep_ratio=1.0)
    assert model(images()).isfinite().all()


def test_layers_may_take_their_tokens_by_name():
    model, x = make_model(NAME), images()
    expected = predict(apply_ailurus(model, cluster_location=1, keep_ratio=0.5), NAME, x)
    remove_ailurus(model)
    for layer in model.vit.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: ((), {"hidden_states": args[0]}), with_kwargs=True)
    assert torch.equal(predict(apply_ailurus(model, cluster_location=1, keep_ratio=0.5), NAME, x), expected)


def test_a_mask_of_the_users_is_refused():
    model = apply_ailurus(make_model(NAME), cluster_location=1, keep_ratio=0.5)
    mask = torch.ones(2, GRID[0] * GRID[1] + 1)
    with pytest.raises(AiluRusError, match="attention_mask cannot follow merged tokens"):
        run(model, images(), attention_mask=mask)


def test_nan_raises_only_when_asked():
    model, x = make_model(NAME), images()
    x[0, 0, 0, 0] = float("nan")
    apply_ailurus(model, cluster_location=1, keep_ratio=0.5)
    assert predict(model, NAME, x)[0].isnan().all()
    apply_ailurus(model, cluster_location=1, keep_ratio=0.5, check_finite=True)
    with pytest.raises(AiluRusError, match="tokens are not finite"):
        predict(model, NAME, x)
    assert predict(model, NAME, images()).isfinite().all()


def test_config_and_fields_combine():
    model = make_model(NAME)
    config = AiluRusConfig(cluster_location=1, num_clusters=9, restore="residual")
    apply_ailurus(model, config, keep_ratio=0.5)
    got = ailurus_status(model).config
    assert (got["keep_ratio"], got["num_clusters"], got["restore"]) == (0.5, None, "residual")
    with pytest.raises(AiluRusError, match="config must be an AiluRusConfig, got dict"):
        apply_ailurus(model, {"keep_ratio": 0.5})


def test_on_within_a_block_also_when_it_raises():
    model, x = make_model(NAME), images()
    plain, before = predict(model, NAME, x), traces(model)
    with pytest.raises(RuntimeError), ailurus_enabled(model, cluster_location=1, keep_ratio=0.3) as same:
        assert same is model and not torch.equal(predict(model, NAME, x), plain)
        raise RuntimeError
    assert torch.equal(predict(model, NAME, x), plain) and traces(model) == before
    with ailurus_enabled(model):
        assert not ailurus_status(model).active


@pytest.mark.parametrize("make", [lambda: make_model(NAME), lambda: make_network("UNet")])
def test_a_block_leaves_settings_that_were_saved_and_are_off(make, tmp_path):
    apply_ailurus(make(), keep_ratio=0.25).save_pretrained(tmp_path)
    loaded = type(make()).from_pretrained(tmp_path)
    with ailurus_enabled(loaded, keep_ratio=0.5):
        assert loaded.config["ailurus_config"] if isinstance(loaded.config, dict) else loaded.config.ailurus_config
    assert not ailurus_status(loaded).active
    assert ailurus_status(apply_ailurus(loaded)).config["keep_ratio"] == 0.25


@pytest.mark.parametrize("make", [lambda: make_model(NAME), lambda: make_network("UNet")])
def test_a_block_does_not_switch_off_what_was_on(make):
    model = apply_ailurus(make(), keep_ratio=0.5)
    config = ailurus_status(model).config
    with pytest.raises(AiluRusError, match="remove_ailurus first"), ailurus_enabled(model, keep_ratio=0.25):
        pass
    assert ailurus_status(model).active and ailurus_status(model).config == config


def test_an_encoder_inside_a_model():
    model, x = make_model(NAME), images()
    plain = predict(model, NAME, x)
    apply_ailurus(model.vit, cluster_location=1, keep_ratio=0.25)
    assert not torch.equal(predict(model, NAME, x), plain)
    assert ailurus_status(model).active
    remove_ailurus(model)
    assert torch.equal(predict(model, NAME, x), plain)
    assert not hasattr(model.config, "ailurus_config")


def test_a_model_saved_without_settings_needs_some(tmp_path):
    make_model("ViTModel").save_pretrained(tmp_path)
    with pytest.raises(AiluRusError, match="saved without AiluRus settings"):
        AiluRusModel.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="from_pretrained"):
        AiluRusModel()


def test_status_counts_and_prints():
    model, x = make_model(NAME), images()
    assert str(ailurus_status(model)) == "ViTForImageClassification: AiluRus is off"
    apply_ailurus(model, cluster_location=1, keep_ratio=0.25)
    assert "no forward yet" in str(ailurus_status(model))
    predict(model, NAME, x)
    predict(model, NAME, x)
    status = ailurus_status(model)
    assert "96 → 24" in str(status) and "2 of 2 forwards" in str(status)
    assert status.last_grid == GRID and status.last_clusters.num_clusters == 24
    location = status.to_dict()["locations"][0]
    assert location["num_tokens"] == 96 and 0 < location["flops_saved"] < 1


@pytest.mark.parametrize("num_tokens", [10, 97])
def test_layer_flops_are_those_that_torch_counts(num_tokens):
    config = ViTConfig(hidden_size=32, num_attention_heads=4, intermediate_size=96, attn_implementation="eager")
    layer = ViTLayer(config).eval()
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, num_tokens, 32))
    assert layer_flops(layer, num_tokens) == counter.get_total_flops()


def test_import_needs_neither_transformers_nor_the_compiler():
    code = (
        "import sys, ailurus_hf\n"
        "from ailurus_hf import AiluRusConfig, spatial_density_peaks\n"
        "assert not {'transformers', 'diffusers', 'torch._dynamo'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
