"""Every k-th step on all tokens, those between on representatives: what is kept, for which calls, and how long."""

import copy
import pickle
import threading

import pytest
import torch
from diffusion_models import NETWORKS, SETTINGS, generate, latents, make_network, predict, text
from diffusion_pipelines import PIPELINES, Tiles, text_to_image
from diffusion_steps import STEPS, additions, check, distance, picture, plain_run, run, same
from diffusion_ways import far_apart, on_networks_with_full_steps, sample
from transformer_pipelines import generate_with_guidance, make_transformer_pipeline

from ailurus_hf import AiluRusDiffusionConfig, AiluRusError, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.diffusion import denoising
from ailurus_hf.diffusion.apply import reducers_of

on_some_networks = pytest.mark.parametrize("name", ["UNet", "PixArt", "SD3.5", "Flux", "Wan"])


@on_networks_with_full_steps
def test_full_steps_are_plain_and_those_between_nearer_to_it(name):
    check(name)


@pytest.mark.parametrize("name", ["UNet", "SDXL UNet", "ControlNet"])
def test_the_same_where_projections_are_merged(name):
    check(name, projections="merged")


@pytest.mark.parametrize("name", ["UNet", "PixArt", "Flux", "Wan"])
@pytest.mark.parametrize(
    "way",
    [{"cluster_per": "resolution", "refresh_every": 2}, {"extrapolate": True, "clustering": "density_peaks"}],
    ids=["each resolution", "extrapolated"],
)
def test_the_same_in_other_ways(name, way):
    check(name, **way)


@on_networks_with_full_steps
def test_identity_where_every_step_is_full_or_no_token_has_to_go(name):
    network = make_network(name)
    plain = plain_run(network, name)
    for fields in ({"full_every": 1}, {"full_every": 2, "keep_ratio": 1.0}, {"full_every": 2, "min_tokens": 10**4}):
        assert same(run(apply_ailurus(network, **{**SETTINGS, **fields}), name), plain)
        assert all(p.num_tokens == p.num_clusters for p in ailurus_status(network).locations)
    # One call, of which nothing is known, is enough.
    apply_ailurus(network, **SETTINGS, full_every=1)
    assert same([predict(network, name, picture(name, 0), STEPS[0])], plain[:1])


@on_networks_with_full_steps
def test_an_image_gives_the_same_alone_and_in_a_batch(name):
    if NETWORKS[name].conditions(1).get("class_labels") is not None:
        pytest.skip("its condition depends on the place in the batch")
    network = apply_ailurus(make_network(name), **SETTINGS, full_every=2)
    together = run(network, name)
    x = [picture(name, n)[:1] for n in range(len(STEPS))]
    with denoising(network):
        alone = [predict(network, name, x[n], t) for n, t in enumerate(STEPS)]
    assert same([each[:1] for each in alone], [each[:1] for each in together], far_apart(name))


def clusters_of_first(network):
    reducer = reducers_of(network)[0][1]
    return reducer.records[reducer.stacks[0].name].last_clusters


