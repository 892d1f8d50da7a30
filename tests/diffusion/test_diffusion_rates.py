"""Other keep ratios in other parts of a generation, and of a network."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusion_models import NETWORKS, SETTINGS, generate, make_network, predict
from diffusion_pipelines import text_to_image
from diffusion_ways import sample

from ailurus_hf import (
    AiluRusDiffusionConfig,
    AiluRusError,
    AiluRusProcessor,
    ailurus_status,
    apply_ailurus,
    remove_ailurus,
)
from ailurus_hf.diffusion import denoising
from ailurus_hf.diffusion.apply import reducers_of
from ailurus_hf.presets import DIFFUSION_PRESETS

# By step


@pytest.mark.parametrize("full_every", [None, 3])
def test_the_keep_ratio_by_step(full_every):
    pipe, seen = text_to_image()[0], []
    apply_ailurus(pipe, **SETTINGS, step_factors=(2, 1, 0.5), refresh_every=3, full_every=full_every)
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    made = generate(pipe, steps=6)
    assert seen == ([48, 48, 24, 24, 12, 12] if full_every is None else [96, 48, 48, 96, 24, 24])
    assert torch.equal(generate(pipe, steps=6), made)
    location = ailurus_status(pipe).locations[0]
    assert (location.num_tokens, location.num_clusters, location.forwards) == (96, seen[-1], 12)


def test_what_the_keep_ratio_by_step_needs():
    for name in ("step_factors", "block_factors"):
        for factors in ((), (1.0, 0)):
            with pytest.raises(AiluRusError, match=f"{name} must be one or more numbers above 0"):
                AiluRusDiffusionConfig(**{name: factors})
    with pytest.raises(AiluRusError, match=r"step_factors=\(2, 1\) needs a pipeline"):
        apply_ailurus(make_network("UNet"), **SETTINGS, step_factors=(2, 1))
    # Levels that are left out stay whole.
    config = AiluRusDiffusionConfig(keep_ratio={2: 0.5}, step_factors=(0.5,), min_tokens=1)
    assert [config.clusters_for(64, level, 0.5) for level in (1, 2)] == [64, 16]


# By level


@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.maps])
def test_the_largest_grid_whatever_its_level(name):
    network = apply_ailurus(make_network(name), **{**SETTINGS, "keep_ratio": {"largest": 0.25}})
    predict(network, name, sample(name))
    largest = max(location.num_tokens for location in ailurus_status(network).locations)
    for location in ailurus_status(network).locations:
        assert location.num_clusters == location.num_tokens // (4 if location.num_tokens == largest else 1)


def test_a_level_goes_before_the_largest():
    config = AiluRusDiffusionConfig(keep_ratio={"largest": 0.5, 1: 0.25, "2": 0.75}, min_tokens=1)
    assert config.keep_ratio == {"largest": 0.5, 1: 0.25, 2: 0.75}
    assert AiluRusDiffusionConfig.from_json(config.to_json()) == config
    assert [config.clusters_for(64, level, largest=True) for level in (1, 2, 4)] == [16, 48, 32]
    assert config.clusters_for(64, 4) == 64
    with pytest.raises(AiluRusError, match=r"keys must be of 1, 2, 4, 8, \.\.\., got \[3\]"):
        AiluRusDiffusionConfig(keep_ratio={"largest": 0.5, 3: 0.5})
    with pytest.raises(AiluRusError, match="whole numbers or one of 'largest'"):
        AiluRusDiffusionConfig(keep_ratio={"smallest": 0.5})


@pytest.mark.parametrize("preset", DIFFUSION_PRESETS)
def test_presets_reduce_the_largest_grid_of_sdxl_as_well(preset):
    for name in ("UNet", "SDXL UNet"):
        every_step = {"inner_every": None, "unreduced_first_steps": 0, "extrapolate": False}
        network = apply_ailurus(make_network(name), AiluRusDiffusionConfig.preset(preset, min_tokens=12, **every_step))
        predict(network, name, sample(name))
        first = ailurus_status(network).locations[0]
        assert first.num_clusters < first.num_tokens


# By stack, or block

on_some_networks = pytest.mark.parametrize("name", ["UNet", "SDXL UNet", "ControlNet", "PixArt", "SD3", "Flux", "Wan"])


def fields_of(name, factors):
    """Transformers on patches have a ratio by block in self-attention alone."""
    return {**SETTINGS, "block_factors": factors, "scope": "blocks" if NETWORKS[name].maps else "attention"}


@pytest.mark.parametrize("fields", [{}, {"projections": "merged"}, {"scope": "attention"}], ids=str)
def test_stacks_of_a_unet_in_the_order_in_which_they_run(fields):
    network, seen = apply_ailurus(make_network("UNet"), **SETTINGS, **fields, block_factors=(2, 1, 0.5)), []
    reducer = reducers_of(network)[0][1]
    for stack in reducer.stacks:
        stack.module.register_forward_hook(
            lambda *_, name=stack.name: seen.append(reducer.records[name].last_clusters_count)
        )
        # Before ours, which merges the map.
        stack.module.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].shape[-2:].numel()), prepend=True
        )
    predict(network, "UNet", sample("UNet"))
    tokens, clusters = seen[::2], seen[1::2]
    assert len(tokens) == len(reducer.stacks) == 7 and tokens != sorted(tokens)
    assert clusters == [n * (2, 1, 0.5)[number * 3 // 7] // 4 for number, n in enumerate(tokens)]


@pytest.mark.parametrize("name, sizes", [("PixArt", (48, 24, 12)), ("SD3", (48, 12)), ("Flux", (48, 48, 24, 12))])
def test_blocks_of_a_transformer(name, sizes):
    factors = (2, 0.5) if name == "SD3" else (2, 1, 0.5)
    network = apply_ailurus(make_network(name), **fields_of(name, factors))
    predict(network, name, sample(name))
    want = {(96, size): sizes.count(size) for size in sizes}
    assert reducers_of(network)[0][1].records[""].sizes == want
    # The mean of what all blocks save.
    alone = []
    for size in sizes:
        fields = {**SETTINGS, "scope": "attention", "keep_ratio": size / 96}
        predict(apply_ailurus(network, **fields), name, sample(name))
        alone.append(ailurus_status(network).locations[0].flops_saved)
    predict(apply_ailurus(network, **fields_of(name, factors)), name, sample(name))
    assert ailurus_status(network).locations[0].flops_saved == pytest.approx(sum(alone) / len(alone))


@on_some_networks
def test_equal_factors_are_none_and_large_ones_leave_all_tokens(name):
    network, x = make_network(name), sample(name)
    plain = predict(network, name, x)
    without = predict(apply_ailurus(network, **fields_of(name, None)), name, x)
    assert torch.equal(predict(apply_ailurus(network, **fields_of(name, (1, 1))), name, x), without)
    other = predict(apply_ailurus(network, **fields_of(name, (0.5, 2))), name, x)
    assert other.isfinite().all() and not torch.equal(other, without)
    all_tokens = predict(apply_ailurus(network, **fields_of(name, (4, 9))), name, x)
    torch.testing.assert_close(all_tokens, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    # One part runs on all tokens, the other does not.
    half = predict(apply_ailurus(network, **fields_of(name, (4, 1))), name, x)
    assert not torch.equal(half, plain) and not torch.equal(half, without)
    assert torch.equal(predict(remove_ailurus(network), name, x), plain)


def test_factors_of_stacks_with_full_steps():
    def steps(network):
        with denoising(network):
            return [predict(network, "UNet", sample("UNet") + 0.05 * n, 9 - n) for n in range(4)]

    network = make_network("UNet")
    plain = [predict(network, "UNet", sample("UNet") + 0.05 * n, 9 - n) for n in range(4)]
    apply_ailurus(network, **SETTINGS, block_factors=(0.5, 1, 2))
    steps_alone = steps(network)
    apply_ailurus(network, **SETTINGS, block_factors=(0.5, 1, 2), full_every=2)
    kept = steps(network)
    for n in range(4):
        off, alone = (kept[n] - plain[n]).norm(), (steps_alone[n] - plain[n]).norm()
        assert off < (1e-5 * plain[n].norm() if n % 2 == 0 else alone)


@pytest.mark.parametrize("name", ["PixArt", "Flux"])
def test_transformers_that_merge_once_refuse_factors_of_blocks(name):
    with pytest.raises(AiluRusError, match=r"block_factors=\(2, 1\).*merges once.*scope='attention'"):
        apply_ailurus(make_network(name), **SETTINGS, block_factors=(2, 1))


# Queries and keys


@torch.no_grad()
def test_fewer_queries_attend_to_fewer_keys():
    torch.manual_seed(0)
    layer, x = Attention(16, heads=2, dim_head=8), torch.randn(2, 64, 16)
    processor = AiluRusProcessor(keep_ratio=0.25, query_ratio=0.5, min_tokens=1)
    keys, queries = processor.source.assigned(layer, x)
    assert (keys.num_clusters, queries.num_clusters) == (16, 32)
    heads = [
        part.unflatten(2, (2, 8)).transpose(1, 2)
        for part in (layer.to_q(queries.merge(x)), layer.to_k(keys.merge(x)), layer.to_v(keys.merge(x)))
    ]
    weights = (heads[0] @ heads[1].mT * 8**-0.5 + keys.log_counts()[:, None, None]).softmax(-1)
    want = queries.unmerge(layer.to_out[0]((weights @ heads[2]).transpose(1, 2).flatten(2)))
    layer.set_processor(processor)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["UNet", "ControlNet", "PixArt", "DiT"])
def test_queries_have_a_ratio_of_their_own(name):
    network, x = make_network(name), sample(name)
    plain = predict(network, name, x)

    def run(**fields):
        out = predict(apply_ailurus(network, **SETTINGS, scope="attention", **fields), name, x)
        return out, ailurus_status(network).locations[0].flops_saved

    fewest, saved = run()
    most, saved_by_keys = run(reduce="kv")
    assert torch.equal(run(query_ratio=0.25)[0], fewest) and torch.equal(run(query_ratio=1.0)[0], most)
    some, saved_by_some = run(query_ratio=0.5)
    assert not torch.equal(some, fewest) and not torch.equal(some, most)
    assert saved_by_keys < saved_by_some < saved
    assert torch.equal(run(query_ratio=0.5)[0], some)
    # In steps on all tokens all ask, too.
    with denoising(apply_ailurus(network, **SETTINGS, scope="attention", query_ratio=0.5, unreduced_first_steps=1)):
        first = predict(network, name, x)
        assert torch.equal(predict(network, name, x, timestep=4), predict(network, name, x, timestep=4))
    torch.testing.assert_close(first, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    assert torch.equal(predict(remove_ailurus(network), name, x), plain)


@pytest.mark.parametrize(
    "fields, numbers",
    [
        ({"query_ratio": 0.5}, "query_ratio=0.5.*got 'blocks' and 'qkv'"),
        ({"query_ratio": 0.5, "scope": "attention", "reduce": "kv"}, "got 'attention' and 'kv'"),
        ({"query_ratio": 1.5, "scope": "attention"}, "query_ratio must be above 0 and at most 1, got 1.5"),
    ],
)
def test_wrong_ratios_of_queries(fields, numbers):
    with pytest.raises(AiluRusError, match=numbers):
        AiluRusDiffusionConfig(**fields)


@pytest.mark.parametrize("name", ["SD3", "Flux", "Wan"])
def test_processors_of_their_own_refuse_a_ratio_of_queries(name):
    with pytest.raises(AiluRusError, match=r"query_ratio=0.5 cannot be: \w+ merges queries as keys"):
        apply_ailurus(make_network(name), **SETTINGS, scope="attention", query_ratio=0.5)
