"""torch.compile before and after apply_ailurus, whole and by blocks, on, off and on: never silently plain.

A few of all networks, as each compiles for seconds; AILURUS_TEST_EVERY=1 tests them all, each in every way.
"""

import itertools
import os

import pytest
import torch
from diffusion_models import NETWORKS, SETTINGS, latents, make_network, predict

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


@pytest.mark.parametrize("name, scope, compile_it", CASES)
def test_on_off_and_on_again(name, scope, compile_it):
    x, fields = latents(NETWORKS[name].shape), {**SETTINGS, **SCOPES[scope]}
    # Only a network that is not traced can read its grid from ids.
    given = {"joint_attention_kwargs": {"grid": (8, 12)}} if name.startswith(("Flux", "Chroma")) else {}
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


def test_blocks_compiled_without_breaks_are_an_error():
    network, x = apply_ailurus(make_network("PixArt"), **SETTINGS), latents(NETWORKS["PixArt"].shape)
    compile_blocks(network, fullgraph=True)
    with pytest.raises(Exception, match="fullgraph=True, or the network as a whole"):
        predict(network, "PixArt", x)
