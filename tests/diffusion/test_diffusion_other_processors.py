"""Processors of others and ours elsewhere: image prompts rebuild ours, guidance keeps part of the batch."""

import logging

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    LTXVideoTransformer3DModel,
    SanaTransformer2DModel,
    StableDiffusionPAGPipeline,
    StableDiffusionXLPAGPipeline,
    WanTransformer3DModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusion_models import JOINT, SETTINGS, TEXT, generate, latents, make_network, make_pipeline, predict, text
from diffusion_pipelines import ours, text_to_image

from ailurus_hf import (
    AiluRusProcessor,
    UnsupportedModelError,
    ailurus_status,
    apply_ailurus,
    remove_ailurus,
)


def is_ours(processor):
    return any(base.__module__.startswith("ailurus_hf") for base in type(processor).__mro__)


# Rebuilt by their class


def test_a_processor_that_is_rebuilt_by_its_class_keeps_its_settings():
    pipe = text_to_image()[0]
    pipe.unet.set_attn_processor(AiluRusProcessor(0.25, grid=(8, 12), min_tokens=12, reduce="kv"))
    want = generate(pipe)
    pipe.unload_ip_adapter()
    for processor in pipe.unet.attn_processors.values():
        config = processor.config
        assert (config.keep_ratio, config.min_tokens, config.reduce) == (0.25, 12, "kv")
    assert torch.equal(generate(pipe), want)
    # With arguments it is another one.
    assert type(AiluRusProcessor(0.25))(keep_ratio=0.75).config.keep_ratio == 0.75
    assert isinstance(AiluRusProcessor(), AiluRusProcessor) and AiluRusProcessor().config.keep_ratio == 0.5


@pytest.mark.parametrize("scope", ["blocks", "attention"])
def test_nothing_of_ours_is_left_where_processors_were_rebuilt(scope):
    pipe = text_to_image()[0]
    plain = generate(pipe)
    reduced = generate(apply_ailurus(pipe, **SETTINGS, scope=scope))
    pipe.unload_ip_adapter()
    assert torch.equal(generate(pipe), reduced)
    assert torch.equal(generate(remove_ailurus(pipe)), plain)
    assert not any(is_ours(processor) for processor in pipe.unet.attn_processors.values())


def test_an_image_prompt_for_flux_is_noticed(caplog):
    network = apply_ailurus(make_network("Flux"), **SETTINGS)
    x = latents((4, 16, 24))
    shapes = {"proj.weight": (4 * TEXT, 12), "proj.bias": (4 * TEXT,), "norm.weight": (TEXT,), "norm.bias": (TEXT,)}
    width = JOINT["num_attention_heads"] * JOINT["attention_head_dim"]
    keys = {f"{n}.to_{part}_ip.weight": torch.randn(width, TEXT) for n in range(2) for part in "kv"}
    keys |= {f"{n}.to_{part}_ip.bias": torch.randn(width) for n in range(2) for part in "kv"}
    projection = {name: torch.randn(shape) for name, shape in shapes.items()}
    network._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        given = {"ip_adapter_image_embeds": [torch.randn(2, 1, 12)]}
        predict(network, "Flux", x, joint_attention_kwargs=given)
    assert "2 of 4 self-attention layers" in caplog.text and "FluxIPAdapterAttnProcessor" in caplog.text
    location = ailurus_status(network).locations[0]
    assert location.restored == "processor lost" and location.num_clusters == location.num_tokens
    remove_ailurus(network)
    assert isinstance(network, FluxTransformer2DModel)
    assert not any(is_ours(processor) for processor in network.attn_processors.values())


# Guidance that keeps part of the batch


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "kind, network", [(StableDiffusionPAGPipeline, "UNet"), (StableDiffusionXLPAGPipeline, "SDXL UNet")]
)
@pytest.mark.parametrize("way", [{}, {"projections": "merged"}, {"scope": "attention"}], ids=str)
def test_perturbed_attention_runs_on_all_tokens_and_that_is_said(kind, network, way, batch, caplog):
    pipe = make_pipeline(kind, network)
    run = lambda: generate(pipe, steps=2, batch=batch, pag_scale=3.0)  # noqa: E731
    plain, rows = run(), []
    apply_ailurus(pipe, **SETTINGS, **way)
    # While the pipeline runs: it puts the processors back.
    pipe.unet.register_forward_hook(lambda *_: rows.append(ailurus_status(pipe).locations))
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        reduced = run()
    assert (reduced - plain).abs().max() > 1e-3 and reduced.isfinite().all()
    assert len(ours(caplog)) == 1 and "PAGCFGIdentitySelfAttnProcessor2_0" in caplog.text
    for row in rows[-1]:
        if "mid_block" in row.where:
            assert ("left whole" in row.restored and row.num_clusters == row.num_tokens) or way.get("scope")
        else:
            assert row.num_clusters == row.num_tokens // 4
    assert torch.equal((remove_ailurus(pipe), run())[1], plain)


