"""Every supported network in the ways of reducing it, as parameters of tests, and inputs for them.

A few networks, one of each kind, in every way, and the others in both scopes; AILURUS_TEST_EVERY=1: all in every way.
"""

import os

import pytest
import torch
from diffusion_models import NETWORKS, latents

WAYS = {
    "blocks": {},
    "merged projections": {"projections": "merged"},
    "attention": {"scope": "attention"},
    "keys and values": {"scope": "attention", "reduce": "kv", "clustering": "kmeans"},
    "density peaks": {"clustering": "density_peaks"},
    "each resolution": {"cluster_per": "resolution"},
}
on_every_network = pytest.mark.parametrize("name", NETWORKS)
# Those that full_every can keep what the last block gave of.
on_networks_with_full_steps = pytest.mark.parametrize("name", [name for name in NETWORKS if not NETWORKS[name].each])
# The joint transformers.
on_both = pytest.mark.parametrize("name", ["SD3.5", "Flux"])
in_both_scopes = pytest.mark.parametrize("scope", ["blocks", "attention"])
# A transformer has no projections around its one stack.
OF_UNETS = ("merged projections", "each resolution")
OF_EACH_KIND = ("UNet", "SDXL UNet", "ControlNet", "PixArt", "SD3.5", "Flux", "Wan", "Z-Image", "CogVideoX")
EVERY = bool(os.environ.get("AILURUS_TEST_EVERY"))


def _is_tried(name, way):
    if way in OF_UNETS and not NETWORKS[name].maps:
        return False
    return EVERY or name in OF_EACH_KIND or way in ("blocks", "attention")


on_every_network_in_every_way = pytest.mark.parametrize(
    "name, way",
    [
        pytest.param(name, fields, id=f"{name}-{way}")
        for name in NETWORKS
        for way, fields in WAYS.items()
        if _is_tried(name, way)
    ],
)
in_every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# How far a picture alone may be from the same one in a batch, of its scale: as far as rounding goes.
APART = {
    # Plain, it differs by as much.
    "ControlNet Union": 5e-5,
    # It rounds queries and keys to bf16, whatever it runs in.
    "Kandinsky 5": 1e-3,
}


def far_apart(name):
    return APART.get(name, 1e-5)


# Networks that get positions of tokens and no sides, and the argument that may hold their grid.
BY_IDS = {
    **dict.fromkeys(("Flux", "Flux.2", "Chroma", "Flux ControlNet", "Ovis-Image"), "joint_attention_kwargs"),
    "Bria": "attention_kwargs",
}


def grid_of(name):
    """The argument that tells a network its grid, where it would read it from ids, which waits for the device."""
    return {BY_IDS[name]: {"grid": NETWORKS[name].grids[0]}} if name in BY_IDS else {}


def sample(name, **fields):
    return latents(NETWORKS[name].shape, **fields)


def duplicated(small, times):
    """Every pixel several times, and every fourth column like the one before, so that clusters differ in size."""
    small[..., 1::4] = small[..., 0::4]
    return small.repeat_interleave(times, -1).repeat_interleave(times, -2)


def text_of(network):
    return torch.randn(2, 5, network.config.cross_attention_dim, generator=torch.Generator().manual_seed(4))
