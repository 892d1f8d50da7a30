"""Whole generations with real diffusers pipelines: steps, guidance, reuse, and what pipelines do to their networks."""

import logging
import threading

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AnimateDiffPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusion_models import (
    LATENTS,
    NETWORKS,
    SETTINGS,
    TEXT,
    generate,
    make_controlnet,
    make_network,
    make_pipeline,
    make_vae,
    scheduler,
    sharpen,
    text,
)
from test_diffusion_behaviors import traces

from ailurus_hf import AiluRusError, UnsupportedModelError, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.diffusion.apply import reducers_of

PICTURE = torch.rand(1, 3, 2 * LATENTS[0], 2 * LATENTS[1], generator=torch.Generator().manual_seed(3))


def text_to_image():
    return make_pipeline(StableDiffusionPipeline), {}


def sdxl():
    return make_pipeline(StableDiffusionXLPipeline, "SDXL UNet"), {}


def image_to_image():
    return make_pipeline(StableDiffusionImg2ImgPipeline), {"image": PICTURE, "strength": 0.6, "size": None}


def inpaint():
    return make_pipeline(StableDiffusionInpaintPipeline), {
        "image": PICTURE,
        "mask_image": (PICTURE[:, :1] > 0.5).float(),
    }


def controlnet():
    torch.manual_seed(0)
    pipe = make_pipeline(StableDiffusionControlNetPipeline, controlnet=sharpen(make_controlnet()))
    return pipe, {"image": PICTURE, "size": None}


PIPELINES = {f.__name__: f for f in (text_to_image, sdxl, image_to_image, inpaint, controlnet)}
on_every_pipeline = pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)


def networks(pipe):
    return [reducer.network for _, reducer in reducers_of(pipe)]


def clusterings(pipe):
    """How often each resolution of the UNet was clustered, largest first."""
    found = {}
    for location in ailurus_status(pipe).locations:
        if location.where.startswith("unet"):
            found[location.num_tokens] = found.get(location.num_tokens, 0) + location.clusterings
    return [found[tokens] for tokens in sorted(found, reverse=True)]


@on_every_pipeline
def test_on_off_and_the_same_image_from_the_same_seed(make):
    pipe, inputs = make()
    plain, before = generate(pipe, **inputs), traces(pipe.unet)
    assert apply_ailurus(pipe, **SETTINGS, refresh_every=2) is pipe
    assert len(networks(pipe)) == 1 + hasattr(pipe, "controlnet")
    reduced = generate(pipe, **inputs)
    assert reduced.isfinite().all() and (reduced - plain).abs().max() > 1e-3
    generate(pipe, **{**inputs, "seed": 1})
    # What the other image left behind is not used.
    assert torch.equal(generate(pipe, **inputs), reduced)
    assert torch.equal(generate(pipe, **inputs), reduced)
    remove_ailurus(pipe)
    assert torch.equal(generate(pipe, **inputs), plain)
    assert traces(pipe.unet) == before and not ailurus_status(pipe).active


@pytest.mark.parametrize("refresh_every, expected", [(1, 6), (2, 3), (4, 2), (100, 1)])
def test_assignments_serve_so_many_steps_and_no_other_generation(refresh_every, expected):
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS, refresh_every=refresh_every)
    for images in (1, 2, 3):
        generate(pipe, steps=6)
        assert clusterings(pipe) == [images * expected] * 2
    # Cut off at the start or in the middle, then another one.
    for last in (0, 2):
        with pytest.raises(RuntimeError, match="enough"):
            generate(pipe, steps=6, callback_on_step_end=stop_at(last))
        before = clusterings(pipe)
        generate(pipe, steps=6)
        assert clusterings(pipe) == [before[0] + expected] * 2


def stop_at(step):
    def callback(pipe, index, timestep, tensors):
        if index == step:
            raise RuntimeError("enough")
        return tensors

    return callback


def test_image_to_image_counts_from_where_it_starts():
    pipe, inputs = image_to_image()
    apply_ailurus(pipe, **SETTINGS, refresh_every=5)
    generate(pipe, steps=10, **{**inputs, "strength": 0.5})
    assert clusterings(pipe) == [1, 1]