@pytest.mark.parametrize("name", ["UNet", "PixArt"])
def test_processors_of_unknown_kinds_are_left_alone(name, caplog):
    class Other(AttnProcessor2_0):
        pass

    network, x = make_network(name), latents((4, 16, 24) if name == "PixArt" else (4, 8, 12))
    plain = predict(network, name, x)
    block = network.transformer_blocks[0] if name == "PixArt" else network.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.set_processor(Other())
    for scope in ("blocks", "attention"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ailurus_hf"):
            predict(apply_ailurus(network, **SETTINGS, scope=scope), name, x)
        assert "Other" in caplog.text and isinstance(block.attn1.processor, Other)
    torch.testing.assert_close(predict(remove_ailurus(network), name, x), plain)


# Set by hand


def test_a_processor_set_by_hand_says_what_it_did(caplog):
    network, x = make_network("UNet"), latents((4, 8, 8))
    network.set_attn_processor(AiluRusProcessor(0.25, min_tokens=20))
    assert "no forward yet" in str(ailurus_status(network))
    for _ in range(2):
        predict(network, "UNet", x)
    status = ailurus_status(network)
    assert {(row.num_tokens, row.num_clusters) for row in status.locations} == {(64, 16), (16, 16)}
    assert {(row.forwards, row.clusterings) for row in status.locations} == {(2, 2), (2, 0)}
    assert status.last_clusters.num_tokens == 64 and status.last_grid == (8, 8) and not ours(caplog)
    network.set_attn_processor(AiluRusProcessor())
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        predict(network, "UNet", x)
        predict(network, "UNet", x)
    assert len(ours(caplog)) == 1 and "64 tokens runs on all of them, as min_tokens=1024" in caplog.text


def hunyuan():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 16}
    sizes |= {"num_layers": 1, "hidden_size": 16, "cross_attention_dim": 16, "cross_attention_dim_t5": 16}
    network = HunyuanDiT2DModel(**sizes, pooled_projection_dim=16, text_len=5, text_len_t5=5, mlp_ratio=2.0)
    rotary = tuple(
        torch.as_tensor(r).float() for r in get_2d_rotary_pos_embed(8, ((0, 0), (8, 8)), (8, 8), output_type="pt")
    )
    return network, lambda: network(
        latents((4, 16, 16), 1), torch.tensor([5.0]), text(1), text_embedding_mask=torch.ones(1, 5),
        encoder_hidden_states_t5=text(1), text_embedding_mask_t5=torch.ones(1, 5), image_meta_size=torch.ones(1, 6),
        style=torch.zeros(1, dtype=torch.long), image_rotary_emb=rotary,
    )  # fmt: skip


def wan():
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    network = WanTransformer3DModel(**sizes, text_dim=TEXT, freq_dim=8, ffn_dim=32, rope_max_seq_len=64)
    return network, lambda: network(latents((4, 3, 8, 12), 1), torch.tensor([5]), text(1))


def ltx():
    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    network = LTXVideoTransformer3DModel(**sizes, cross_attention_dim=16, caption_channels=TEXT)
    return network, lambda: network(
        torch.randn(1, 12, 4), text(1), torch.tensor([5.0]), torch.ones(1, 5), num_frames=1, height=3, width=4
    )


def cogvideo():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    sizes |= {
        "text_embed_dim": TEXT,
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": 1,
        "max_text_seq_length": 5,
    }
    network = CogVideoXTransformer3DModel(**sizes, time_embed_dim=8)
    return network, lambda: network(latents((1, 4, 8, 12), 1), text(1), torch.tensor([5]))


def sana():
    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
    sizes |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    network = SanaTransformer2DModel(**sizes, caption_channels=TEXT, sample_size=16)
    return network, lambda: network(latents((4, 8, 12), 1), encoder_hidden_states=text(1), timestep=torch.tensor([5]))


@pytest.mark.parametrize("make", [hunyuan, wan, ltx, cogvideo, sana])
def test_a_processor_on_a_network_that_it_does_not_fit_is_refused(make):
    network, run = make()
    with torch.no_grad():
        run()
        network.set_attn_processor(AiluRusProcessor(keep_ratio=1.0))
        with pytest.raises(UnsupportedModelError, match=rf"does not fit {type(network).__name__}: "):
            run()
