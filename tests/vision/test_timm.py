"""timm's plain ViT in transformers' TimmWrapper: reduced as transformers' own are, where timm can be imported."""

import pytest
import torch
import torchvision_ops
from torch import nn

from ailurus_hf import (
    AiluRusError,
    AiluRusModelForImageClassification,
    UnsupportedModelError,
    ailurus_status,
    apply_ailurus,
    remove_ailurus,
)

PLAIN = "vit_tiny_patch16_224"
SIZES = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4, "dynamic_img_size": True}
REDUCED = {"cluster_location": 1, "keep_ratio": 0.25}
GRID = (6, 10)


@pytest.fixture(scope="module", autouse=True)
def timm():
    with torchvision_ops.in_reach() as found, pytest.MonkeyPatch.context() as patch:
        if not found:
            pytest.skip("timm needs torchvision, which is not installed")
        timm = pytest.importorskip("timm")
        # What transformers found when it was imported stands, and torchvision has come since.
        from transformers.models.timm_wrapper import configuration_timm_wrapper, modeling_timm_wrapper
        from transformers.utils import import_utils

        for module in (import_utils, configuration_timm_wrapper, modeling_timm_wrapper):
            patch.setattr(module, "is_timm_available", lambda: True, raising=False)
        patch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: True, ""))
        patch.setattr(modeling_timm_wrapper, "timm", timm, raising=False)
        for name in ("ImageNetInfo", "infer_imagenet_subset"):
            patch.setattr(configuration_timm_wrapper, name, getattr(timm.data, name), raising=False)
        yield timm


def make(kind="TimmWrapperForImageClassification", architecture=PLAIN, **fields):
    from transformers.models.timm_wrapper import configuration_timm_wrapper, modeling_timm_wrapper

    sizes = {**SIZES, **fields} if architecture == PLAIN else fields
    config = configuration_timm_wrapper.TimmWrapperConfig(architecture=architecture, model_args=sizes, num_labels=5)
    torch.manual_seed(0)
    model = getattr(modeling_timm_wrapper, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            if name.endswith("qkv.weight"):
                parameter[: 2 * SIZES["embed_dim"]].mul_(3)
    return model


def images(batch=2, seed=0):
    return torch.randn(batch, 3, GRID[0] * 8, GRID[1] * 8, generator=torch.Generator().manual_seed(seed))


def blocky(batch=2):
    patches = torch.randn(batch, 3, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    tiled = patches.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return tiled.permute(0, 1, 2, 4, 3, 5).reshape(batch, 3, GRID[0] * 8, GRID[1] * 8)


def predict(model, x):
    with torch.no_grad():
        return model(x)[0]


WAYS = {
    "classes": {},
    "features": {"kind": "TimmWrapperModel"},
    "registers": {"reg_tokens": 3},
    "mean of patches": {"class_token": False, "global_pool": "avg", "qk_norm": True},
}
each_way = pytest.mark.parametrize("fields", WAYS.values(), ids=WAYS)
each_setting = pytest.mark.parametrize(
    "setting", [{}, {"restore": "copy"}, {"cluster_location": (0, 2), "keep_ratio": (0.5, 0.25)}]
)


@each_way
@each_setting
def test_on_and_off(fields, setting):
    model, x = make(**fields), images()
    plain = predict(model, x)
    apply_ailurus(model, **{**REDUCED, **setting})
    reduced = predict(model, x)
    assert reduced.shape == plain.shape and (reduced - plain).abs().max() > 1e-2 * plain.abs().max()
    assert ailurus_status(model).locations[-1].num_clusters == 15
    for i in range(2):
        torch.testing.assert_close(predict(model, x[i : i + 1]), reduced[i : i + 1], rtol=1e-4, atol=1e-4)
    remove_ailurus(model)
    assert torch.equal(predict(model, x), plain)
    apply_ailurus(model, cluster_location=1, num_clusters=60)
    assert torch.equal(predict(model, x), plain)


@each_way
@pytest.mark.parametrize("fused", [True, False])
def test_equals_the_plain_model_on_duplicated_tokens(fields, fused):
    model, x = make(**fields), blocky()
    nn.init.zeros_(model.timm_model.pos_embed)
    for layer in model.timm_model.blocks:
        layer.attn.fused_attn = fused
    plain = predict(model, x)
    reduced = predict(apply_ailurus(model, **REDUCED), x)
    torch.testing.assert_close(reduced, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def test_gradients_reach_the_patches():
    model = apply_ailurus(make(), **REDUCED).train()
    model(images()).logits.square().sum().backward()
    assert model.timm_model.patch_embed.proj.weight.grad.abs().max() > 0


def test_saved_and_loaded(tmp_path):
    model, x = apply_ailurus(make(), **REDUCED), images()
    reduced = predict(model, x)
    model.save_pretrained(tmp_path)
    loaded = AiluRusModelForImageClassification.from_pretrained(tmp_path).eval()
    assert ailurus_status(loaded).active
    torch.testing.assert_close(predict(loaded, x), reduced)


def test_timms_own_method_is_reduced_and_its_loops_are_an_error():
    model, x = make(kind="TimmWrapperModel"), images()
    with torch.no_grad():
        plain = model.timm_model.forward_features(x)
        apply_ailurus(model, **REDUCED)
        want = model(x).last_hidden_state
        assert torch.equal(model.timm_model.forward_features(x), want) and not torch.equal(want, plain)
        with pytest.raises(AiluRusError, match="was called outside of a forward of TimmWrapperModel"):
            model.timm_model.forward_intermediates(x)
        assert torch.equal(model(x).last_hidden_state, want)
        remove_ailurus(model)
        assert torch.equal(model.timm_model.forward_features(x), plain)
    assert "forward_features" not in vars(model.timm_model)


def test_compiles():
    model, x = apply_ailurus(make(), **REDUCED), images()
    want = predict(model, x)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(predict(compiled, x), want, rtol=1e-4, atol=1e-4)


def test_what_timm_reads_between_its_layers_is_refused():
    model = apply_ailurus(make(), **REDUCED)
    with pytest.raises(AiluRusError, match="without output_hidden_states"):
        model(images(), output_hidden_states=True)
    model.train().timm_model.set_grad_checkpointing(True)
    with pytest.raises(AiluRusError, match="clusters twice"):
        model(images())


@pytest.mark.parametrize("architecture, named", [("resnet10t", "ResNet"), ("eva02_tiny_patch14_224", "Eva")])
def test_other_models_of_timm_are_refused(architecture, named):
    with pytest.raises(UnsupportedModelError, match=f"VisionTransformer with layers of class Block.*{named}"):
        apply_ailurus(make(architecture=architecture), **REDUCED)
