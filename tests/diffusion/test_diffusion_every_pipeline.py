"""A generation with the pipeline of every supported network, in every way: steps, guidance, batches, and back."""

import functools

import pytest
import torch
from diffusion_models import NETWORKS, SETTINGS
from diffusion_ways import far_apart
from every_pipeline import KINDS, generate_any, make_every_pipeline
from traces import traces

from ailurus_hf import AiluRusError, ailurus_status, apply_ailurus, remove_ailurus

# diffusers' Euler scheduler, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WAYS = {
    "blocks": {},
    "attention": {"scope": "attention"},
    "reused": {"refresh_every": 2},
    "full steps": {"full_every": 2},
    "inner layers": {"inner_every": 2, "clustering": "kmeans"},
}
# What they give is added between the blocks of a transformer, where there are all tokens with scope="attention" only.
ADDED_TO_TOKENS = [name for name, network in NETWORKS.items() if network.each]
# DiT's pipeline does not say that it guides by halves; those of Stable Video Diffusion get other latents.
HALVES_APART = ("DiT", "Stable Video Diffusion")
on_every_pipeline = pytest.mark.parametrize("name", KINDS)


@functools.cache
def pipeline_and_plain(name):
    """A pipeline, a plain generation of one picture, and one of it with another: every test undoes what it does."""
    pipe = make_every_pipeline(name)
    return pipe, generate_any(pipe, name), generate_any(pipe, name, batch=2)


def distance(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def networks(pipe):
    parts = (pipe.components.get(part) for part in ("unet", "transformer", "controlnet"))
    return [part for part in parts if part is not None]


def test_every_supported_network_has_a_pipeline():
    assert set(KINDS) == set(NETWORKS)


@pytest.mark.parametrize(
    "name, way",
    [
        (name, way)
        for name in KINDS
        for way in WAYS
        if not (way == "full steps" and name in ADDED_TO_TOKENS)
        and (way != "inner layers" or (NETWORKS[name].maps and name != "ControlNet-XS"))
    ],
)
def test_a_generation_on_and_off(name, way):
    pipe, plain, plain_of_two = pipeline_and_plain(name)
    # A ControlNet alone can run on representatives.
    target = pipe.controlnet if name in ADDED_TO_TOKENS and way != "attention" else pipe
    before = [traces(network) for network in networks(pipe)]
    apply_ailurus(target, **SETTINGS, **WAYS[way])
    # Nothing of another picture is left.
    generate_any(pipe, name, seed=5, steps=2)
    reduced = generate_any(pipe, name)
    of_two = generate_any(pipe, name, batch=2)
    assert torch.equal(generate_any(pipe, name), reduced)
    assert reduced.isfinite().all() and distance(reduced, plain) > 1e-3
    # Rounding grows from step to step, in some plain pipelines to more than that; by how much depends on the CPU.
    tolerance = max(far_apart(name), 4 * distance(plain, plain_of_two[: len(plain)]))
    assert distance(reduced, of_two[: len(plain)]) <= tolerance
    clustered_as_often_as_said(ailurus_status(pipe), way)
    if way != "full steps" and name not in HALVES_APART:
        # One picture with and without its prompt, where both are in one call.
        assignment = ailurus_status(pipe).last_clusters.assignment
        assert len(assignment) == 1 or torch.equal(*assignment.chunk(2))
    remove_ailurus(target)
    assert torch.equal(generate_any(pipe, name), plain)
    assert [traces(network) for network in networks(pipe)] == before


def clustered_as_often_as_said(status, way):
    """In four generations, of 2, 3, 3 and 3 steps."""
    for grid in {(p.where.split(".")[0], p.num_tokens) for p in status.locations}:
        at_grid = [p for p in status.locations if (p.where.split(".")[0], p.num_tokens) == grid]
        # The last step is full.
        assert way == "full steps" or all(p.num_tokens == 4 * p.num_clusters for p in at_grid)
        assert all(
            {"reused": 7, "full steps": 4, "inner layers": 7}.get(way, 11) <= p.clusterings <= 22 for p in at_grid
        )


@on_every_pipeline
@pytest.mark.parametrize("way", ["blocks", "attention"])
def test_identity_where_no_token_has_to_go(name, way):
    pipe, plain, _ = pipeline_and_plain(name)
    apply_ailurus(pipe, **{**SETTINGS, **WAYS[way], "keep_ratio": 1.0})
    assert distance(generate_any(pipe, name), plain) <= 1e-5
    remove_ailurus(pipe)


@pytest.mark.parametrize("name", ADDED_TO_TOKENS)
@pytest.mark.parametrize("way", ["blocks", "full steps"])
def test_what_is_added_between_blocks_is_refused(name, way):
    pipe, *_ = pipeline_and_plain(name)
    apply_ailurus(pipe, **SETTINGS, **WAYS[way])
    with pytest.raises(AiluRusError, match="use scope='attention'"):
        generate_any(pipe, name)
    remove_ailurus(pipe)


@pytest.mark.parametrize("name, fields", [("Lumina 2", {"cfg_trunc_ratio": 0.5}), ("Z-Image", {"cfg_truncation": 0.5})])
def test_guidance_in_some_steps_only(name, fields):
    pipe, run = make_every_pipeline(name), functools.partial(generate_any, name=name, steps=5, **fields)
    plain, calls = run(pipe), []
    alone = run(apply_ailurus(pipe, **SETTINGS))
    apply_ailurus(pipe, **SETTINGS, full_every=2)
    handle = pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(1), prepend=True)
    reduced = run(pipe)
    handle.remove()
    # Lumina 2 guides by a second call, Z-Image by a batch that is twice as large.
    assert 5 < len(calls) < 10 or name == "Z-Image"
    # Nearer than without full steps.
    assert 1e-3 < (reduced - plain).norm() / plain.norm() < 0.8 * (alone - plain).norm() / plain.norm()
    assert torch.equal(run(pipe), reduced)
    assert distance(reduced, run(pipe, batch=2)[:1]) <= 1e-5
    assert torch.equal(run(remove_ailurus(pipe)), plain)
