"""Pipelines that start from a picture or a video, or look at one: on the grid of what is made, from the step they start
at, with reference images as they are; or refused in words."""

import functools
import importlib
from pathlib import Path

import pytest
import torch
from diffusers.modular_pipelines import FluxAutoBlocks
from diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion import LEDITSCrossAttnProcessor
from diffusion_models import NETWORKS, SETTINGS, latents, make_network, predict
from diffusion_ways import duplicated, far_apart, in_both_scopes, sample
from edit_pipelines import EDITS, VIDEOS, make_edit
from every_pipeline import EULER, KINDS, PICTURE, changed, generate_any, generate_kind, make_every_pipeline
from tiny_network import packed, text
from traces import traces

from ailurus_hf import AiluRusError, UnsupportedModelError, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.diffusion import denoising
from ailurus_hf.diffusion.apply import reducers_of
from benchmarks.harness import model_flops

# diffusers' Euler scheduler, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ALL = {**EDITS, **VIDEOS}
REFUSED = {
    "Flux.2 Klein KV": "Flux2KVAttnProcessor",
    "Qwen Layered": "layers of one picture",
    "Z-Image Omni": "reference images beside one",
    "LTX condition": "video_coords.*LTXConditionPipeline",
    "HunyuanVideo I2V, replaced": "token_replace",
    "SkyReels-V2 diffusion forcing": "enable_diffusion_forcing",
}
# Their ControlNets add to all tokens between blocks.
CONTROLLED = [name for name in ALL if "ControlNet" in name and not NETWORKS[ALL[name].network].maps]
PERTURBED = [name for name in ALL if "PAG" in name]
RUN = [name for name in ALL if name not in (*REFUSED, *PERTURBED)]
# diffusers' pipelines make one picture at a time, or what one is depends on the others of its batch.
ALONE = ("Qwen Edit Plus", "Qwen Edit 2511", "LongCat edit", "AnimateDiff ControlNet", "UNet3D V2V", "Kandinsky 5 I2V")
# Of other grids than those of the tests of their networks.
GRIDS = {"CogVideoX 1.5 I2V": (2, 4, 6), "Kandinsky 5 I2V": (6, 4, 6), "Kandinsky 5 I2I": (1, 4, 6)}
WAYS = {
    "blocks": {"refresh_every": 2},
    "attention": {"scope": "attention"},
    "full steps": {"full_every": 2},
}
# Attention alone and full steps are the same from pipeline to pipeline, but for what is beside the picture: one of each
# network.
OF_EACH_NETWORK = {ALL[name].network: name for name in RUN}.values()
IN_BOTH = [n for n in RUN if n in OF_EACH_NETWORK or any(e in n for e in ("Edit", "Kontext", "5B"))]
NOT_IN = {
    "blocks": CONTROLLED,
    "attention": set(RUN) - set(IN_BOTH) - set(CONTROLLED),
    "full steps": (*CONTROLLED, *(set(RUN) - set(IN_BOTH))),
}
EDITORS = [f"qwenimage.pipeline_qwenimage_{name}" for name in ("edit", "edit_plus", "edit_inpaint", "layered")]


@pytest.fixture(autouse=True)
def small_references(monkeypatch):
    """These pipelines scale every picture to a megapixel."""
    for path in (*EDITORS, "longcat_image.pipeline_longcat_image_edit"):
        module = importlib.import_module(f"diffusers.pipelines.{path}")
        size = (192, 128) if path.endswith(("plus", "layered", "longcat_image_edit")) else (192, 128, None)
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, size=size: size)


def starts_in_the_middle(name):
    return "strength" in ALL[name].inputs(1)


def generate(pipe, name, batch=1, seed=0, steps=None):
    steps = steps or (4 if starts_in_the_middle(name) else 3)
    return generate_kind(pipe, ALL[name], seed=seed, batch=batch, steps=steps)


@functools.cache
def pipeline_and_plain(name):
    """A pipeline, and plain generations of one and of two: every test undoes what it does."""
    pipe = make_edit(name)
    plain = generate(pipe, name)
    return pipe, plain, plain if name in ALONE else generate(pipe, name, batch=2)


