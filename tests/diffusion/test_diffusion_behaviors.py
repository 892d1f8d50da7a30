"""What has to hold on every supported diffusion network, in every way of reducing it."""

import copy
import math

import pytest
import torch
from diffusion_models import LATENTS, NETWORKS, SETTINGS, latents, make_network, predict
from diffusion_ways import (
    duplicated,
    far_apart,
    in_every_way,
    on_every_network,
    on_every_network_in_every_way,
    sample,
    text_of,
)
from traces import traces

from ailurus_hf import AiluRusDiffusionConfig, AiluRusError, Level, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.clustering import local_kmeans
from ailurus_hf.diffusion.apply import denoising, install, reducers_of
from ailurus_hf.diffusion.forward_state import ForwardState


def rounding(name, tolerance):
    """Kandinsky rounds queries and keys to bf16, whatever it runs in."""
    return 1e-2 if name == "Kandinsky 5" else tolerance


@on_every_network_in_every_way
def test_changes_the_output_and_is_undone_bit_for_bit(name, way):
    network, x = make_network(name), sample(name)
    plain, before = predict(network, name, x), traces(network)
    assert apply_ailurus(network, **SETTINGS, **way) is network
    reduced = predict(network, name, x)
    assert reduced.shape == plain.shape and reduced.isfinite().all()
    assert (reduced - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(predict(network, name, x), reduced)
    remove_ailurus(network)
    assert torch.equal(predict(network, name, x), plain)
    assert traces(network) == before
    assert not ailurus_status(network).active


@on_every_network_in_every_way
def test_identity_where_no_token_has_to_go(name, way):
    network, x = make_network(name), sample(name)
    plain = predict(network, name, x)
    apply_ailurus(network, **{**SETTINGS, **way, "keep_ratio": 1.0})
    torch.testing.assert_close(predict(network, name, x), plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    apply_ailurus(network, **{**SETTINGS, **way, "min_tokens": 10**4})
    torch.testing.assert_close(predict(network, name, x), plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    assert all(p.num_tokens == p.num_clusters and p.clusterings == 0 for p in ailurus_status(network).locations)


@on_every_network_in_every_way
def test_equals_the_plain_network_on_duplicated_tokens(name, way):
    network = make_network(name)
    if len(NETWORKS[name].grids[0]) == 3:
        # The cells of k-means in three dimensions do not lie on the duplicates.
        way = {**way, "clustering": "density_peaks"}
    apply_ailurus(network, **SETTINGS, **way)
    reducer = reducers_of(network)[0][1]
    assert reducer.stacks
    if not NETWORKS[name].maps:
        NETWORKS[name].no_positions(network)
        shape, times = NETWORKS[name].small
        doubled = duplicated(latents(shape), times)
        reduced = predict(network, name, doubled)
        assert [4 * p.num_clusters for p in ailurus_status(network).locations] == [
            p.num_tokens for p in ailurus_status(network).locations
        ]
        plain = predict(remove_ailurus(network), name, doubled)
        torch.testing.assert_close(reduced, plain, rtol=1e-4, atol=rounding(name, 1e-5) * plain.abs().max().item())
        return
    # Convolutions lie between the stacks of a UNet, so each stack gets duplicated pixels of its own.
    reduced = {}

    def run(stack):
        small = latents((stack.norm.num_channels, LATENTS[0] // 2, LATENTS[1] // 2))
        doubled = duplicated(small, 2)
        given = {"image_only_indicator": torch.zeros(1, 2)} if name == "Stable Video Diffusion" else {}
        with torch.no_grad():
            return stack.module(doubled, encoder_hidden_states=text_of(network), return_dict=False, **given)[0]

    for stack in reducer.stacks:
        reducer.forwards.begin(ForwardState(max(LATENTS), True, False, {}))
        reduced[stack.name] = run(stack)
        reducer.forwards.end()
    assert all(p.num_tokens == 4 * p.num_clusters for p in ailurus_status(network).locations)
    remove_ailurus(network)
    for stack in reducer.stacks:
        plain = run(stack)
        torch.testing.assert_close(reduced[stack.name], plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("name", ["UNet", "SDXL UNet", "PixArt"])
def test_tokens_keep_what_sets_them_apart_from_their_cluster(name):
    network, seen = make_network(name), []
    path = {"UNet": "down_blocks.0.attentions.0.", "SDXL UNet": "down_blocks.1.attentions.0.", "PixArt": ""}[name]
    blocks = network.get_submodule(f"{path}transformer_blocks")
    # Hooks that were there before see all tokens.
    blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    apply_ailurus(network, **SETTINGS)
    predict(network, name, sample(name))
    clusters = max((r.last_clusters for r in reducers_of(network)[0][1].records.values()), key=lambda c: c.num_tokens)
    before, after = seen[:2]
    gained = after - before
    torch.testing.assert_close(clusters.unmerge(clusters.merge(gained)), gained, rtol=1e-4, atol=1e-4)
    assert (clusters.unmerge(clusters.merge(after)) - after).abs().max() > 1e-2


def test_pixels_keep_what_sets_them_apart_where_projections_are_merged():
    network, seen = make_network("UNet"), []
    apply_ailurus(network, **SETTINGS, projections="merged")
    stack = reducers_of(network)[0][1].stacks[0].module
    stack.register_forward_pre_hook(lambda module, args: seen.append(args[0]), prepend=True)
    stack.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    predict(network, "UNet", sample("UNet"))
    clusters = ailurus_status(network).last_clusters
    before, after = seen[0].flatten(2).transpose(1, 2), seen[-1].flatten(2).transpose(1, 2)
    gained = after - before
    assert gained.shape[1] == 96
    torch.testing.assert_close(clusters.unmerge(clusters.merge(gained)), gained, rtol=1e-4, atol=1e-4)


@on_every_network
def test_status_says_what_happened(name):
    network = make_network(name)
    apply_ailurus(network, **SETTINGS)
    assert "no forward yet" in str(ailurus_status(network))
    predict(network, name, sample(name))
    status = ailurus_status(network)
    grids = {p.num_tokens for p in status.locations}
    assert grids == {math.prod(grid) for grid in NETWORKS[name].grids}
    assert all(p.num_clusters == p.num_tokens // 4 and 0.3 < p.flops_saved < 1 for p in status.locations)
    assert {p.clusterings for p in status.locations} == {1}
    apply_ailurus(network, **SETTINGS, cluster_per="resolution")
    predict(network, name, sample(name))
    # Once a resolution; all other stacks of it take that assignment.
    assert sum(p.clusterings for p in ailurus_status(network).locations) == len(grids)
    assert status.last_clusters.num_tokens == max(grids)
    assert status.to_dict()["config"]["keep_ratio"] == SETTINGS["keep_ratio"]
    assert name != "UNetMotionModel" or not any("motion" in p.where for p in status.locations)


@on_every_network_in_every_way
def test_on_twice_replaces(name, way):
    network, x = make_network(name), sample(name)
    once = predict(apply_ailurus(network, **SETTINGS, **way), name, x)
    hooks = traces(network)
    apply_ailurus(network, keep_ratio=0.5, min_tokens=12)
    apply_ailurus(network, **SETTINGS, **way)
    assert torch.equal(predict(network, name, x), once)
    assert traces(network) == hooks


@on_every_network_in_every_way
def test_an_image_gives_the_same_alone_and_in_a_batch(name, way):
    network, x = make_network(name), sample(name, batch=3)
    apply_ailurus(network, **SETTINGS, **way)
    together = predict(network, name, x)
    first = predict(network, name, x[:1])[:1]
    if NETWORKS[name].conditions(1).get("class_labels") is None:
        torch.testing.assert_close(first, together[:1], rtol=0, atol=far_apart(name) * together.abs().max().item())


@pytest.mark.parametrize("name", ["UNet", "SDXL UNet", "ControlNet", "PixArt", "SD3", "Flux"])
@in_every_way
@pytest.mark.parametrize("size", [(9, 14), (20, 6), (5, 30)])
def test_odd_and_long_latents(name, way, size):
    if not NETWORKS[name].maps:
        size = (2 * size[0], 2 * size[1])
    network, x = make_network(name), latents((4, *size), batch=1)
    plain = predict(network, name, x)
    reduced = predict(apply_ailurus(network, **SETTINGS, **way), name, x)
    assert reduced.shape == plain.shape and reduced.isfinite().all() and not torch.equal(reduced, plain)


def test_a_ratio_for_each_level():
    network, x = make_network("UNet"), sample("UNet", batch=1)
    apply_ailurus(network, keep_ratio={1: 0.125, 2: 0.5}, min_tokens=1)
    predict(network, "UNet", x)
    assert {(p.num_tokens, p.num_clusters) for p in ailurus_status(network).locations} == {(96, 12), (24, 12)}
    apply_ailurus(network, keep_ratio={2: 0.5}, min_tokens=1)
    predict(network, "UNet", x)
    assert {(p.num_tokens, p.num_clusters) for p in ailurus_status(network).locations} == {(96, 96), (24, 12)}
    # At odd sizes levels are rounded up, and still known.
    apply_ailurus(network, keep_ratio={1: 0.125, 2: 0.5}, min_tokens=1)
    predict(network, "UNet", latents((4, 9, 7), batch=1))
    assert {(p.num_tokens, p.num_clusters) for p in ailurus_status(network).locations} == {(63, 8), (20, 10)}


@pytest.mark.parametrize(("name", "levels"), [("UNet", r"\[1, 2\]"), ("SD3", r"\[2\]"), ("PixArt", r"\[2\]")])
def test_a_ratio_for_levels_that_the_network_does_not_have(name, levels):
    network, x = make_network(name), sample(name, batch=1)
    apply_ailurus(network, keep_ratio={8: 0.5}, levels={16: Level(keep_ratio=0.5)} if name == "UNet" else None)
    with pytest.raises(
        AiluRusError, match=rf"levels \[8(, 16)?\], but {type(network).__name__} has tokens at {levels}"
    ):
        predict(network, name, x)


@pytest.mark.parametrize("name", ["UNet", "ControlNet", "UNetMotionModel"])
def test_queries_are_merged_at_the_levels_that_say_so(name):
    network, x = make_network(name), sample(name)
    plain = predict(network, name, x)

    def reduced(reduce):
        way = (
            {"reduce": reduce} if isinstance(reduce, str) else {"levels": {n: {"reduce": r} for n, r in reduce.items()}}
        )
        out = predict(apply_ailurus(network, **SETTINGS, scope="attention", **way), name, x)
        return out, sum(location.reduced_flops for location in ailurus_status(network).locations)

    (merged, fewest), (keys, most) = reduced("qkv"), reduced("kv")
    mixed, between = reduced({2: "kv"})
    assert fewest < between < most
    assert not torch.allclose(mixed, merged) and not torch.allclose(mixed, keys)
    assert torch.equal(reduced({1: "kv", 2: "kv"})[0], keys)
    assert torch.equal(reduced({16: "kv"})[0], merged)
    assert torch.equal(predict(remove_ailurus(network), name, x), plain)


@pytest.mark.parametrize("name", ["UNet", "SDXL UNet", "ControlNet", "UNetMotionModel"])
@pytest.mark.parametrize("projections", ["all", "merged"])
def test_a_scope_for_each_level(name, projections):
    network, x = make_network(name), sample(name)
    plain, fields = predict(network, name, x), {**SETTINGS, "projections": projections}

    def reduced(**scope):
        return predict(apply_ailurus(network, **fields, **scope), name, x)

    at = lambda *levels: {"levels": {n: Level(scope="attention", reduce="kv") for n in levels}}  # noqa: E731
    everywhere = at(1, 2)
    assert torch.equal(reduced(**everywhere), reduced(scope="attention", reduce="kv"))
    torch.testing.assert_close(reduced(**at(16)), reduced(), rtol=1e-4, atol=1e-5 * plain.abs().max())
    mixed = reduced(**at(2))
    ways = {
        (location.num_tokens, "self-attention" in location.restored) for location in ailurus_status(network).locations
    }
    assert ways == {(math.prod(grid), grid == (4, 6)) for grid in NETWORKS[name].grids}
    assert name == "SDXL UNet" or not torch.allclose(mixed, reduced(**everywhere))
    assert torch.equal(predict(remove_ailurus(network), name, x), plain)


@pytest.mark.parametrize("name", ["PixArt", "SD3.5", "Flux", "Wan"])
@pytest.mark.parametrize("scope", ["blocks", "attention"])
def test_tokens_are_clustered_at_the_output_of_a_block(name, scope):
    network, x, entering, clustered = make_network(name), sample(name), {}, []
    blocks = reducers_of(apply_ailurus(network, **SETTINGS))[0][1].stacks[0].blocks
    remove_ailurus(network)
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda block, args, kwargs, n=number: entering.update({n: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    predict(network, name, x)
    plain, outputs, saved = dict(entering), [], []

    def clustering(features, grid, num_clusters):
        clustered.append(features)
        return local_kmeans(features, grid, num_clusters)

    for location in (0, 1):
        clustered.clear()
        install(
            network, AiluRusDiffusionConfig(**{**SETTINGS, "scope": scope, "cluster_location": location}), clustering
        )
        outputs.append(predict(network, name, x))
        # These hooks were there before ours: a block's sees what the one before it gave.
        for number in range(location + 1):
            assert torch.equal(entering[number], plain[number])
        assert len(clustered) == 1 and (scope == "attention" or torch.equal(clustered[0], plain[location]))
        saved.append(ailurus_status(network).locations[0].flops_saved)
    assert saved[0] > saved[1] > 0 and not torch.allclose(*outputs)
    with pytest.raises(AiluRusError, match=f"below the {len(blocks)} blocks.*got {len(blocks)}"):
        apply_ailurus(network, **{**SETTINGS, "cluster_location": len(blocks)})


def test_each_stack_clusters_its_own_tokens():
    network, x = make_network("UNet"), sample("UNet")
    by_resolution = predict(apply_ailurus(network, **SETTINGS, cluster_per="resolution"), "UNet", x)
    by_stack = predict(apply_ailurus(network, **SETTINGS), "UNet", x)
    assert all(location.clusterings == location.forwards == 1 for location in ailurus_status(network).locations)
    every = [record.last_clusters for record in reducers_of(network)[0][1].records.values()]
    first, *_, last = (clusters for clusters in every if clusters.num_tokens == math.prod(LATENTS))
    assert not torch.equal(first.assignment, last.assignment)
    assert not torch.allclose(by_stack, by_resolution)
    apply_ailurus(network, **SETTINGS, refresh_every=2)
    with torch.no_grad(), denoising(network):
        for timestep in (9, 8, 7):
            network(x, timestep, **NETWORKS["UNet"].conditions(2))
    assert {location.clusterings for location in ailurus_status(network).locations} == {2}


@on_every_network_in_every_way
def test_a_deep_copy_is_reduced_and_on_its_own(name, way):
    network, x = make_network(name), sample(name)
    plain = predict(network, name, x)
    reduced = predict(apply_ailurus(network, **SETTINGS, **way), name, x)
    twin = copy.deepcopy(network)
    remove_ailurus(network)
    assert torch.equal(predict(twin, name, x), reduced)
    assert torch.equal(predict(network, name, x), plain)
    remove_ailurus(twin)
    assert torch.equal(predict(twin, name, x), plain)


@pytest.mark.parametrize(
    "fields, numbers",
    [
        ({"keep_ratio": 0}, "0"),
        ({"keep_ratio": {3: 0.5}}, "3"),
        ({"keep_ratio": {}}, "none"),
        ({"keep_ratio": {1: 1.5}}, "1.5"),
        ({"min_tokens": 0}, "at least 1, got 0"),
        ({"refresh_every": 0}, "at least 1, got 0"),
        ({"unreduced_first_steps": -1}, "-1"),
        ({"scope": "layers"}, "'layers'"),
        ({"levels": {1: {"scope": "attention"}, 2: {"scope": "layers"}}}, "'layers'"),
        ({"levels": {3: Level(scope="attention")}}, "levels's keys.*3"),
        ({"levels": {}}, "levels's keys.*none"),
        ({"scope": {1: "attention"}}, r"levels=\{1: Level\(scope='attention'\)\}"),
        ({"cluster_per": "block"}, "'block'"),
        ({"cluster_location": -1}, "cluster_location must be at least 0, got -1"),
        ({"levels": {1: {"scope": "blocks"}}, "reduce": "kv"}, "scope='attention'"),
        ({"projections": "some"}, "'some'"),
        ({"reduce": "q", "scope": "attention"}, "'q'"),
        ({"reduce": "kv"}, "scope='attention'"),
        ({"levels": {1: Level(reduce="kv")}}, "scope='attention' at level 1"),
        ({"levels": {1: {"reduce": "kv"}, 2: {"reduce": "q"}}, "scope": "attention"}, "'q'"),
        ({"levels": {3: Level(reduce="kv")}, "scope": "attention"}, "levels's keys.*3"),
        ({"levels": {1: {"keep": 0.5}}}, "keep_ratio"),
        ({"levels": {1: {"keep_ratio": 1.5}}}, "1.5"),
        ({"levels": {1: {"keep_ratio": 0.5}}, "keep_ratio": {1: 0.25}}, "0.25 and 0.5"),
        ({"clustering": "k-means"}, "'k-means'"),
        ({"alpha": 2}, r"DensityPeaks\(alpha=2\)"),
        ({"clustering": {"name": "density_peaks", "alpha": 2}}, "2"),
        ({"keep": 0.5}, "keep_ratio"),
    ],
)
def test_wrong_settings_name_the_number_and_leave_the_network_as_it_was(fields, numbers):
    network = make_network("UNet")
    before = traces(network)
    with pytest.raises(AiluRusError, match=numbers):
        apply_ailurus(network, **fields)
    assert traces(network) == before


def test_the_config_survives_json():
    import json

    config = AiluRusDiffusionConfig(
        keep_ratio={1: 0.25, 2: 0.5}, levels={1: Level(scope="attention", reduce="kv")}, refresh_every=3
    )
    fields = json.loads(json.dumps(config.to_dict()))
    assert AiluRusDiffusionConfig(**fields) == AiluRusDiffusionConfig.from_dict(fields) == config


def test_calls_that_cannot_be_followed_are_refused():
    network, x = apply_ailurus(make_network("UNet"), **SETTINGS), sample("UNet")
    with pytest.raises(AiluRusError, match="mask"):
        predict(network, "UNet", x, attention_mask=torch.ones(2, 96))
    with pytest.raises(AiluRusError, match="ip_adapter_masks"):
        predict(network, "UNet", x, cross_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, 8, 12)]})
    apply_ailurus(network, **SETTINGS, share_cfg=True)
    with pytest.raises(AiluRusError, match="3 images"):
        predict(network, "UNet", sample("UNet", batch=3))
    with pytest.raises(AiluRusError, match="unreduced_last_steps=1 needs a pipeline"):
        apply_ailurus(network, unreduced_last_steps=1)


def test_halves_share_one_assignment():
    network, x = apply_ailurus(make_network("UNet"), **SETTINGS, share_cfg=True), sample("UNet", batch=4)
    predict(network, "UNet", x)
    clusters = ailurus_status(network).last_clusters
    assert torch.equal(clusters.assignment[:2], clusters.assignment[2:])
    assert not torch.equal(clusters.assignment[0], clusters.assignment[1])
    apply_ailurus(network, **SETTINGS)
    predict(network, "UNet", x)
    clusters = ailurus_status(network).last_clusters
    assert not torch.equal(clusters.assignment[:2], clusters.assignment[2:])
