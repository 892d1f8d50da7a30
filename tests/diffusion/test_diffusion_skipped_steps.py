"""Every k-th step on all tokens, and nothing between: what is added then, for which networks, and what is said."""

import pytest
import torch
from diffusion_models import SETTINGS, make_network
from diffusion_steps import additions, check, distance, run
from diffusion_ways import on_networks_with_full_steps

from ailurus_hf import ailurus_status, apply_ailurus


@on_networks_with_full_steps
def test_the_same_where_nothing_runs_between(name):
    check(name, between="nothing")
    network = apply_ailurus(make_network(name), **SETTINGS, full_every=2, between="nothing")
    run(network, name)
    status = ailurus_status(network)
    assert {p.num_clusters for p in status.locations} == {0} and not any(p.clusterings for p in status.locations)


@pytest.mark.parametrize("extrapolate", [False, True])
@pytest.mark.parametrize("name", ["UNet", "SDXL UNet", "PixArt"])
def test_what_is_added_where_nothing_runs_between(name, extrapolate):
    added = additions(make_network(name), name, full_every=2, between="nothing", extrapolate=extrapolate)
    torch.testing.assert_close(added[1], added[0])
    want = added[2] + (added[2] - added[0]) / 2 if extrapolate else added[2]
    torch.testing.assert_close(added[3], want)
    assert distance(added[2], added[0]) > 1e-3


def test_nothing_is_said_where_blocks_were_skipped(caplog):
    # Grids of 24 tokens are smaller than min_tokens, those of 96 are skipped.
    network = apply_ailurus(make_network("UNet"), keep_ratio=0.5, min_tokens=90, full_every=2, between="nothing")
    with caplog.at_level("WARNING", "ailurus_hf"):
        run(network, "UNet")
    assert {p.num_clusters for p in ailurus_status(network).locations} == {0, 24} and not caplog.text


def test_a_line_is_not_drawn_on_through_full_steps_that_are_near():
    # Steps 0 and 1 are full ones at the beginning, 3 the first that is two steps after another.
    way = {"full_every": 2, "between": "nothing", "unreduced_first_steps": 2}
    for extrapolate in (False, True):
        added = additions(make_network("PixArt"), "PixArt", **way, extrapolate=extrapolate)
        torch.testing.assert_close(added[2], added[1])
        assert distance(added[3], added[1]) > 1e-3
