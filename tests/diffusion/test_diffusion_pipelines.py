"""Whole generations with real diffusers pipelines: steps, guidance, reuse, and what pipelines do to their networks."""

import logging
import threading

import pytest
import torch
from diffusers import AnimateDiffPipeline, LCMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusion_models import LATENTS, NETWORKS, SETTINGS, generate, make_network, make_vae, scheduler, text
from diffusion_pipelines import PICTURE, PIPELINES, clusterings, controlnet, image_to_image, ours, text_to_image
from traces import traces
from transformer_pipelines import generate_with_guidance, make_transformer_pipeline

from ailurus_hf import AiluRusError, UnsupportedModelError, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.diffusion.apply import reducers_of

on_every_pipeline = pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)


def networks(pipe):
    return [reducer.network for _, reducer in reducers_of(pipe)]


@on_every_pipeline
def test_on_off_and_the_same_image_from_the_same_seed(make):
    pipe, inputs = make()
    plain, before = generate(pipe, **inputs), traces(pipe.unet)
    assert apply_ailurus(pipe, **SETTINGS, refresh_every=2) is pipe
    assert len(networks(pipe)) == 1 + hasattr(pipe, "controlnet")
    reduced = generate(pipe, **inputs)
    assert reduced.isfinite().all() and (reduced - plain).abs().max() > 1e-3
    generate(pipe, **{**inputs, "seed": 1})
    # What the other image left is not used.
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
    pipe = make_transformer_pipeline("PixArt")
    run = lambda: generate_with_guidance(pipe, steps=3)  # noqa: E731
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
        layers_per_block=1, cross_attention_dim=8, mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
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
        stacks = [m for m in model.modules() if isinstance(m, (Transformer2DModel, TransformerSpatioTemporalModel))]
        assert len(ailurus_status(model).locations) == (len(stacks) if network.maps else 1)