@pytest.mark.parametrize("extrapolate", [False, True])
@pytest.mark.parametrize("name", ["UNet", "SDXL UNet", "PixArt"])
def test_the_correction_token_by_token(name, extrapolate):
    # Reduced in every step, each token adds what its representative adds. Nothing before the first stack is reduced,
    # and clusters are those of steps 0 and 2 in either.
    representatives = additions(make_network(name), name, refresh_every=2)
    network = make_network(name)
    added = additions(network, name, full_every=2, extrapolate=extrapolate)
    grown, clusters = (added[2] - added[0]) / 2, clusters_of_first(network)
    grown_alike = clusters.unmerge(clusters.merge(grown))
    want = torch.empty_like(added[3])
    for image in range(len(want)):
        for token in range(want.shape[1]):
            of = [(full[image, token], few[image, token]) for full, few in zip(added, representatives, strict=True)]
            # Steps 0 and 2 were full; this is step 3.
            kept, gained_since = of[2][0], of[3][1] - of[2][1]
            if extrapolate:
                kept = kept + grown[image, token] - grown_alike[image, token]
            want[image, token] = kept + gained_since
    torch.testing.assert_close(added[3], want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    assert distance(added[3], added[2]) > 1e-3 and distance(added[3], representatives[3]) > 1e-3


@pytest.mark.parametrize("name", ["UNet", "SD3.5", "Flux", "Wan"])
def test_calls_with_and_without_a_prompt_each_have_their_own(name):
    network = apply_ailurus(make_network(name), **SETTINGS, full_every=3)
    prompts = {"cond": text(2), "uncond": text(2, seed=9)}
    want = {each: run(network, name, encoder_hidden_states=prompt) for each, prompt in prompts.items()}
    contexts = hasattr(network, "cache_context")
    got = {each: [] for each in prompts}
    with denoising(network):
        for n, timestep in enumerate(STEPS):
            # By their order, or by the cache context, in whatever order.
            for each in sorted(prompts, reverse=contexts and n % 2 == 1):
                call = lambda each=each, n=n, t=timestep: predict(  # noqa: E731
                    network, name, picture(name, n), t, encoder_hidden_states=prompts[each]
                )
                if contexts:
                    with network.cache_context(each):
                        got[each].append(call())
                else:
                    got[each].append(call())
    for each in prompts:
        assert same(got[each], want[each])
        assert not same(got[each], want["uncond" if each == "cond" else "cond"], 1e-3)


def check_pipeline(pipe, run):
    """Nearer to the plain picture than without full steps, the same in every turn and in copies, and undone."""
    plain = run(pipe)
    alone = run(apply_ailurus(pipe, **SETTINGS))
    apply_ailurus(pipe, **SETTINGS, full_every=2)
    kept = run(pipe)
    assert kept.isfinite().all() and 1e-4 < (kept - plain).norm() < (alone - plain).norm()
    run(pipe, seed=1)
    assert torch.equal(run(pipe), kept)
    assert torch.equal(run(copy.deepcopy(pipe)), kept)
    apply_ailurus(pipe, **SETTINGS, full_every=1)
    assert same([run(pipe)], [plain])
    assert torch.equal(run(remove_ailurus(pipe)), plain)


@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_pipelines_of_unets(make):
    pipe, inputs = make()
    check_pipeline(pipe, lambda pipe, **kwargs: generate(pipe, **{**inputs, **kwargs}))


@pytest.mark.parametrize("name", ["SD3.5", "Flux", "PixArt", "Wan"])
def test_pipelines_of_transformers(name):
    check_pipeline(make_transformer_pipeline(name), generate_with_guidance)


@pytest.mark.parametrize("name, contexts", [("SD3", {None}), ("Flux", {"cond", "uncond"}), ("Wan", {"cond", "uncond"})])
def test_guidance_by_two_calls_keeps_two(name, contexts):
    pipe, seen, kinds = apply_ailurus(make_transformer_pipeline(name), **SETTINGS, full_every=3), [], set()
    clock = reducers_of(pipe)[0][1].clock
    blocks = getattr(pipe.transformer, "blocks" if name == "Wan" else "transformer_blocks")
    # Behind the hook that merges.
    blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    pipe.transformer.register_forward_hook(lambda *_: kinds.update(kind[1:] for kind in clock._generations.get().kept))
    generate_with_guidance(pipe, steps=5)
    tokens = ailurus_status(pipe).locations[0].num_tokens
    assert [n == tokens for n in seen[:: len(contexts)]] == [True, False, False, True, False]
    assert kinds == {(context, 0) for context in contexts}
    assert not clock._generations.get().kept


@pytest.mark.parametrize(
    "fields, want",
    [
        ({"full_every": 3}, [96, 24, 24, 96, 24, 24, 96]),
        ({"full_every": 3, "refresh_every": 2, "unreduced_first_steps": 2}, [96, 96, 24, 24, 96, 24, 24]),
        ({"full_every": 2, "unreduced_last_steps": 2}, [96, 24, 96, 24, 96, 96, 96]),
        ({"full_every": 100}, [96, 24, 24, 24, 24, 24, 24]),
    ],
)
def test_which_steps_are_full(fields, want):
    pipe, seen = apply_ailurus(text_to_image()[0], **SETTINGS, **fields), []
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for last in (None, 1, None):
        seen.clear()
        if last is None:
            generate(pipe, steps=7)
            assert seen == want
            continue

        def stop(pipe, index, timestep, tensors, last=last):
            if index == last:
                raise RuntimeError("enough")
            return tensors

        with pytest.raises(RuntimeError, match="enough"):
            generate(pipe, steps=7, callback_on_step_end=stop)


@pytest.mark.parametrize(
    "fields, twice, clusterings",
    [
        # Full in steps 0, 3 and 6, the last.
        ({"full_every": 3}, 2, 2),
        ({"full_every": 3, "refresh_every": 4}, 2, 1),
        ({"full_every": 3, "unreduced_first_steps": 2}, 2, 2),
        ({"full_every": 3, "unreduced_first_steps": 2, "extrapolate": True}, 2, 2),
        ({"full_every": 2, "unreduced_last_steps": 3}, 2, 2),
    ],
)
def test_full_steps_run_on_representatives_too_where_a_step_builds_on_it(fields, twice, clusterings):
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS, **fields)
    generate(pipe, steps=7)
    for _, reducer in reducers_of(pipe):
        first = reducer.records[reducer.stacks[0].name]
        assert (first.again, first.clusterings) == ({(96, 24): twice}, clusterings)
        assert not reducer.clock._generations.get().kept, "held after the last step"


