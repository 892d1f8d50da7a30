"""Whole generations of SD3 and Flux: same seed, same image; reuse over steps, guidance, attention backends."""

import pytest
import torch
from diffusion_models import NETWORKS, SETTINGS, latents, make_network, packed, predict, text
from diffusion_ways import in_both_scopes, on_both, sample
from transformer_pipelines import generate_with_guidance as generate
from transformer_pipelines import make_transformer_pipeline as make_pipeline

from ailurus_hf import ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.diffusion import backend, denoising
from ailurus_hf.diffusion.apply import reducers_of


@on_both
@in_both_scopes
def test_a_pipeline_on_off_and_the_same_image_from_the_same_seed(name, scope):
    pipe = make_pipeline(name)
    plain = generate(pipe)
    apply_ailurus(pipe, **SETTINGS, scope=scope, refresh_every=2)
    reduced = generate(pipe)
    assert reduced.isfinite().all() and (reduced - plain).abs().max() > 1e-3
    generate(pipe, seed=1)
    assert torch.equal(generate(pipe), reduced)
    assert torch.equal(generate(remove_ailurus(pipe)), plain)


@on_both
@pytest.mark.parametrize("refresh_every, expected", [(1, 6), (2, 3), (4, 2), (100, 1)])
def test_assignments_serve_so_many_steps_and_no_other_generation(name, refresh_every, expected):
    # Flux guides by two calls a step: without reuse over steps, each clusters for itself.
    calls = 2 if name == "Flux" and refresh_every == 1 else 1
    pipe = apply_ailurus(make_pipeline(name), **SETTINGS, refresh_every=refresh_every)
    for images in (1, 2):
        generate(pipe, steps=6, seed=images)
        location = ailurus_status(pipe).locations[0]
        assert location.clusterings == images * expected * calls
        assert location.forwards == images * 6 * (2 if name == "Flux" else 1)


@on_both
def test_first_and_last_steps_on_all_tokens(name):
    pipe, seen = make_pipeline(name), []
    apply_ailurus(pipe, **SETTINGS, unreduced_first_steps=1, unreduced_last_steps=2)
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    generate(pipe, steps=5)
    assert seen[:: 2 if name == "Flux" else 1] == [96, 24, 24, 96, 96]


def test_another_caller_of_the_same_flux_has_its_own_steps():
    # Cut off in the middle, so that its scheduler still stands at a step.
    pipe = apply_ailurus(make_pipeline("Flux"), **SETTINGS, refresh_every=2)

    def stop(pipe, index, timestep, tensors):
        if index == 1:
            raise RuntimeError("enough")
        return {}

    with pytest.raises(RuntimeError, match="enough"):
        generate(pipe, callback_on_step_end=stop)
    before = ailurus_status(pipe).locations[0].clusterings
    tokens, ids = packed(latents((4, 16, 24), batch=1))

    def loop():
        for timestep in (0.9, 0.6, 0.3, 0.1):
            with torch.no_grad():
                pipe.transformer(
                    tokens, timestep=torch.tensor([timestep]), img_ids=ids, **NETWORKS["Flux"].conditions(1)
                )

    with denoising(pipe):
        loop()
    assert ailurus_status(pipe).locations[0].clusterings - before == 2
    loop()
    assert ailurus_status(pipe).locations[0].clusterings - before == 2 + 4


def test_halves_share_one_assignment_and_guidance_by_skipped_layers_has_none():
    pipe, shared = apply_ailurus(make_pipeline("SD3"), **SETTINGS), []
    reducer = reducers_of(pipe)[0][1]
    pipe.transformer.register_forward_hook(
        lambda *_: shared.append(
            [reducer.forwards.current.share_cfg, len(reducer.records[""].last_clusters.assignment)]
        ),
        prepend=True,
    )
    inputs = {name: torch.cat([text(1), text(1, 5)]) for name in ("prompt_embeds", "negative_prompt_embeds")}
    inputs |= {f"{part}pooled_prompt_embeds": text(2)[:, 0] for part in ("", "negative_")}
    generate(
        pipe, steps=2, **inputs, skip_guidance_layers=[1], skip_layer_guidance_start=0.1, skip_layer_guidance_stop=1
    )
    assert shared == [[True, 4], [True, 4], [False, 2]]


@on_both
def test_the_chosen_backend_is_used(name, monkeypatch):
    network, used = apply_ailurus(make_network(name), **SETTINGS), []
    want = predict(network, name, sample(name))
    dispatch = backend.dispatch_attention_fn
    monkeypatch.setattr(
        backend, "dispatch_attention_fn", lambda *a, **k: [used.append(k["backend"].value), dispatch(*a, **k)][1]
    )
    network.transformer_blocks[0].attn.processor._attention_backend = backend.AttentionBackendName("_native_math")
    got = predict(network, name, sample(name))
    assert set(used) == {"_native_math"}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
