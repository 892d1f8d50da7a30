"""What is special about SD3 and Flux: joint attention, rotation at centroids, Flux's grid, and what cannot follow."""

import logging

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_processor import JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusion_models import NETWORKS, SETTINGS, latents, make_network, make_sd3, packed, predict, sharpen
from diffusion_ways import duplicated, in_both_scopes, on_both, sample

from ailurus_hf import (
    AiluRusDiffusionConfig,
    AiluRusError,
    UnsupportedModelError,
    ailurus_status,
    apply_ailurus,
    remove_ailurus,
)
from ailurus_hf.clusters import TokenClusters
from ailurus_hf.diffusion import grids
from ailurus_hf.diffusion.apply import install, reducers_of
from benchmarks.harness import model_flops


def flux(network, tokens, ids, **kwargs):
    batch = tokens.shape[0]
    conditions = NETWORKS["Flux"].conditions(batch)
    with torch.no_grad():
        return network(
            tokens, timestep=torch.full((batch,), 0.5), img_ids=ids, **conditions, **kwargs, return_dict=False
        )[0]


@on_both
def test_tokens_keep_what_sets_them_apart_from_their_cluster(name):
    network, seen = make_network(name), []
    network.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    apply_ailurus(network, **SETTINGS)
    network.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    predict(network, name, sample(name))
    clusters, (before, after) = ailurus_status(network).last_clusters, seen
    gained = after - before
    torch.testing.assert_close(clusters.unmerge(clusters.merge(gained)), gained, rtol=1e-4, atol=1e-4)
    assert (clusters.unmerge(clusters.merge(after)) - after).abs().max() > 1e-2


@on_both
@pytest.mark.parametrize("scope", ["blocks", "attention"])
def test_text_tokens_are_not_merged(name, scope):
    network, lengths = make_network(name), []
    apply_ailurus(network, **SETTINGS, scope=scope)
    for block in reducers_of(network)[0][1].stacks[0].blocks:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(
                (kwargs["encoder_hidden_states"].shape[1], kwargs["hidden_states"].shape[1])
            ),
            with_kwargs=True,
        )
    predict(network, name, sample(name))
    # The first block's hooks run in their order, so they all see what was merged.
    assert set(lengths) == {(5, 24 if scope == "blocks" else 96)}


