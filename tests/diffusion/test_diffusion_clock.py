"""Whose call is it: what belongs to one picture is used for it alone, whoever calls the network, and in which order."""

import copy
import logging

import pytest
import torch
from diffusers import DDIMInverseScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline
from diffusion_models import LATENTS, SETTINGS, generate, latents, make_network, scheduler, text
from diffusion_pipelines import Tiles, ours, text_to_image

from ailurus_hf import AiluRusError, ailurus_status, apply_ailurus
from ailurus_hf.diffusion import denoising

STEPS = (900, torch.tensor(700), torch.tensor([500]), 300, 100)


def first(target):
    return ailurus_status(target).locations[0]


def call(network, timestep, x=None):
    x = torch.ones(1, 4, *LATENTS) if x is None else x
    with torch.no_grad():
        return network(x, timestep, text(len(x))).sample


# A network alone


def test_a_block_says_where_a_picture_begins_and_ends():
    network = apply_ailurus(make_network("UNet"), **SETTINGS, refresh_every=2, unreduced_first_steps=1)
    for image in (1, 2):
        with denoising(network):
            for timestep in STEPS:
                call(network, timestep)
        assert first(network).forwards == 5 * image
        assert first(network).clusterings == 2 * image  # the first runs unreduced, then 2 and 2 steps
    assert first(network).num_clusters == 24


@pytest.mark.parametrize("make", [scheduler, FlowMatchEulerDiscreteScheduler, DDIMInverseScheduler])
def test_a_scheduler_counts_steps_in_a_loop_of_ones_own(make):
    network, steps, seen = make_network("UNet"), make(), []
    steps.set_timesteps(5)
    apply_ailurus(network, **SETTINGS, refresh_every=3)
    with denoising(network, steps):
        for timestep in steps.timesteps:
            call(network, timestep)
            seen.append(first(network).clusterings)
    assert seen == [1, 1, 1, 2, 2]


def test_without_one_clusters_are_of_each_call_and_that_is_said_once(caplog):
    network = apply_ailurus(make_network("UNet"), **SETTINGS, refresh_every=4)
    want = [
        call(apply_ailurus(make_network("UNet"), **SETTINGS), 1, latents((4, *LATENTS), 1, seed)) for seed in (0, 1)
    ]
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        # Pictures of one step each, tiles, an interrupted picture and the next one: all look like this.
        for _ in range(2):
            for seed in (0, 1):
                assert torch.equal(call(network, 1, latents((4, *LATENTS), 1, seed)), want[seed])
    assert (
        len(ours(caplog)) == 1 and "denoising(network, scheduler)" in caplog.text and "refresh_every=4" in caplog.text
    )


@pytest.mark.parametrize("timesteps", [(751, 501, 251, 1), (1, 251, 501, 751)], ids=["falling", "rising"])
def test_the_first_steps_of_a_picture_are_told_by_its_timesteps(timesteps):
    network, seen = apply_ailurus(make_network("UNet"), **SETTINGS, unreduced_first_steps=1), []
    for timestep in (*timesteps, *timesteps):
        call(network, timestep)
        seen.append(first(network).num_clusters)
    assert seen == [96, 24, 24, 24] * 2


def test_the_last_steps_need_to_be_known():
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS, unreduced_last_steps=1)
    with pytest.raises(AiluRusError, match=r"unreduced_last_steps=1.*denoising"):
        call(pipe.unet, 5)
    seen = []
    pipe.scheduler.set_timesteps(3)
    with denoising(pipe, pipe.scheduler):
        for timestep in pipe.scheduler.timesteps:
            call(pipe.unet, timestep)
            seen.append(first(pipe).num_clusters)
    assert seen == [24, 24, 96]


def test_a_block_needs_something_that_is_on():
    with pytest.raises(AiluRusError, match="not on in UNet2DConditionModel"), denoising(make_network("UNet")):
        pass


# Other pipelines, loops and copies


def two_pictures(run):
    """How far a picture alone is from the same one beside another, relative to what it is."""
    both = latents((4, *LATENTS))
    together, alone = run(both), run(both[:1])
    return ((together[:1] - alone).abs().max() / alone.abs().max()).item()


def test_halves_are_shared_where_the_pipeline_that_calls_has_them():
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS)
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    generate(pipe, guidance_scale=7.5)
    plain_run = lambda x: generate(other, batch=len(x), latents=x.clone(), guidance_scale=1.0)  # noqa: E731
    assert two_pictures(plain_run) < 1e-4
    # With guidance it has them, and gives what the first gives.
    assert torch.equal(generate(other), generate(pipe))
    # A loop of one's own with the pipeline's scheduler, outside and inside of it.
    timestep = pipe.scheduler.timesteps[0]
    assert two_pictures(lambda x: call(pipe.unet, timestep, x)) < 1e-4
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append(two_pictures(lambda x: call(pipe.unet, timestep, x)))
        return tensors

    generate(pipe, callback_on_step_end=callback)
    assert len(seen) == 4 and max(seen) < 1e-4


def test_halves_are_not_shared_where_they_are_not_of_the_same_latents():
    class Interleaved(StableDiffusionPipeline):
        """Has the halves of each picture beside one another, as MultiDiffusion has them for its tiles."""

        def __call__(self, x):
            self._guidance_scale = 7.5
            self.scheduler.set_timesteps(1)
            prompts = torch.cat([text(1, 9), text(1)]).repeat(len(x), 1, 1)
            with torch.no_grad():
                return self.unet(x.repeat_interleave(2, 0), self.scheduler.timesteps[0], prompts).sample

    pipe = apply_ailurus(text_to_image()[0], **SETTINGS)
    tiles, x = Interleaved(**pipe.components, requires_safety_checker=False), latents((4, *LATENTS))
    got = tiles(x)
    apply_ailurus(pipe, **SETTINGS, share_cfg=False)
    assert torch.equal(tiles(x), got)


def test_copies_and_schedulers_of_a_request_make_the_same_pictures():
    for fields in ({}, {"refresh_every": 2}, {"unreduced_last_steps": 1}):
        pipe = apply_ailurus(text_to_image()[0], **SETTINGS, **fields)
        want = generate(pipe, batch=2)
        assert torch.equal(generate(copy.deepcopy(pipe), batch=2), want)
        request = copy.copy(pipe)
        request.scheduler = copy.deepcopy(pipe.scheduler)
        assert torch.equal(generate(request, batch=2), want)
        assert torch.equal(generate(pipe, batch=2), want)


def test_tiles_of_a_step_have_clusters_of_their_own(caplog):
    parts = latents((4, *LATENTS)).split(1)
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS)
    want = Tiles(**pipe.components, requires_safety_checker=False)(parts)
    apply_ailurus(pipe, **SETTINGS, refresh_every=2)
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        got = Tiles(**pipe.components, requires_safety_checker=False)(parts)
    assert all(torch.equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))
    assert len(ours(caplog)) == 1 and "several times a step" in caplog.text