@pytest.mark.parametrize("kind", [PNDMScheduler, LCMScheduler])
def test_other_schedulers(kind):
    pipe = text_to_image()[0]
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    apply_ailurus(pipe, **SETTINGS, unreduced_first_steps=1, unreduced_last_steps=1)
    generate(pipe, steps=5)
    total = len(pipe.scheduler.timesteps)
    location = ailurus_status(pipe).locations[0]
    assert location.forwards == total and location.clusterings == total - 2


def test_first_and_last_steps_run_on_all_tokens():
    pipe, seen = text_to_image()[0], []
    apply_ailurus(pipe, **SETTINGS, unreduced_first_steps=2, unreduced_last_steps=1)
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.ff.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for _ in range(2):
        seen.clear()
        generate(pipe, steps=5)
        assert seen == [96, 96, 24, 24, 96]


def test_a_network_alone_tells_a_new_image_by_its_timestep():
    network = apply_ailurus(make_network("UNet"), **SETTINGS, refresh_every=2, unreduced_first_steps=1)
    location = lambda: ailurus_status(network).locations[0]  # noqa: E731
    with torch.no_grad():
        for image in (1, 2):
            for timestep in (900, torch.tensor(700), torch.tensor([500]), 300, 100):
                network(torch.ones(1, 4, *LATENTS), timestep, text(1))
            assert location().forwards == 5 * image
            assert location().clusterings == 2 * image  # the first runs unreduced, then 2 and 2 steps
    assert location().num_clusters == 24


def test_guidance_shares_assignments_where_the_pipeline_says_so():
    # At the first stack both halves still are the same image; at the second resolution the text has had its say.
    def assignment(pipe):
        records = reducers_of(pipe)[0][1].records
        return records["down_blocks.1.attentions.0"].last_clusters.assignment

    for fields, guidance, size, shared in (
        ({}, 7.5, 4, True),
        ({"share_cfg": False}, 7.5, 4, False),
        ({}, 1.0, 2, False),
    ):
        pipe = apply_ailurus(text_to_image()[0], **SETTINGS, **fields)
        generate(pipe, guidance_scale=guidance, batch=2)
        found = assignment(pipe)
        assert len(found) == size and torch.equal(*found.chunk(2)) == shared


def test_control_in_guess_mode_has_no_halves_to_share():
    pipe, inputs = controlnet()
    apply_ailurus(pipe, **SETTINGS)
    generate(pipe, **{**inputs, "guess_mode": True, "batch": 2, "image": PICTURE.repeat(2, 1, 1, 1)})
    reducer = next(r for name, r in reducers_of(pipe) if name == "controlnet")
    clusters = max(reducer.records.values(), key=lambda r: r.last_tokens).last_clusters
    assert len(clusters.assignment) == 2 and not torch.equal(*clusters.assignment)