def pairs(features, grid, num_clusters):
    """Clusters of two neighbors in a row; of the second image, in a column."""
    index = torch.arange(features.shape[1]).view(grid)
    rows, columns = index // grid[1], index % grid[1]
    in_rows = rows * (grid[1] // 2) + columns // 2
    in_columns = rows // 2 * grid[1] + columns
    return TokenClusters.from_assignment(torch.stack([in_rows.flatten(), in_columns.flatten()]), num_clusters)


def test_representatives_are_rotated_by_the_centroids_of_their_own_image():
    network = make_network("Flux")
    small = latents((16, 4, 6))
    images = [small[0].repeat_interleave(2, -1), small[1].repeat_interleave(2, -2)]
    grids = [image.shape[-2:] for image in images]
    for turned in (0, 1):
        height, width = grids[turned]
        both = torch.stack([latents((16, height, width), batch=1)[0], latents((16, height, width), batch=1, seed=1)[0]])
        both[turned] = images[turned]
        tokens = both.flatten(2).transpose(1, 2)
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
        install(network, AiluRusDiffusionConfig(keep_ratio=0.5, min_tokens=1, cluster_location=0), pairs)
        reduced = flux(network, tokens, ids)[turned]
        remove_ailurus(network)
        centroids = ids.clone()
        centroids[:, 2 - turned] = centroids[:, 2 - turned] // 2 * 2 + 0.5
        want = flux(network, tokens, centroids)[turned]
        torch.testing.assert_close(reduced, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
        assert (flux(network, tokens, ids)[turned] - want).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize("reduce", ["qkv", "kv"])
def test_attention_merges_what_was_rotated(reduce):
    # Duplicates at one position are rotated alike; at positions of their own they are no duplicates any more.
    network = make_network("Flux")
    tokens, ids = packed(duplicated(latents((4, 4, 6)), 4))
    together = ids.clone()
    together[:, 1:] = ids[:, 1:] // 4
    apply_ailurus(network, keep_ratio=0.25, min_tokens=1, cluster_location=0, scope="attention", reduce=reduce)
    reduced = flux(network, tokens, together, joint_attention_kwargs={"grid": (8, 12)})
    apart = flux(network, tokens, ids)
    remove_ailurus(network)
    want = flux(network, tokens, together)
    torch.testing.assert_close(reduced, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert (apart - flux(network, tokens, ids)).abs().max() > 1e-3


# The grid


def test_ids_are_read_once_for_a_tensor(monkeypatch):
    read, reads = grids.grid_from_ids, []
    monkeypatch.setattr(grids, "grid_from_ids", lambda *args: [reads.append(1), read(*args)][1])
    network = apply_ailurus(make_network("Flux"), **SETTINGS)
    tokens, ids = packed(sample("Flux"))
    for _ in range(3):
        flux(network, tokens, ids)
    assert len(reads) == 1
    assert ailurus_status(network).last_grid == (8, 12)
    turned = packed(latents((4, 24, 16)))[1]
    flux(network, tokens, turned)
    assert ailurus_status(network).last_grid == (12, 8)
    ids.copy_(turned)
    flux(network, tokens, ids)
    assert len(reads) == 3 and ailurus_status(network).last_grid == (12, 8)
    with torch.inference_mode():
        batched = ids.clone()[None]
        for _ in range(2):
            flux(network, tokens, batched)
    assert len(reads) == 4


def test_half_precision_ids_and_ids_of_several_images():
    # Above 256, bf16 knows no odd numbers.
    rows, columns = torch.arange(2.0), torch.arange(300.0)
    assert grids.grid_from_ids(torch.cartesian_prod(torch.zeros(1), rows, columns).bfloat16()) == (2, 300)
    network = apply_ailurus(make_network("Flux"), **SETTINGS)
    tokens, ids = packed(sample("Flux"))
    with pytest.raises(AiluRusError, match=r"192 img_ids.*one image"):
        flux(network, torch.cat([tokens, tokens], 1), torch.cat([ids, ids]))
    with pytest.raises(AiluRusError, match="192 img_ids are given for 96 image tokens"):
        flux(network, tokens, torch.cat([ids, ids + torch.tensor([1.0, 0, 0])]))
    with pytest.raises(AiluRusError, match="96 img_ids"):
        flux(network, tokens, ids[torch.randperm(96, generator=torch.Generator().manual_seed(0))])


@on_both
def test_a_wrong_grid_is_an_error(name):
    network = apply_ailurus(make_network(name), **SETTINGS)
    for grid, numbers in (((8, 11), "8, 1[12]"), ((8,), r"\(H, W\)")):
        with pytest.raises(AiluRusError, match=numbers):
            predict(network, name, sample(name), joint_attention_kwargs={"grid": grid})
    predict(network, name, sample(name), joint_attention_kwargs={"grid": (8, 12)})


@in_both_scopes
def test_flux_compiles_to_one_graph_where_its_grid_is_given(scope):
    network = apply_ailurus(make_network("Flux"), **SETTINGS, scope=scope)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=False)
    for height, width in ((8, 12), (16, 10)):
        given = {"joint_attention_kwargs": {"grid": (height, width)}}
        for seed in (0, 1):
            x = latents((4, 2 * height, 2 * width), seed=seed)
            with torch._dynamo.config.patch(error_on_recompile=seed == 1):
                got = predict(compiled, "Flux", x, **given)
            want = predict(network, "Flux", x)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    with pytest.raises(Exception, match='"grid"'):
        predict(compiled, "Flux", sample("Flux"))


# What cannot follow


def test_processors_that_do_something_else_are_refused_or_noticed(caplog):
    # Without normalized queries and keys, which diffusers' fused processor leaves out.
    torch.manual_seed(0)
    network, x = sharpen(make_sd3(qk_norm=None)), sample("SD3")
    layer = network.transformer_blocks[0].attn
    layer.set_processor(SD3IPAdapterJointAttnProcessor2_0(hidden_size=16, ip_hidden_states_dim=8, head_dim=8))
    with pytest.raises(UnsupportedModelError, match=r"SD3IPAdapterJointAttnProcessor2_0.*no IP-Adapter"):
        apply_ailurus(network, **SETTINGS)
    layer.set_processor(JointAttnProcessor2_0())
    plain = predict(network, "SD3", x)
    apply_ailurus(network, **SETTINGS)
    with caplog.at_level(logging.WARNING, "ailurus_hf"):
        network.fuse_qkv_projections()
        # On all tokens, because nothing would weigh the representatives.
        torch.testing.assert_close(predict(network, "SD3", x), plain, rtol=1e-4, atol=1e-4)
    assert "2 of 2 self-attention layers" in caplog.text
    location = ailurus_status(network).locations[0]
    assert location.restored == "processor lost" and location.num_tokens == location.num_clusters == 96
    apply_ailurus(network, **SETTINGS)
    predict(network, "SD3", x)
    assert ailurus_status(network).locations[0].num_clusters == 24
    remove_ailurus(network)
    assert type(layer.processor).__name__ == "FusedJointAttnProcessor2_0"


@on_both
def test_calls_that_cannot_be_followed_are_refused(name):
    network, x = apply_ailurus(make_network(name), **SETTINGS), sample(name)
    for argument in ("attention_mask", "ip_hidden_states"):
        with pytest.raises(AiluRusError, match=argument):
            predict(network, name, x, joint_attention_kwargs={argument: torch.ones(2, 5)})
    residuals = {"SD3.5": "block_controlnet_hidden_states", "Flux": "controlnet_block_samples"}[name]
    given = {residuals: [torch.ones(2, 96, 16)]}
    with pytest.raises(AiluRusError, match=f"{residuals}.*scope='attention'"):
        predict(network, name, x, **given)
    network.enable_gradient_checkpointing()
    with pytest.raises(AiluRusError, match="gradient checkpointing"):
        network(hidden_states=x, **NETWORKS[name].conditions(2)) if name != "Flux" else network(
            packed(x)[0], img_ids=packed(x)[1], **NETWORKS[name].conditions(2)
        )
    network.disable_gradient_checkpointing()
    without = predict(apply_ailurus(network, **SETTINGS, scope="attention"), name, x)
    assert not torch.equal(predict(network, name, x, **given), without)
    # What runs on all tokens takes everything.
    predict(apply_ailurus(network), name, x, **given)


@on_both
@pytest.mark.parametrize(
    "fields", [{"levels": {2: {"scope": "attention"}}}, {"scope": "attention", "levels": {2: {"reduce": "kv"}}}]
)
def test_other_ways_for_each_level_are_refused(name, fields):
    with pytest.raises(AiluRusError, match=r"one resolution.*\{2: Level"):
        apply_ailurus(make_network(name), **SETTINGS, **fields)


def test_a_cache_of_block_outputs_is_refused():
    network = apply_ailurus(make_network("Flux"), **SETTINGS)
    network.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(AiluRusError, match="disable_cache"):
        predict(network, "Flux", sample("Flux"))
    network.disable_cache()
    predict(network, "Flux", sample("Flux"))


def test_skipped_blocks():
    network, x = make_network("SD3"), sample("SD3")
    plain = predict(network, "SD3", x)
    for skipped in ([0], [1]):
        reduced = predict(apply_ailurus(network, **SETTINGS), "SD3", x, skip_layers=skipped)
        assert reduced.shape == plain.shape and ailurus_status(network).locations[0].num_clusters == 24
        assert not torch.equal(reduced, predict(remove_ailurus(network), "SD3", x, skip_layers=skipped))
    apply_ailurus(network, **SETTINGS)
    all_skipped = predict(network, "SD3", x, skip_layers=[0, 1])
    assert torch.equal(all_skipped, predict(remove_ailurus(network), "SD3", x, skip_layers=[0, 1]))


@on_both
@in_both_scopes
def test_training(name, scope):
    network = apply_ailurus(make_network(name), **SETTINGS, scope=scope).train()
    x, conditions = sample(name), NETWORKS[name].conditions(2)
    if name == "Flux":
        x, conditions["img_ids"] = packed(x)
    network(hidden_states=x, timestep=torch.full((2,), 5.0), **conditions)[0].square().mean().backward()
    for part in ("norm_out.linear", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj"):
        assert network.get_submodule(part).weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["SD3", "SD3.5", "Flux", "Wan"])
def test_flops_are_those_that_torch_counts(name):
    network, counted, known = make_network(name), [], []
    reducer = reducers_of(apply_ailurus(network, **SETTINGS))[0][1]
    blocks = reducer.stacks[0].blocks
    remove_ailurus(network)
    for size in ((8, 12), (16, 24)):
        x = latents((4, 1, *size) if name == "Wan" else (4, *size), batch=1)
        counted.append(model_flops(lambda x=x: predict(network, name, x)))
        tokens = size[0] * size[1] // 4
        known.append(sum(reducer.declared.flops(block, tokens, tokens, tokens, 1, 5) for block in blocks))
    # What is left is constant, but for the maps into and out of 16 channels.
    width = 32 if name == "Wan" else 16
    assert counted[1] - counted[0] == known[1] - known[0] + 72 * 4 * 16 * width
