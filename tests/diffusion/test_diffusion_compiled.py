"""torch.compile before and after apply_ailurus, whole and by blocks, on, off and on: never silently plain.

A few of all networks, as each compiles for seconds; AILURUS_TEST_EVERY=1 tests them all, each in every way.
"""

import itertools
import os

import pytest
import torch
from diffusion_models import NETWORKS, SETTINGS, latents, make_network, predict
from diffusion_ways import grid_of

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.diffusion.stacks import find_stacks

SCOPES = {"blocks": {}, "attention": {"scope": "attention"}}


def compile_whole(network):
    network.compile(backend="eager", dynamic=False)


def compile_blocks(network, **fields):
    for stack in find_stacks(network):
        for block in stack.blocks:
            block.compile(backend="eager", **fields)


# Of each kind of network, in either way and scope.
CASES = [
    ("UNet", "blocks", compile_whole),
    ("UNet", "blocks", compile_blocks),
    ("PixArt", "attention", compile_whole),
    ("PixArt", "blocks", compile_blocks),
    ("Flux", "blocks", compile_whole),
    ("Flux", "attention", compile_blocks),
    ("Qwen-Image", "blocks", compile_whole),
]
if os.environ.get("AILURUS_TEST_EVERY"):
    CASES = list(itertools.product(NETWORKS, SCOPES, (compile_whole, compile_blocks)))

# In one graph, of each kind of attention. Lumina 2 has none, plain or not: it reads the lengths of texts; LongCat-Image
# cannot be told its grid.
IN_ONE_GRAPH = [
    ("Chroma", "attention"),
    ("Z-Image", "blocks"),
    ("LTX-Video", "blocks"),
    ("HunyuanVideo", "attention"),
    ("CogVideoX", "attention"),
    ("SD3 ControlNet", "blocks"),
]
if os.environ.get("AILURUS_TEST_EVERY"):
    IN_ONE_GRAPH = [(name, scope) for name in NETWORKS for scope in SCOPES if name not in ("Lumina 2", "LongCat-Image")]


@pytest.mark.parametrize("name, scope, compile_it", CASES)
def test_on_off_and_on_again(name, scope, compile_it):
    x, fields = latents(NETWORKS[name].shape), {**SETTINGS, **SCOPES[scope]}
    given = grid_of(name)
    plain = predict(make_network(name), name, x)
    reduced = predict(apply_ailurus(make_network(name), **fields), name, x)
    assert (reduced - plain).abs().max() > 1e-3 * plain.abs().max()
    network = make_network(name)
    compile_it(network)
    close = lambda want: torch.testing.assert_close(  # noqa: E731
        predict(network, name, x, **given), want, rtol=1e-4, atol=1e-5 * plain.abs().max().item()
    )
    close(plain)
    apply_ailurus(network, **fields)
    # Twice: what is compiled in the first forward serves the next ones.
    close(reduced)
    close(reduced)
    remove_ailurus(network)
    close(plain)
    apply_ailurus(network, **fields)
    close(reduced)


@pytest.mark.parametrize("name, scope", IN_ONE_GRAPH)
def test_a_network_is_one_graph(name, scope):
    x, other = (latents(NETWORKS[name].shape, seed=seed) for seed in (0, 1))
    network = apply_ailurus(make_network(name), **SETTINGS, **SCOPES[scope])
    # Z-Image makes its tables of positions in its first forward.
    want = [predict(network, name, each) for each in (x, other)]
    network.compile(backend="eager", fullgraph=True, dynamic=False)
    for each, expected in zip((x, other), want, strict=True):
        got = predict(network, name, each, **grid_of(name))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    torch.compiler.reset()


def test_a_network_that_cannot_be_told_its_grid_reads_it_in_a_break():
    network, x = apply_ailurus(make_network("LongCat-Image"), **SETTINGS), latents(NETWORKS["LongCat-Image"].shape)
    want = predict(network, "LongCat-Image", x)
    compile_whole(network)
    torch.testing.assert_close(predict(network, "LongCat-Image", x), want)
    torch.compiler.reset()
    network.compile(backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compile it without fullgraph=True"):
        predict(network, "LongCat-Image", x)
    torch.compiler.reset()


def test_blocks_compiled_without_breaks_are_an_error():
    network, x = apply_ailurus(make_network("PixArt"), **SETTINGS), latents(NETWORKS["PixArt"].shape)
    compile_blocks(network, fullgraph=True)
    with pytest.raises(Exception, match="fullgraph=True, or the network as a whole"):
        predict(network, "PixArt", x)