def distance(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def networks(pipe):
    parts = (pipe.components.get(part) for part in ("unet", "transformer", "transformer_2", "controlnet"))
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("name, way", [(n, way) for n in RUN for way in WAYS if n not in NOT_IN[way]])
def test_a_generation_on_and_off(name, way, caplog):
    pipe, plain, plain_of_two = pipeline_and_plain(name)
    before = [traces(part) for part in networks(pipe)]
    apply_ailurus(pipe, **SETTINGS, **WAYS[way])
    counts_steps = way != "attention"
    if counts_steps:
        # Nothing of another picture is left.
        generate(pipe, name, seed=5, steps=2)
    reduced = generate(pipe, name)
    status = ailurus_status(pipe)
    assert reduced.isfinite().all() and distance(reduced, plain) > 1e-4
    assert not counts_steps or torch.equal(generate(pipe, name), reduced)
    assert "clusters in every call" not in caplog.text
    if name not in ALONE and counts_steps:
        tolerance = max(far_apart(ALL[name].network), 1e-5, 4 * distance(plain, plain_of_two[: len(plain)]))
        assert distance(reduced, generate(pipe, name, batch=2)[: len(plain)]) <= tolerance
    if way != "full steps":
        grid = GRIDS.get(name, NETWORKS[ALL[name].network].grids[0])
        assert status.last_grid == grid and status.last_clusters.assignment.shape[1] == torch.tensor(grid).prod()
        assert all(p.num_tokens == 4 * p.num_clusters for p in status.locations)
    remove_ailurus(pipe)
    assert torch.equal(generate(pipe, name), plain)
    assert [traces(part) for part in networks(pipe)] == before


@pytest.mark.parametrize("name", RUN)
def test_identity_where_no_token_has_to_go(name):
    pipe, plain, _ = pipeline_and_plain(name)
    apply_ailurus(pipe, **{**SETTINGS, "keep_ratio": 1.0})
    assert distance(generate(pipe, name), plain) <= 1e-5
    remove_ailurus(pipe)


@pytest.mark.parametrize("name", [name for name in RUN if starts_in_the_middle(name)])
def test_steps_are_counted_from_the_start_of_the_schedule(name):
    # It starts at step 2 or 3 of 6: the third step still is on all tokens, and so is the last.
    pipe, *_ = pipeline_and_plain(name)
    apply_ailurus(pipe, **SETTINGS, scope="attention", unreduced_first_steps=3, unreduced_last_steps=1)
    reducer, seen = reducers_of(pipe)[0][1], []
    hook = reducer.network.register_forward_hook(
        lambda *_: seen.append((reducer.clock._generations.get().step, reducer.forwards.current.reduce)), prepend=True
    )
    generate(pipe, name, steps=6)
    hook.remove()
    assert dict(seen) == {step: 3 <= step < 5 for step in range(seen[0][0], 6)} and seen[0][0] in (2, 3)
    remove_ailurus(pipe)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name):
    pipe = make_edit(name)
    with pytest.raises(AiluRusError, match=REFUSED[name]):
        generate(apply_ailurus(pipe, **SETTINGS), name)


@pytest.mark.parametrize("name", CONTROLLED)
@pytest.mark.parametrize("way", ["blocks", "full steps"])
def test_what_is_added_between_blocks_is_refused(name, way):
    pipe, *_ = pipeline_and_plain(name)
    with pytest.raises(AiluRusError, match="use scope='attention'"):
        generate(apply_ailurus(pipe, **SETTINGS, **WAYS[way]), name)
    remove_ailurus(pipe)


@pytest.mark.parametrize("name", PERTURBED)
def test_perturbed_attention_between_blocks_runs_on_all_tokens_and_that_is_said(name, caplog):
    pipe, plain, _ = pipeline_and_plain(name)
    assert torch.equal(generate(apply_ailurus(pipe, **SETTINGS), name), plain)
    assert "PAGCFG" in caplog.text and all(p.num_tokens == p.num_clusters for p in ailurus_status(pipe).locations)
    assert torch.equal(generate(remove_ailurus(pipe), name), plain)


# Reference images beside the one that is made

# Qwen-Image's tokens of reference images may have a timestep of their own, 0.
WITH_REFERENCES = ("Flux", "Flux.2", "LongCat-Image", "Qwen-Image", "Qwen-Image, two timesteps")
on_networks_with_references = pytest.mark.parametrize("name", WITH_REFERENCES)


