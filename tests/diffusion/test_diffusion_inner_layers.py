"""Inner layers of UNets in every k-th step: what stands in their place, in which steps, and what is refused."""

import copy

import pytest
import torch
from diffusion_models import NETWORKS, SETTINGS, generate, make_network
from diffusion_pipelines import PIPELINES, text_to_image
from diffusion_steps import distance, plain_run, run, same
from traces import traces

from ailurus_hf import AiluRusDiffusionConfig, AiluRusError, ailurus_status, apply_ailurus, remove_ailurus

WHOLE = {**SETTINGS, "keep_ratio": 1.0}
# In ControlNet-XS the ControlNet is within the UNet, and its layers are other ones.
UNETS = [name for name in NETWORKS if NETWORKS[name].maps and name != "ControlNet-XS"]
on_unets = pytest.mark.parametrize("name", UNETS)


def is_controlnet(network):
    return not hasattr(network, "up_blocks")


@on_unets
def test_every_second_step_is_plain_and_the_others_are_near(name):
    network = make_network(name)
    plain, before = plain_run(network, name), traces(network)
    kept = run(apply_ailurus(network, **WHOLE, inner_every=2), name)
    assert same(kept[::2], plain[::2])
    assert not same(kept[1::2], plain[1::2], 1e-4)
    # Nearer than the step before is.
    assert all(distance(kept[n], plain[n]) < distance(plain[n - 1], plain[n]) for n in (1, 3))
    run(network, name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(run(network, name), kept, strict=True))
    remove_ailurus(network)
    assert all(torch.equal(a, b) for a, b in zip(plain_run(network, name), plain, strict=True))
    assert traces(network) == before


@pytest.mark.parametrize("extrapolate", [False, True], ids=["kept", "drawn on"])
@pytest.mark.parametrize("name", [name for name in UNETS if not is_controlnet(make_network(name))])
def test_what_the_last_layer_gets(name, extrapolate):
    network = make_network(name)
    last, seen = network.up_blocks[-1].resnets[-1], []
    # Some are called by name.
    note = lambda module, args, kwargs: seen.append(args[0] if args else next(iter(kwargs.values())))  # noqa: E731
    handle = last.register_forward_pre_hook(note, with_kwargs=True)
    plain_run(network, name)
    handle.remove()
    plain, channels = seen[:], network.conv_in.out_channels
    seen.clear()
    apply_ailurus(network, **WHOLE, inner_every=2, extrapolate=extrapolate)
    last.register_forward_pre_hook(note, with_kwargs=True)
    run(network, name)
    below, beside = zip(*((x[:, :-channels], x[:, -channels:]) for x in plain), strict=True)
    drawn_on = below[2] + (below[2] - below[0]) / 2 if extrapolate else below[2]
    for got, want in zip(seen, (below[0], below[0], below[2], drawn_on), strict=True):
        torch.testing.assert_close(got[:, :-channels], want)
    assert same([x[:, -channels:] for x in seen], beside)
    assert distance(below[2], below[0]) > 1e-3


def test_a_controlnet_gives_what_the_first_convolution_does_and_keeps_the_rest():
    network, seen = make_network("ControlNet"), []
    handle = network.register_forward_hook(lambda module, args, out: seen.append([*out[0], out[1]]))
    plain_run(network, "ControlNet")
    plain = seen[:]
    seen.clear()
    run(apply_ailurus(network, **WHOLE, inner_every=2), "ControlNet")
    handle.remove()
    torch.testing.assert_close(seen[1][0], plain[1][0])
    for got, want, other in zip(seen[1][1:], plain[0][1:], plain[1][1:], strict=True):
        torch.testing.assert_close(got, want)
        assert not torch.allclose(got, other, rtol=1e-4)


@pytest.mark.parametrize(
    "fields, want",
    [
        ({"inner_every": 1}, [1, 1, 1, 1, 1, 1, 1]),
        ({"inner_every": 3}, [1, 0, 0, 1, 0, 0, 1]),
        ({"inner_every": 3, "unreduced_first_steps": 2}, [1, 1, 0, 0, 1, 0, 0]),
        ({"inner_every": 2, "unreduced_last_steps": 2}, [1, 0, 1, 0, 1, 1, 1]),
    ],
)
def test_in_which_steps_they_run(fields, want):
    pipe, ran = apply_ailurus(text_to_image()[0], **SETTINGS, **fields), []
    pipe.unet.register_forward_pre_hook(lambda module, args: ran.append(0))
    pipe.unet.down_blocks[0].resnets[0].register_forward_hook(lambda *_: ran.__setitem__(-1, 1))
    outer, inner = [], []
    for layer, seen in ((-1, outer), (-2, inner)):
        attention = pipe.unet.up_blocks[-1].attentions[layer].transformer_blocks[0].attn1
        attention.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape[1]))
    generate(pipe, steps=7)
    assert ran == want
    # The layer that runs in all steps has its tokens reduced in all but the whole ones at both ends.
    first, last = (fields.get(f"unreduced_{end}_steps", 0) for end in ("first", "last"))
    assert outer == [96] * first + [24] * (7 - first - last) + [96] * last
    assert len(inner) == sum(want)


