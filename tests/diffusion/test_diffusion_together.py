"""Together with what else changes a pipeline: adapters, LoRA, image prompts, and the savings of diffusers."""

import logging

import pytest
import torch
from accelerate import cpu_offload
from diffusers import T2IAdapter
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusion_models import LATENTS, SETTINGS, TEXT, generate, text
from diffusion_pipelines import PICTURE, ours, text_to_image

from ailurus_hf import ailurus_status, apply_ailurus, remove_ailurus


def test_adapters_for_text_to_image():
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS)
    torch.manual_seed(0)
    adapter = T2IAdapter(
        in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )
    with torch.no_grad():
        features = adapter(PICTURE)
    x = torch.ones(1, 4, *LATENTS)
    with torch.no_grad():
        out = pipe.unet(x, 5, text(1), down_intrablock_additional_residuals=list(features)).sample
        plain = pipe.unet(x, 5, text(1)).sample
    assert (out - plain).abs().max() > 1e-3
    assert all(p.num_clusters == p.num_tokens // 4 for p in ailurus_status(pipe).locations)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("way", [{}, {"projections": "merged"}, {"scope": "attention"}], ids=str)
def test_lora_loaded_before_or_after(before, way):
    peft = pytest.importorskip("peft")

    def with_adapter(pipe):
        torch.manual_seed(5)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        return pipe

    pipe = text_to_image()[0]
    without = generate(apply_ailurus(text_to_image()[0], **SETTINGS, **way))
    if before:
        apply_ailurus(with_adapter(pipe), **SETTINGS, **way)
    else:
        with_adapter(apply_ailurus(pipe, **SETTINGS, **way))
    got = generate(pipe)
    assert (got - without).abs().max() > 1e-3
    other = apply_ailurus(with_adapter(text_to_image()[0]), **SETTINGS, **way)
    assert torch.equal(got, generate(other))


def ip_adapter(unet):
    """Random weights in the form that load_ip_adapter reads."""
    torch.manual_seed(6)
    projection = {"proj.weight": (4 * TEXT, 12), "proj.bias": (4 * TEXT,), "norm.weight": (TEXT,), "norm.bias": (TEXT,)}
    layers = [name for name in unet.attn_processors if "attn2" in name]
    keys = {}
    for number, name in enumerate(layers):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for part in ("to_k_ip", "to_v_ip"):
            keys[f"{2 * number + 1}.{part}.weight"] = torch.randn(width, TEXT)
    return {"image_proj": {name: torch.randn(shape) for name, shape in projection.items()}, "ip_adapter": keys}


@pytest.mark.parametrize("scope", ["blocks", "attention"])
def test_an_image_prompt_loaded_after_is_noticed(scope, caplog):
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS, scope=scope)
    generate(pipe)
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    inputs = {"ip_adapter_image_embeds": [torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(0))]}
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        reduced = generate(pipe, **inputs)
    # Blocks run on representatives whatever their processors are, and processors rebuilt by their class keep theirs.
    assert not ours(caplog)
    assert all(p.num_clusters == p.num_tokens // 4 for p in ailurus_status(pipe).locations)
    assert torch.equal(generate(apply_ailurus(pipe, **SETTINGS, scope=scope), **inputs), reduced)
    assert (reduced - generate(remove_ailurus(pipe), **inputs)).abs().max() > 1e-3
    assert not any("AiluRus" in type(p).__name__ for p in pipe.unet.attn_processors.values())


def test_processors_replaced_by_others_are_noticed(caplog):
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS, scope="attention")
    reduced = generate(pipe)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        generate(pipe)
        generate(pipe)
    assert "7 of 7 self-attention layers" in caplog.text and "apply_ailurus again" in caplog.text
    assert "AttnProcessor2_0" in caplog.text and len(ours(caplog)) == 1
    assert all(p.restored == "processor lost" for p in ailurus_status(pipe).locations)
    assert torch.equal(generate(apply_ailurus(pipe, **SETTINGS, scope="attention")), reduced)
    assert all(p.restored != "processor lost" for p in ailurus_status(pipe).locations)


OTHER_SAVINGS = {
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(vae=False),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    # As enable_sequential_cpu_offload, which cannot offload from a CPU: it asks for its number.
    "sequential offload": lambda pipe: [cpu_offload(part, torch.device("cpu")) for part in (pipe.unet, pipe.vae)],
    "group offload": lambda pipe: pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
    "VAE slicing": lambda pipe: pipe.vae.enable_slicing(),
}


@pytest.mark.parametrize("saving", OTHER_SAVINGS.values(), ids=OTHER_SAVINGS)
@pytest.mark.parametrize("way", [{}, {"projections": "merged"}], ids=str)
def test_together_with_what_diffusers_saves(saving, way):
    want = generate(apply_ailurus(text_to_image()[0], **SETTINGS, **way))
    for saved_first in (True, False):
        pipe = text_to_image()[0]
        if saved_first:
            saving(pipe)
            apply_ailurus(pipe, **SETTINGS, **way)
        else:
            apply_ailurus(pipe, **SETTINGS, **way)
            saving(pipe)
        torch.testing.assert_close(generate(pipe), want, rtol=1e-3, atol=1e-3)
        assert generate(pipe, output_type="pt").isfinite().all()
        assert all(p.num_clusters == p.num_tokens // 4 for p in ailurus_status(pipe).locations)