def network_with_references(name):
    """A network, and its name in NETWORKS."""
    network = make_network("Qwen-Image") if "two" not in name else changed("Qwen-Image", {"zero_cond_t": True})
    return (network, "Qwen-Image") if "Qwen" in name else (make_network(name), name)


def predicted(network, name, x, **kwargs):
    """Of latents, Tensor[B, C, 16, 24], with 24 tokens of a reference image after their 96."""
    conditions = {"timestep": torch.full((len(x),), 5), **NETWORKS[name].conditions(len(x)), **kwargs}
    if name == "Flux":
        x, conditions["img_ids"] = packed(x)
    (tokens,), conditions = NETWORKS[name].call(x, conditions)
    other, places = packed(latents((tokens.shape[2] // 4, 8, 12), batch=len(tokens), seed=3))
    if "img_shapes" in conditions:
        conditions["img_shapes"] = [[*shapes, (1, 4, 6)] for shapes in conditions["img_shapes"]]
    else:
        ids = conditions["img_ids"]
        places = torch.nn.functional.pad(places + torch.tensor([1.0, 0, 0]), (0, ids.shape[1] - 3))
        conditions["img_ids"] = torch.cat([ids, places])
    with torch.no_grad():
        return network(torch.cat([tokens, other], 1), **conditions, return_dict=False)[0][:, :96]


@on_networks_with_references
@in_both_scopes
def test_reference_images_stay_as_they_are(name, scope):
    network, name = network_with_references(name)
    NETWORKS[name].no_positions(network)
    shape, times = NETWORKS[name].small
    doubled = duplicated(latents(shape), times)
    plain, lengths = predicted(network, name, doubled), set()
    apply_ailurus(network, **SETTINGS, scope=scope)
    for block in network.transformer_blocks:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.add(kwargs["hidden_states"].shape[1]), with_kwargs=True
        )
    reduced = predicted(network, name, doubled)
    status = ailurus_status(network)
    assert lengths == {(16 if scope == "blocks" else 64) + 24} and reducers_of(network)[0][1].text_tokens == 5 + 24
    assert status.last_grid == (8, 8) and status.locations[0].num_clusters == 16
    # A token that stands for others weighs as they do; one of the reference image weighs one.
    torch.testing.assert_close(reduced, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@on_networks_with_references
def test_where_tokens_are_is_kept_beside_reference_images(name):
    network, name = network_with_references(name)
    x = sample(name)
    plain = predicted(network, name, x)
    apart = {}
    for kept in (24, 94):
        apply_ailurus(network, **{**SETTINGS, "keep_ratio": kept / 96}, clustering="pairs")
        apart[kept] = (predicted(network, name, x) - plain).abs().median().item()
    # Nearly all tokens stand for themselves.
    assert 0 < apart[94] < 0.1 * apart[24]


@on_networks_with_references
def test_full_steps_keep_what_tokens_add_beside_reference_images(name):
    network, name = network_with_references(name)
    x = sample(name)
    plain = predicted(network, name, x)
    apply_ailurus(network, **SETTINGS, full_every=2)
    with denoising(network):
        full = predicted(network, name, x)
        # Nothing has changed since the full step.
        again = predicted(network, name, x, timestep=torch.full((len(x),), 5 + 1e-6))
    assert distance(full, plain) <= 1e-5 and distance(again, plain) <= 1e-3
    assert distance(predicted(apply_ailurus(network, **SETTINGS), name, x), plain) > 1e-2


@on_networks_with_references
def test_what_is_saved_beside_reference_images_is_counted(name):
    network, name = network_with_references(name)
    x = sample(name)[:1]
    plain = model_flops(lambda: predicted(network, name, x))
    apply_ailurus(network, **SETTINGS)
    saved = plain - model_flops(lambda: predicted(network, name, x))
    location = ailurus_status(network).locations[0]
    assert saved == location.flops - location.reduced_flops > 0


def test_a_given_grid_is_of_all_image_tokens():
    network = apply_ailurus(make_network("Flux"), **SETTINGS)
    with pytest.raises(AiluRusError, match=r"\(8, 12\) has 96 tokens.*120 image tokens.*leave grid out"):
        predicted(network, "Flux", sample("Flux"), joint_attention_kwargs={"grid": (8, 12)})


# What pipelines do to their UNets


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("fields", [{}, {"scope": "attention"}, {"share_cfg": False}], ids=str)
def test_parts_of_a_batch_do_not_get_the_clusters_of_others(size, fields):
    pipe = make_every_pipeline("UNetMotionModel")
    pipe.enable_free_noise_split_inference(temporal_split_size=size)
    apply_ailurus(pipe, **SETTINGS, **fields)
    with pytest.raises(AiluRusError, match=f"with {size if size < 3 else '[34]'} images.*split_inference.*min_tokens"):
        generate_any(pipe, "UNetMotionModel", num_frames=4)
    # Where its grids are left alone, nothing is mixed up.
    apply_ailurus(pipe, **{**SETTINGS, "min_tokens": 97}, **fields)
    generate_any(pipe, "UNetMotionModel", num_frames=4)


@pytest.mark.parametrize("name", ["UNet", "PixArt"])
def test_processors_that_keep_where_tokens_attend_to_see_all_of_them(name, caplog):
    network, x, seen = make_network(name), sample(name), []
    for module in network.modules():
        if hasattr(module, "attn2") and hasattr(module.attn2, "to_q"):
            module.attn2.set_processor(
                LEDITSCrossAttnProcessor(lambda maps, **_: seen.append(maps.shape[1]), "up", False, 1)
            )
    plain = predict(network, name, x)
    sizes = seen.copy()
    for scope in ("blocks", "attention"):
        seen.clear()
        reduced = predict(apply_ailurus(network, **SETTINGS, scope=scope), name, x)
        assert seen == sizes and torch.equal(reduced, plain) == (scope == "blocks")
    assert "LEDITSCrossAttnProcessor" in caplog.text and "scope='attention'" in caplog.text


@pytest.mark.parametrize("name", ["Wan", "SkyReels-V2", "LTX-Video", "Kandinsky 5"])
def test_the_same_in_networks_with_processors_of_their_own(name, caplog):
    network, x = make_network(name), sample(name)
    plain = predict(network, name, x)
    reduced = predict(apply_ailurus(network, **SETTINGS), name, x)
    block = reducers_of(network)[0][1].stacks[0].blocks[1]
    layer = block.cross_attention if name == "Kandinsky 5" else block.attn2
    layer.processor = type("Keeps", (type(layer.processor),), {})()
    for scope in ("blocks", "attention"):
        whole = predict(apply_ailurus(network, **SETTINGS, scope=scope), name, x)
        assert (distance(whole, plain) <= 1e-5) == (scope == "blocks") and distance(reduced, plain) > 1e-3
    assert (
        "its cross-attention is on Keeps" in caplog.text
        and "Keeps" not in ailurus_status(network).locations[0].restored
    )


def test_the_network_of_a_modular_pipeline():
    blocks = FluxAutoBlocks()
    for part in ("text_encoder", "decode"):
        blocks.sub_blocks.pop(part)
    pipe = blocks.init_pipeline()
    pipe.update_components(transformer=make_network("Flux"), scheduler=EULER())
    network, scheduler = pipe.transformer, pipe.scheduler
    inputs = {"prompt_embeds": text(1), "pooled_prompt_embeds": text(1, 9)[:, 0], "num_inference_steps": 4, **PICTURE}
    run = lambda: pipe(**inputs, generator=torch.Generator().manual_seed(0), output="latents")  # noqa: E731
    plain = run()
    with pytest.raises(UnsupportedModelError, match=r"FluxModularPipeline.*give its transformer or unet"):
        apply_ailurus(pipe, **SETTINGS)
    apply_ailurus(network, **SETTINGS, full_every=2)
    with pytest.raises(AiluRusError, match="with denoising"):
        run()
    for way, clusterings in (({"refresh_every": 2}, 2), ({"full_every": 2}, 2)):
        apply_ailurus(network, **SETTINGS, **way)
        with denoising(network, scheduler):
            assert distance(run(), plain) > 1e-3
        assert ailurus_status(network).locations[0].clusterings == clusterings
    assert torch.equal((remove_ailurus(network), run())[1], plain)


def test_the_documents_name_every_pipeline_that_was_run():
    page = (Path(__file__).parents[2] / "docs/supported-models.md").read_text()
    assert [kind.pipeline for kind in (*KINDS.values(), *ALL.values()) if f"`{kind.pipeline}`" not in page] == []
