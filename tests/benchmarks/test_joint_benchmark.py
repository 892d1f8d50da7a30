"""The speed benchmark of SD3, Flux and Wan runs, undoes every way, and its ideals are what torch counts."""

import pytest
import torch
from traces import traces

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.diffusion import denoising
from benchmarks.diffusion import joint_generations, joint_speed
from benchmarks.harness import model_flops

TINY = {
    "sd35": {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16},
    "flux": {"num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)},
    "wan-1.3b": {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32},
}


@pytest.mark.parametrize("model", TINY)
def test_ways_take_turns_and_ideals_are_what_torch_counts(model, monkeypatch):
    kind, fields, _ = joint_speed.MODELS[model]
    monkeypatch.setitem(joint_speed.MODELS, model, (kind, {**fields, **TINY[model]}, 3))
    monkeypatch.setattr(joint_speed, "WAN_LATENTS", (4, 64, 64))
    cpu, fp32 = torch.device("cpu"), torch.float32
    network = joint_speed.make(model, 3, cpu, fp32)
    before = traces(network)
    plain, *rows = joint_speed.measure(network, model, 512, 3, 1, cpu, fp32)
    assert traces(network) == before and plain["speed_up"] == 1
    assert [row["method"] for row in rows] == list(joint_speed.METHODS)
    assert all(row["ideal"] > 1 and row["speed_up"] > 0 and row["tokens"] == 1024 for row in rows)
    whole = joint_speed.whole_networks([model], [512])
    assert [row["ideal"] for row in whole] == pytest.approx([row["ideal"] for row in rows])
    arguments = joint_speed.inputs(network, model, 512, cpu, fp32)
    apply_ailurus(network, **joint_speed.METHODS["blocks 0.25"], refresh_every=2)
    with denoising(network):
        network(**arguments)
        # The second forward takes the clusters of the first, so nothing is counted but the network.
        counted = model_flops(lambda: network(**arguments))
    remove_ailurus(network)
    assert counted == pytest.approx(model_flops(lambda: network(**arguments)) / rows[1]["ideal"], rel=1e-3)


@pytest.mark.parametrize(
    ("model", "methods"),
    {
        "sd35": ["ToMA 0.25, all", "ClusCa 3", "blocks 0.25 after layer 0, every 4 steps"],
        "flux": ["TaylorSeer 2", "blocks 0.25 after layer 0, full every 2, extrapolated, nothing between"],
    }.items(),
)
def test_whole_generations(model, methods, monkeypatch):
    kind, fields, _ = joint_speed.MODELS[model]
    monkeypatch.setitem(joint_speed.MODELS, model, (kind, {**fields, **TINY[model]}, 3))
    cpu = torch.device("cpu")
    network = joint_speed.make(model, 3, cpu, torch.float32)
    before, calls = traces(network), []
    handle = network.register_forward_hook(lambda *args: calls.append(1))
    plain, *rows = joint_generations.measure(network, model, 512, methods, 6, 1, cpu)
    handle.remove()
    assert traces(network) == before and [row["method"] for row in rows] == methods
    assert len(calls) == (1 + len(methods)) * (1 + 2 * 6)  # a first step; a generation is counted, and one is timed
    assert plain["layers"] == 3
    assert plain["speed_up"] == plain["fewer_flops"] == 1 and plain["cosine"] == pytest.approx(1, rel=1e-5)
    assert all(row["fewer_flops"] > 1 and row["cosine"] < 0.999999 and row["speed_up"] > 0 for row in rows)
    assert all(row["share_of_ideal"] == pytest.approx(row["speed_up"] / row["fewer_flops"]) for row in rows)