def test_a_forward_that_broke_off_is_followed_by_a_full_one():
    network, seen = apply_ailurus(make_network("UNet"), **SETTINGS, full_every=4), []
    block = network.down_blocks[0].attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with denoising(network):
        predict(network, "UNet", picture("UNet", 0), 9)
        handle = network.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict(network, "UNet", picture("UNet", 1), 8)
        handle.remove()
        predict(network, "UNet", picture("UNet", 2), 7)
    assert seen == [96, 24, 96]


@pytest.mark.parametrize("name", ["UNet", "Flux"])
def test_copies_begin_anew_and_are_undone_on_their_own(name):
    network = make_network(name)
    plain = plain_run(network, name)
    apply_ailurus(network, **SETTINGS, full_every=2)
    want = run(network, name)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert all(torch.equal(a, b) for a, b in zip(run(twin, name), want, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(plain_run(remove_ailurus(twin), name), plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(network, name), want, strict=True))


def test_two_threads_share_a_network():
    network = apply_ailurus(make_network("UNet"), **SETTINGS, full_every=2)
    want = [run(network, "UNet", seed) for seed in (0, 1)]
    both, got = threading.Barrier(2, timeout=30), [None, None]
    network.down_blocks[0].attentions[0].register_forward_hook(lambda *_: [both.wait(), None][1])

    def work(seed):
        got[seed] = run(network, "UNet", seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))


def test_levels_of_attention_alone_are_whole_in_full_steps_too():
    network = make_network("UNet")
    plain = plain_run(network, "UNet")
    apply_ailurus(network, **SETTINGS, levels={1: {"scope": "attention", "reduce": "kv"}}, full_every=2)
    kept = run(network, "UNet")
    assert same(kept[::2], plain[::2]) and not same(kept[1::2], plain[1::2], 1e-4)


@on_some_networks
def test_status_counts_full_steps(name):
    network = make_network(name)
    run(apply_ailurus(network, **SETTINGS), name)
    always = [p.flops_saved for p in ailurus_status(network).locations]
    run(apply_ailurus(network, **SETTINGS, full_every=4), name)
    status = ailurus_status(network)
    saved = [p.flops_saved for p in status.locations]
    if NETWORKS[name].maps:
        # The linear maps around the blocks do not run again.
        assert all(each - 0.25 < now < 0.75 * each for each, now in zip(always, saved, strict=True))
    else:
        # One of four steps on all tokens, and on representatives, too.
        assert saved == pytest.approx([0.75 * each - 0.25 * (1 - each) for each in always])
    assert all((p.forwards, p.num_tokens) == (4, 4 * p.num_clusters) for p in status.locations)
    assert "all tokens in 1 of 4 steps" in str(status)


@pytest.mark.parametrize("between", ["representatives", "nothing"])
def test_blocks_compiled_one_by_one(between):
    network = apply_ailurus(make_network("PixArt"), **SETTINGS, full_every=2, between=between)
    want = run(network, "PixArt")
    for block in network.transformer_blocks:
        block.compile(backend="eager", dynamic=False)
    assert same(run(network, "PixArt"), want)
    torch.compiler.reset()


@pytest.mark.parametrize("every", ["full_every", "inner_every"])
def test_what_cannot_be_known_is_refused(every):
    network, x = apply_ailurus(make_network("UNet"), **SETTINGS, **{every: 3}), sample("UNet")
    with pytest.raises(AiluRusError, match=rf"{every}=3 cannot tell which step.*denoising\(network, scheduler\)"):
        predict(network, "UNet", x)
    with pytest.raises(Exception, match="does not count steps"):
        predict(torch.compile(network, backend="eager", fullgraph=True), "UNet", x)
    torch.compiler.reset()

    pipe = apply_ailurus(text_to_image()[0], **SETTINGS, **{every: 2})
    tiles = Tiles(**pipe.components, requires_safety_checker=False)
    with pytest.raises(AiluRusError, match=rf"{every}=2 cannot tell pictures apart.*several times a step"):
        tiles(latents((4, 8, 12)).split(1))


@pytest.mark.parametrize(
    "fields, numbers",
    [
        ({"full_every": 0}, "full_every must be at least 1, got 0"),
        ({"full_every": 2, "scope": "attention"}, "full_every=2.*scope='blocks', got 'attention'"),
        ({"extrapolate": True}, "give full_every or inner_every, got None"),
        ({"between": "nothing"}, "give full_every, got None"),
        ({"between": "nothing", "full_every": 2, "projections": "merged"}, "use projections='all', got 'merged'"),
    ],
)
def test_wrong_settings(fields, numbers):
    with pytest.raises(AiluRusError, match=numbers):
        AiluRusDiffusionConfig(**fields)
