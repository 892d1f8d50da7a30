"""Caches that skip parts of a denoising step: diffusers' pyramid attention broadcast, and skipping as DeepCache does.

diffusers' other caches (`enable_cache`) are for transformers that are none of the networks reduced here.
"""

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.hooks import HookRegistry
from diffusion_models import SETTINGS, generate
from diffusion_pipelines import clusterings, text_to_image

from ailurus_hf import AiluRusError, ailurus_status, apply_ailurus, remove_ailurus

WAYS = [{}, {"projections": "merged"}, {"scope": "attention"}]
STEPS = 4


def broadcast(pipe, every):
    """Attention computed in one of so many steps; a generation has to begin with `fresh`."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.unet, config)


def fresh(pipe):
    for module in pipe.unet.modules():
        if isinstance(registry := getattr(module, "_diffusers_hook", None), HookRegistry):
            registry.reset_stateful_hooks(recurse=False)


def skip_as_deepcache(pipe, every):
    """All but the first and last blocks of the UNet give what they gave before, but in one of so many steps."""
    unet = pipe.unet
    for part in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]):
        calls, kept = [0], []

        def forward(*args, calls=calls, kept=kept, compute=part.forward, **kwargs):
            if calls[0] % every == 0:
                kept[:] = [compute(*args, **kwargs)]
            calls[0] += 1
            return kept[0]

        part.forward = forward


def run(pipe):
    fresh(pipe)
    return generate(pipe, steps=STEPS)


CACHES = {"pyramid attention broadcast": broadcast, "DeepCache": skip_as_deepcache}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("cached_first", [True, False])
def test_reduced_networks_skip_as_whole_ones_do(cache, way, cached_first):
    def made(every, **fields):
        pipe = text_to_image()[0]
        if cached_first:
            cache(pipe, every)
        apply_ailurus(pipe, **SETTINGS, **way, **fields)
        if not cached_first:
            cache(pipe, every)
        return pipe

    # Nothing skipped: nothing changed.
    want = run(apply_ailurus(text_to_image()[0], **SETTINGS, **way))
    torch.testing.assert_close(run(made(1)), want, rtol=1e-5, atol=1e-5)

    # What is kept over steps is of the clusters of its step: these serve as long.
    pipe = made(2, refresh_every=2)
    skipped = run(pipe)
    assert torch.equal(run(pipe), skipped)
    assert skipped.isfinite().all() and (skipped - want).abs().max() > 1e-4
    assert all(location.num_clusters == location.num_tokens // 4 for location in ailurus_status(pipe).locations)
    # Of the full size, which is never skipped as a whole, in every second step; twice.
    assert clusterings(pipe)[0] == STEPS
    whole = text_to_image()[0]
    cache(whole, 2)
    torch.testing.assert_close(run(remove_ailurus(pipe)), run(whole), rtol=0, atol=0)


def test_full_steps_go_with_skipping_as_deepcache_and_refuse_what_is_kept_within_blocks():
    pipe = text_to_image()[0]
    apply_ailurus(pipe, **SETTINGS, full_every=2)
    want = run(pipe)
    skip_as_deepcache(pipe, 1)
    torch.testing.assert_close(run(pipe), want, rtol=1e-5, atol=1e-5)
    pipe = text_to_image()[0]
    skip_as_deepcache(pipe, 2)
    whole = run(pipe)
    apply_ailurus(pipe, **SETTINGS, full_every=2)
    skipped = run(pipe)
    assert torch.equal(run(pipe), skipped) and (skipped - want).abs().max() > 1e-4
    reduced = run(apply_ailurus(pipe, **SETTINGS))
    assert (skipped - whole).norm() < (reduced - whole).norm()
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS, full_every=2)
    broadcast(pipe, 2)
    with pytest.raises(AiluRusError, match=r"full_every and the cache 'pyramid_attention_broadcast' of diffusers"):
        run(pipe)
