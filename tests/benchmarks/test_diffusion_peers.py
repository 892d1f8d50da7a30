"""ToMA, SiTo, ClusCa and caches over steps: their steps against cases worked by hand, a new generation, and undoing."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusion_models import UNET, UP, latents, make_sd3, predict, sharpen
from torch import nn
from traces import traces
from transformer_pipelines import generate_with_guidance, make_transformer_pipeline

from ailurus_hf import AiluRusError
from ailurus_hf.hooks import Hooks
from benchmarks.methods.diffusion import METHODS_OF_TRANSFORMERS, OURS_OF_TRANSFORMERS, needs_pipeline, switch_on
from benchmarks.methods.diffusion_peers import PEERS, peers_of
from benchmarks.peers import clusca, sito, step_cache, toma
from benchmarks.peers.steps import Steps, replace_forward

TOKENS = 64


def at_angles(*degrees):
    radians = torch.tensor(degrees, dtype=torch.float32) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], -1)[None]


def make(name):
    torch.manual_seed(0)
    if name == "UNet":
        return sharpen(UNet2DConditionModel(**UNET, **UP, attention_head_dim=2))
    return sharpen(make_sd3(num_layers=6))


def sample(name):
    return latents((4, 8, 8) if name == "UNet" else (4, 16, 16))


def generate(network, name, steps=5):
    """What the network gives in each step, on latents that change a little, as they do late in a generation."""
    start, change = sample(name), latents(sample(name).shape[1:], seed=1)
    return [predict(network, name, start + 0.01 * step * change, 500 - step) for step in range(steps)]


def seen_by(module):
    """The number of tokens, or rows, that a module gets in each of its calls from now on."""
    sizes = []
    module.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[1]))
    return sizes


def test_a_timestep_that_does_not_fall_begins_a_generation():
    class Network(nn.Module):
        def forward(self, sample, timestep):
            return sample

    network, hooks, began = Network(), Hooks(), []
    steps = Steps(network, hooks, lambda: began.append(True))

    def step(timestep, size=2):
        network(torch.zeros(1, size), timestep=torch.tensor([timestep]))
        return steps.number, len(began)

    assert [step(t) for t in (9, 5, 1)] == [(0, 1), (1, 1), (2, 1)]
    assert [step(t) for t in (9, 5, 5)] == [(0, 2), (1, 2), (0, 3)]
    assert [step(4), step(3, size=4)] == [(1, 3), (0, 4)]
    hooks.remove()
    assert step(2) == (0, 4)


def test_a_forward_is_replaced_however_it_is_called():
    linear, hooks = nn.Linear(2, 2), Hooks()
    replace_forward(hooks, linear, lambda original, x: original(x) + 1)
    x = torch.ones(1, 2)
    plain = nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(linear(x), plain + 1) and torch.equal(linear(input=x), plain + 1)
    hooks.remove()
    assert torch.equal(linear(x), plain) and "forward" not in vars(linear)


def test_toma_takes_what_covers_most():
    # 20 degrees is most alike to all; then 90, which gains 0.66 of its own where 0 would gain 0.06.
    tokens = at_angles(0, 10, 20, 90)
    assert toma.facility_location(tokens, 2).tolist() == [[2, 3]]
    weights = toma.weights_to(tokens, torch.tensor([[2, 3]]), scale=2.0)
    torch.testing.assert_close(weights.sum(1), torch.ones(1, 4))
    e = math.exp(2 * math.cos(math.pi / 9))
    assert weights[0, :, 0].tolist() == pytest.approx([e / (e + 1), 1 / (e + 1)])


def test_toma_merges_and_unmerges_in_tiles():
    grid = torch.arange(16.0)[None, :, None]
    assert toma.tiled(grid, 2)[:, :, 0].tolist()[:2] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert torch.equal(toma.untiled(toma.tiled(grid.expand(2, -1, 3), 2), 2), grid.expand(2, -1, 3))
    # In each tile the first two tokens belong to one destination, the third to two by halves, the fourth to the other.
    belongs = torch.tensor([[1.0, 1, 0.5, 0], [0, 0, 0.5, 1]]).expand(4, -1, -1)
    pattern = toma.Pattern(torch.zeros(4, 2), belongs, 0, 0)
    merged = pattern.merge(grid, 2)
    assert merged[0, :2, 0].tolist() == pytest.approx([(0 + 1 + 0.5 * 4) / 2.5, (0.5 * 4 + 5) / 1.5])
    back = toma.tiled(pattern.unmerge(merged), 2)[0, :, 0].tolist()
    first, second = merged[0, :2, 0].tolist()
    assert back == pytest.approx([first, first, (first + second) / 2, second])


def test_toma_uses_a_pattern_over_blocks_and_steps(monkeypatch):
    network, found, weighed = make("SD3"), [], []
    locate, weigh = toma.facility_location, toma.weights_to
    monkeypatch.setattr(toma, "facility_location", lambda *args: found.append(1) or locate(*args))
    monkeypatch.setattr(toma, "weights_to", lambda *args: weighed.append(1) or weigh(*args))
    attended = seen_by(network.transformer_blocks[3].attn.to_q)
    on = toma.ToMA(network, 0.25, [TOKENS], destinations_every=4, weights_every=2)
    generate(network, "SD3", steps=5)
    # Destinations in steps 0 and 4, weights in 2 as well, in the first of six blocks alone.
    assert len(found) == 2 and len(weighed) == 3 and attended == [TOKENS // 4] * 5
    on.hooks.remove()


def test_sito_leaves_out_what_is_most_like_a_base_token():
    scores = torch.tensor([[1.0, 2, 0, 0], [3, 0, 0, 5], [1, 1, 7, 0], [0, 2, 8, 0]]).view(1, 16)
    assert sito.base_tokens(scores).tolist() == [[4, 7, 13, 14]]

    def leaves(angles, base, count):
        tokens = at_angles(*angles)
        left, source = sito.pruned(tokens @ tokens.transpose(1, 2), torch.tensor([base]), count)
        return left.tolist()[0], source.tolist()[0]

    assert leaves((0, 5, 90, 100), [0, 2], 1) == ([0, 2, 3], [0, 0, 1, 2])
    assert leaves((0, 5, 90, 100), [0, 2], 2) == ([0, 2], [0, 0, 1, 1])
    # 30 goes, 30 degrees from a base token; of what is left 40, which is no base token, is most like it.
    assert leaves((0, 30, 90, 40), [0, 2], 1) == ([0, 2, 3], [0, 2, 1, 2])


def test_sito_prunes_self_attention_alone():
    network = make("UNet")
    block = network.down_blocks[0].attentions[0].transformer_blocks[0]
    attended, crossed = seen_by(block.attn1.to_q), seen_by(block.attn2.to_q)
    on = sito.SiTo(network, 0.7, [TOKENS])
    predict(network, "UNet", sample("UNet"))
    assert attended == [TOKENS - int(0.7 * TOKENS)] and crossed == [TOKENS]
    on.hooks.remove()


def test_clusca_clusters_by_l1():
    tokens = torch.tensor([[[0.0, 0], [1, 1], [8, 8], [9, 9]]])
    labels, means = clusca.k_means(tokens, torch.tensor([[[0.0, 0], [8, 8]]]))
    assert labels.tolist() == [[0, 0, 1, 1]] and means.tolist() == [[[0.5, 0.5], [8.5, 8.5]]]
    # (3, 3) is nearer to 0 than (5, 0) by L2, and farther by L1.
    assert clusca.k_means(torch.zeros(1, 1, 2), torch.tensor([[[3.0, 3], [5, 0]]]), 1)[0].tolist() == [[1]]
    # An empty cluster stays.
    assert clusca.k_means(tokens, torch.tensor([[[0.0, 0], [99, 99]]]))[1][0, 1].tolist() == [99, 99]


def test_clusca_draws_a_token_of_each_cluster():
    labels = torch.tensor([[0, 1, 1, 0, 1, 3]])
    seen = {tuple(clusca.drawn(labels, 4, torch.Generator().manual_seed(n))[0].tolist()) for n in range(40)}
    assert {first for first, *_ in seen} == {0, 3} and {second for _, second, *_ in seen} == {1, 2, 4}
    assert {last for *_, last in seen} == {5}


def test_clusca_propagates_and_forecasts():
    column = lambda *values: torch.tensor(values)[None, :, None]  # noqa: E731
    labels, index = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 3]])
    # The drawn ones are 2 and 8; the others move half of the way to the drawn one of their cluster.
    moved = clusca.propagated(column(0.0, 0, 4, 4), labels, index, column(2.0, 8), 0.5)
    assert moved.flatten().tolist() == [2, 1, 6, 8]
    first = clusca.Kept(torch.tensor(1.0), 0, None, differs=False)
    second = clusca.Kept(torch.tensor(3.0), 2, first, differs=True)
    assert first.forecast(5) == 1 and second.forecast(2) == 3 and second.forecast(5) == 6


def test_clusca_computes_a_token_a_cluster_between_full_steps():
    network = make("SD3")
    block = network.transformer_blocks[2]
    through, attended, text = seen_by(block.ff.net[0].proj), seen_by(block.attn.to_q), seen_by(block.ff_context.net[0])
    on = clusca.ClusCa(network, 3, clusters=7)
    generate(network, "SD3", steps=9)
    assert [size == TOKENS for size in through] == [True, True, True, False, False, True, False, False, True]
    assert set(through) == {TOKENS, 7} and len(attended) == len(text) == 5
    on.hooks.remove()


@pytest.mark.parametrize("name", ["UNet", "SD3"])
def test_full_in_every_step_is_the_plain_network(name):
    network = make(name)
    plain = generate(network, name)
    if name == "UNet":
        off = step_cache.deep_cache(network, 1)
    else:
        off = step_cache.first_block_cache(network, 0.0)
        assert all(map(torch.equal, generate(network, name), plain))
        off()
        off = clusca.ClusCa(network, 1).hooks.remove
    assert all(map(torch.equal, generate(network, name), plain))
    off()


def test_deepcache_computes_the_last_layer_from_what_is_kept():
    network = make("UNet")
    last = network.up_blocks[-1].resnets[-1]
    got, deep = [], seen_by(network.mid_block.resnets[0])
    first_layer = seen_by(network.down_blocks[0].resnets[0])
    last.register_forward_pre_hook(lambda m, args: got.append(args[0]))
    off = step_cache.deep_cache(network, 3)
    skip = []
    network.conv_in.register_forward_hook(lambda m, args, out: skip.append(out))
    generate(network, "UNet", steps=4)
    assert len(deep) == len(first_layer) == 2 and len(got) == 4
    below = got[0].shape[1] - skip[0].shape[1]
    assert torch.equal(got[1][:, :below], got[0][:, :below]) and torch.equal(got[1][:, below:], skip[1])
    assert not torch.equal(got[1][:, below:], got[0][:, below:])
    assert not torch.equal(got[3][:, :below], got[0][:, :below])
    off()


def test_first_block_cache_skips_all_but_the_first_block():
    network = make("SD3")
    first, last = (seen_by(network.transformer_blocks[n].ff.net[0].proj) for n in (0, -1))
    off = step_cache.first_block_cache(network, 1e9)
    generate(network, "SD3", steps=4)
    assert len(first) == 4 and len(last) == 1
    generate(network, "SD3", steps=4)
    assert len(first) == 8 and len(last) == 2
    off()


def test_taylorseer_draws_on_the_output_in_a_straight_line():
    network = make("SD3")
    last, outs = seen_by(network.transformer_blocks[-1].ff.net[0].proj), []
    network.proj_out.register_forward_hook(lambda m, args, out: outs.append(out))
    off = step_cache.taylorseer(network, 2)
    generate(network, "SD3", steps=6)
    # Steps 0 to 2 and 4 are full.
    assert len(last) == 4
    torch.testing.assert_close(outs[3], 2 * outs[2] - outs[1])
    torch.testing.assert_close(outs[5], outs[4] + (outs[4] - outs[2]) / 2)
    generate(network, "SD3", steps=6)
    assert len(last) == 8 and torch.equal(outs[6], outs[0])
    off()


def test_reuse_adds_what_all_but_the_first_block_added_in_the_last_full_step():
    network = make("SD3")
    first, second, last = (seen_by(network.transformer_blocks[n].ff.net[0].proj) for n in (0, 1, -1))
    blocks, ins, outs = network.transformer_blocks, [], []
    blocks[1].register_forward_pre_hook(lambda m, args, kwargs: ins.append(kwargs["hidden_states"]), with_kwargs=True)
    blocks[-1].register_forward_hook(lambda m, args, out: outs.append(out[1]))
    off = step_cache.reuse(network, 3)
    generate(network, "SD3", steps=5)
    assert len(first) == 5 and len(second) == len(last) == 2
    added = [out - before for before, out in zip(ins, outs, strict=True)]
    for step, full in enumerate((0, 0, 0, 3, 3)):
        torch.testing.assert_close(added[step], added[full], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(added[0], added[3], atol=1e-3) and not torch.equal(outs[1], outs[0])
    off()


KINDS = {"UNet": "UNets", "SD3": "transformers"}


@pytest.mark.parametrize("name", KINDS)
def test_every_peer_begins_each_generation_anew_and_is_undone(name):
    network = make(name)
    before, plain = traces(network), generate(network, name, steps=4)
    # One setting of each: test_diffusion_benchmark.py goes through all.
    for peer in {peer.split()[0]: peer for peer in peers_of(KINDS[name])}.values():
        off = switch_on(peer, network, TOKENS)
        made = generate(network, name, steps=4)
        generate(network, name, steps=1)
        again = generate(network, name, steps=4)
        assert all(map(torch.equal, again, made)), peer
        same = [torch.equal(a, b) for a, b in zip(made, plain, strict=True)]
        assert not all(same) and same[0] == PEERS[peer].remembers, peer
        assert all(out.isfinite().all() for out in made), peer
        off()
        assert traces(network) == before, peer
    assert all(map(torch.equal, generate(network, name, steps=4), plain))


def test_every_method_of_transformers_runs_and_is_undone():
    pipe, network = make_transformer_pipeline("SD3"), make("SD3")
    pipe.register_modules(transformer=network)
    before, plain = traces(network), generate_with_guidance(pipe, steps=5)
    assert set(METHODS_OF_TRANSFORMERS) == {"plain", *peers_of("transformers"), *OURS_OF_TRANSFORMERS}
    for method in OURS_OF_TRANSFORMERS:
        if needs_pipeline(method):
            with pytest.raises(AiluRusError, match="needs a pipeline"):
                switch_on(method, network, TOKENS)
        off = switch_on(method, pipe, TOKENS, min_tokens=1)
        assert not torch.equal(generate_with_guidance(pipe, steps=5), plain), method
        off()
        assert traces(network) == before, method
    assert torch.equal(generate_with_guidance(pipe, steps=5), plain)
