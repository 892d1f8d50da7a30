"""torch.compile before and after apply_ailurus, whole and by blocks, on, off and on: never silently plain."""

import pytest
import torch
from diffusion_models import NETWORKS, SETTINGS, latents, make_network, predict

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.diffusion.stacks import find_stacks

WAYS = {"blocks": {}, "merged projections": {"projections": "merged"}, "attention": {"scope": "attention"}}
CASES = [
    *(("UNet", way) for way in WAYS),
    ("SDXL UNet", "blocks"),
    *((name, way) for name in ("PixArt", "SD3.5", "Flux", "Wan") for way in ("blocks", "attention")),
]
in_every_case = pytest.mark.parametrize("name, way", CASES)


def compile_whole(network):
    network.compile(backend="eager", dynamic=False)


def compile_blocks(network, **fields):
    for stack in find_stacks(network):
        for block in stack.blocks:
            block.compile(backend="eager", **fields)


@in_every_case
@pytest.mark.parametrize("compile_it", [compile_whole, compile_blocks])
def test_on_off_and_on_again(name, way, compile_it):
    x, fields = latents(NETWORKS[name].shape), {**SETTINGS, **WAYS[way]}
    # Only a network that is not traced can read its grid from ids.
    given = {"joint_attention_kwargs": {"grid": (8, 12)}} if name == "Flux" else {}
    plain = predict(make_network(name), name, x)
    reduced = predict(apply_ailurus(make_network(name), **fields), name, x)
    assert (reduced - plain).abs().max() > 1e-3 * plain.abs().max()
    network = make_network(name)
    compile_it(network)
    close = lambda want: torch.testing.assert_close(  # noqa: E731
        predict(network, name, x, **given), want, rtol=1e-4, atol=1e-5 * plain.abs().max().item()
    )
    close(plain)
    for _ in range(2):
        apply_ailurus(network, **fields)
        # Twice: what is compiled in the first forward serves the next ones.
        close(reduced)
        close(reduced)
        remove_ailurus(network)
        close(plain)


def test_blocks_compiled_without_breaks_are_an_error():
    network, x = apply_ailurus(make_network("PixArt"), **SETTINGS), latents(NETWORKS["PixArt"].shape)
    compile_blocks(network, fullgraph=True)
    with pytest.raises(Exception, match="fullgraph=True, or the network as a whole"):
        predict(network, "PixArt", x)
