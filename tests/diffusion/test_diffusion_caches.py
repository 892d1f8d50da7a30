"""Caches that skip parts of a denoising step: diffusers' own, by hooks, and skipping as DeepCache does.

What they keep of blocks on representatives is of other representatives in another step. So it has to be of the same
clusters, of all tokens, or is refused.
"""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks import HookRegistry
from diffusion_models import SETTINGS, generate
from diffusion_pipelines import clusterings, text_to_image
from transformer_pipelines import generate_with_guidance, make_transformer_pipeline

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
    for every in ("full_every", "inner_every"):
        apply_ailurus(pipe, **SETTINGS, **{every: 2})
        with pytest.raises(
            AiluRusError, match=rf"the cache 'pyramid_attention_broadcast' of diffusers.*{every}=2: switch"
        ):
            run(pipe)


# Transformers


def first_block(network, skips):
    apply_first_block_cache(network, FirstBlockCacheConfig(threshold=1e9 if skips else 0.0))


def magnitudes(network, skips):
    config = MagCacheConfig(threshold=9, max_skip_steps=int(skips), num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS)
    apply_mag_cache(network, config)


def taylor(network, skips):
    config = {"cache_interval": 3 if skips else 1, "taylor_factors_dtype": torch.float32}
    apply_taylorseer_cache(network, TaylorSeerCacheConfig(**config, disable_cache_before_step=1))


def pyramid(network, skips):
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=1 + skips,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(network, config)


def faster(network, skips):
    # It keeps two steps before it may skip.
    calls = []
    network.register_forward_pre_hook(lambda *_: calls.append(1))
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500 if skips and (len(calls) - 1) % STEPS > 1 else 2000,
        is_guidance_distilled=True,
        tensor_format="BCHW",
    )
    apply_faster_cache(network, config)


OF_TRANSFORMERS = {
    "first block": first_block,
    "magnitudes": magnitudes,
    "TaylorSeer": taylor,
    "pyramid attention broadcast": pyramid,
    "FasterCache": faster,
}
with_every_cache = pytest.mark.parametrize("cache", OF_TRANSFORMERS.values(), ids=OF_TRANSFORMERS)


@with_every_cache
@pytest.mark.parametrize("name", ["Flux", "Wan"])
@pytest.mark.parametrize("fields", [{}, {"full_every": 2}], ids=str)
def test_whole_blocks_refuse_a_cache_in_words(cache, name, fields):
    if name == "Wan" and cache is taylor:
        pytest.skip("TaylorSeer finds no layer in Wan")
    pipe = apply_ailurus(make_transformer_pipeline(name), **SETTINGS, **fields)
    plain = generate_with_guidance(pipe)
    cache(pipe.transformer, True)
    with pytest.raises(AiluRusError, match=r"the cache '\w+' of diffusers.*(scope='attention'|full_every=2: switch)"):
        generate_with_guidance(pipe)
    # Switched off, they run as before.
    for module in pipe.transformer.modules():
        for hook in list(getattr(getattr(module, "_diffusers_hook", None), "hooks", {})):
            module._diffusers_hook.remove_hook(hook, recurse=False)
    assert torch.equal(generate_with_guidance(pipe), plain)


@with_every_cache
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_attention_alone_goes_with_every_cache(cache, name):
    if name == "Wan" and cache is taylor:
        pytest.skip("TaylorSeer finds no layer in Wan")
    # Some caches do not tell calls with a prompt from those without.
    alone = {"true_cfg_scale": 1.0} if name == "Flux" else {"guidance_scale": 1.0}

    def made(skips=None, **fields):
        pipe = make_transformer_pipeline(name)
        if fields:
            apply_ailurus(pipe, **fields)
        if skips is not None:
            cache(pipe.transformer, skips)
        return pipe

    fields = {**SETTINGS, "scope": "attention"}
    want = generate_with_guidance(made(**fields), **alone)
    torch.testing.assert_close(generate_with_guidance(made(False, **fields), **alone), want, rtol=1e-5, atol=1e-5)
    pipe = made(True, **fields)
    skipped = generate_with_guidance(pipe, **alone)
    assert skipped.isfinite().all() and (skipped - want).abs().max() > 1e-4
    assert torch.equal(generate_with_guidance(pipe, **alone), skipped)
    whole = generate_with_guidance(made(True), **alone)
    assert (skipped - whole).abs().max() > 1e-4
    assert torch.equal(generate_with_guidance(remove_ailurus(pipe), **alone), whole)