def test_two_pipelines_and_two_threads_do_not_disturb_each_other():
    one, other = (apply_ailurus(text_to_image()[0], **SETTINGS, refresh_every=3) for _ in range(2))
    shared = StableDiffusionPipeline(**one.components, requires_safety_checker=False)
    shared.scheduler = scheduler()
    shared.set_progress_bar_config(disable=True)
    pipes, sizes = [one, other, shared], [(8, 12), (4, 12), (12, 8)]
    want = [generate(pipe, size=size) for pipe, size in zip(pipes, sizes, strict=True)]
    got, start = [None] * 3, threading.Barrier(3, timeout=60)

    def work(index):
        start.wait()
        got[index] = generate(pipes[index], size=sizes[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


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


def ours(caplog):
    return [record for record in caplog.records if record.name.startswith("ailurus_hf")]


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
    if scope == "blocks":
        # Blocks run on representatives whatever their processors are.
        assert not ours(caplog)
        assert all(p.num_clusters == p.num_tokens // 4 for p in ailurus_status(pipe).locations)
        assert (reduced - generate(remove_ailurus(pipe), **inputs)).abs().max() > 1e-3
    else:
        assert "7 of 7 self-attention layers" in caplog.text and "apply_ailurus again" in caplog.text
        assert len(ours(caplog)) == 1
        assert all(p.restored == "processor lost" for p in ailurus_status(pipe).locations)
        apply_ailurus(pipe, **SETTINGS, scope=scope)
        assert not torch.equal(generate(pipe, **inputs), reduced)
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


def test_animation_leaves_its_motion_modules_alone():
    pipe = AnimateDiffPipeline(
        vae=make_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=make_network("UNetMotionModel"),
        motion_adapter=None,
        scheduler=scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    inputs = {"num_frames": 3, "prompt_embeds": text(1), "negative_prompt_embeds": text(1, 9)}
    inputs |= {"height": 2 * LATENTS[0], "width": 2 * LATENTS[1], "num_inference_steps": 2, "output_type": "latent"}
    run = lambda: pipe(**inputs, generator=torch.Generator().manual_seed(0)).frames  # noqa: E731
    plain = run()
    apply_ailurus(pipe, **SETTINGS)
    assert (run() - plain).abs().max() > 1e-3
    rows = ailurus_status(pipe).locations
    assert rows and not any("motion_modules" in p.where for p in rows)
    clusters = ailurus_status(pipe).last_clusters
    assert torch.equal(clusters.assignment[:3], clusters.assignment[3:])  # the halves are of 3 frames
    assert torch.equal((remove_ailurus(pipe), run())[1], plain)


def test_patch_transformer_pipeline():
    vae, transformer = make_vae(), make_network("PixArt")
    pipe = PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    mask = torch.ones(1, 5)
    inputs = {"prompt": None, "prompt_embeds": text(1), "negative_prompt_embeds": text(1, 9), "negative_prompt": None}
    inputs |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "height": 32, "width": 48}
    inputs |= {"num_inference_steps": 3, "output_type": "latent", "use_resolution_binning": False}
    run = lambda: pipe(**inputs, generator=torch.Generator().manual_seed(0)).images  # noqa: E731
    plain = run()
    apply_ailurus(pipe, **SETTINGS, refresh_every=2)
    assert (run() - plain).abs().max() > 1e-3
    location = ailurus_status(pipe).locations[0]
    assert (location.num_tokens, location.num_clusters, location.forwards, location.clusterings) == (96, 24, 3, 2)


def test_nothing_reduced_is_said(caplog):
    pipe = apply_ailurus(text_to_image()[0], keep_ratio=0.5)
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        generate(pipe)
        generate(pipe)
    assert len(ours(caplog)) == 1 and "largest grid has 96" in caplog.text and "min_tokens=1024" in caplog.text


def test_what_cannot_be_reduced_is_refused_with_the_reason():
    from diffusers import SanaTransformer2DModel, UNet2DConditionModel, UNet2DModel

    with pytest.raises(UnsupportedModelError, match=r"AutoencoderKL.*UNet2DConditionModel"):
        apply_ailurus(make_vae())
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "caption_channels": 16}
    with pytest.raises(UnsupportedModelError, match="linear in the number of tokens"):
        apply_ailurus(SanaTransformer2DModel(**sizes, num_cross_attention_heads=2, cross_attention_head_dim=8))
    with pytest.raises(UnsupportedModelError, match="UNet2DModel"):
        apply_ailurus(
            UNet2DModel(
                block_out_channels=(8, 8),
                norm_num_groups=4,
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
            )
        )
    only_cross = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, attention_head_dim=2, only_cross_attention=True,
        layers_per_block=1, cross_attention_dim=8, mid_block_type=None, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="cross-attention alone"):
        apply_ailurus(only_cross)
    with pytest.raises(UnsupportedModelError, match="str is no torch module"):
        apply_ailurus("stable-diffusion")
    with pytest.raises(AiluRusError, match="must be an AiluRusDiffusionConfig"):
        from ailurus_hf import AiluRusConfig

        apply_ailurus(text_to_image()[0], AiluRusConfig(keep_ratio=0.5))


def test_every_stack_of_the_networks_is_found():
    for name, network in NETWORKS.items():
        model = apply_ailurus(make_network(name), **SETTINGS)
        stacks = [m for m in model.modules() if isinstance(m, Transformer2DModel)]
        assert len(ailurus_status(model).locations) == (len(stacks) if network.maps else 1)