def test_status_counts_the_steps_in_which_a_stack_does_not_run():
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS, inner_every=3)
    generate(pipe, steps=5)
    rows = {p.where: p for p in ailurus_status(pipe).locations}
    inner, outer = rows["unet.down_blocks.0.attentions.0"], rows["unet.up_blocks.1.attentions.1"]
    assert (inner.forwards, inner.clusterings, inner.num_clusters) == (5, 2, 0)
    assert (outer.forwards, outer.clusterings, outer.num_clusters) == (5, 5, 24)
    reduced = ailurus_status(generate_with(inner_every=None)).locations
    of_every_step = {p.where: p.reduced_flops for p in reduced}
    assert inner.reduced_flops == pytest.approx(0.4 * of_every_step[inner.where])
    assert outer.reduced_flops == pytest.approx(of_every_step[outer.where])
    assert "in 1 of 3 steps" in inner.restored and "steps" not in outer.restored


def generate_with(**fields):
    pipe = apply_ailurus(text_to_image()[0], **SETTINGS, **fields)
    generate(pipe, steps=5)
    return pipe


@pytest.mark.parametrize("way", [{}, {"projections": "merged"}, {"scope": "attention", "reduce": "kv"}], ids=str)
@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_pipelines(make, way):
    pipe, inputs = make()
    fields = {**SETTINGS, **way, "inner_every": 2, "unreduced_first_steps": 1, "extrapolate": True}
    of = lambda pipe, **more: generate(pipe, **{**inputs, **more}, steps=6)  # noqa: E731
    plain = of(pipe)
    alone = of(apply_ailurus(pipe, **{**WHOLE, **way, "inner_every": 2, "unreduced_first_steps": 1}))
    kept = of(apply_ailurus(pipe, **fields))
    assert kept.isfinite().all() and not torch.equal(kept, alone) and not torch.equal(alone, plain)
    of(pipe, seed=1)
    assert torch.equal(of(pipe), kept)
    assert torch.equal(of(copy.deepcopy(pipe)), kept)
    assert torch.equal(of(remove_ailurus(pipe)), plain)


def test_blocks_that_are_compiled_one_by_one():
    network = apply_ailurus(make_network("UNet"), **SETTINGS, inner_every=2)
    want = run(network, "UNet")
    last = network.up_blocks[-1]
    stacks = (network.down_blocks[0].attentions[0], last.attentions[-1])
    for block in (*(stack.transformer_blocks[0] for stack in stacks), last.resnets[0], last.resnets[-1]):
        block.compile(backend="eager", dynamic=False)
    assert same(run(network, "UNet"), want)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["PixArt", "SD3.5", "Wan", "ControlNet-XS"])
def test_networks_without_such_layers_are_refused_and_left_as_they_are(name):
    network = make_network(name)
    before = traces(network)
    with pytest.raises(AiluRusError, match=f"inner_every is of UNets.*{type(network).__name__} has other layers"):
        apply_ailurus(network, **SETTINGS, inner_every=2)
    assert traces(network) == before


def test_a_layer_that_runs_on_parts_of_its_batch_is_refused():
    network = make_network("UNet")
    apply_ailurus(network, **WHOLE, inner_every=2)
    layer = network.up_blocks[-1].resnets[0]

    class Parts(torch.nn.Module):
        def forward(self, x, time):
            return torch.cat([layer(*part) for part in zip(x.chunk(2), time.chunk(2), strict=True)])

    network.up_blocks[-1].resnets[0] = Parts()
    with pytest.raises(AiluRusError, match=r"up_blocks.1.resnets.0 ran twice in one forward"):
        run(network, "UNet")


@pytest.mark.parametrize(
    "fields, numbers",
    [
        ({"inner_every": 0}, "inner_every must be at least 1, got 0"),
        ({"inner_every": 2, "full_every": 3}, "full_every=3 and inner_every=2 are two rhythms"),
        ({"inner_every": 2, "between": "nothing"}, "give full_every, got None"),
    ],
)
def test_wrong_settings(fields, numbers):
    with pytest.raises(AiluRusError, match=numbers):
        AiluRusDiffusionConfig(**fields)
