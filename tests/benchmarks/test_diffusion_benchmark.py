"""The speed benchmark of diffusion runs and undoes every contender, its numbers agree; ToDo follows its paper."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusion_models import UNET, UP
from traces import traces

from ailurus_hf import AiluRusDiffusionConfig, ailurus_status, apply_ailurus
from ailurus_hf.diffusion.reducer import reducers_of
from ailurus_hf.presets import DIFFUSION_PRESETS
from benchmarks import harness, report_tables
from benchmarks.diffusion import diffusion_speed
from benchmarks.methods import diffusion as diffusion_methods
from benchmarks.peers.todo import ToDoProcessor

ROOT = Path(__file__).parents[2]


def test_every_method_takes_its_turn_and_is_undone(monkeypatch):
    fields = {**UNET, **UP, "attention_head_dim": 2}
    monkeypatch.setitem(diffusion_speed.MODELS, "tiny", fields)
    unet = diffusion_speed.make_unet("tiny", torch.device("cpu"), torch.float32)
    before = traces(unet)
    classes = {name: type(module) for name, module in unet.named_modules()}
    plain, *rows = diffusion_speed.measure("tiny", 512, list(diffusion_speed.SHOWN), 1, unet=unet)
    assert traces(unet) == before
    assert {name: type(module) for name, module in unet.named_modules()} == classes
    assert plain["method"] == "plain" and plain["speed_up"] == 1 and plain["cosine"] == pytest.approx(1)
    assert [row["method"] for row in rows] == list(diffusion_speed.SHOWN)[1:]
    for row in rows:
        assert row["cosine"] < 0.9999999 and row["speed_up"] > 0
        is_ours = not row["method"].startswith(("tomesd", "ToDo"))
        assert ("ideal" in row) == is_ours
        if is_ours:
            assert row["ideal"] > 1 and row["overhead"] > 0
            assert row["share_of_ideal"] == pytest.approx(row["speed_up"] / row["ideal"])
    ideal = {row["method"]: row.get("ideal") for row in rows}
    assert ideal["blocks 0.25, merged projections"] > ideal["blocks 0.25"] > ideal["attention 0.25"]
    assert ideal["blocks 0.25"] > ideal["blocks 0.5"]
    assert ideal["blocks of each stack 0.25"] == ideal["blocks 0.25"]
    assert ideal["blocks 0.25"] > ideal["keys 0.0625 at full size, blocks 0.25 at half"] > ideal["keys 0.25"] > 1


def test_methods_that_stand_for_presets_are_the_presets():
    assert report_tables.METHODS_OF_PRESETS.keys() == DIFFUSION_PRESETS.keys()
    for preset, (method, _) in report_tables.METHODS_OF_PRESETS.items():
        config = AiluRusDiffusionConfig(**diffusion_methods.fields_of(method))
        assert config == AiluRusDiffusionConfig.preset(preset), preset


def test_every_method_of_the_registry_runs_and_is_undone(monkeypatch):
    monkeypatch.setitem(diffusion_speed.MODELS, "tiny", {**UNET, **UP, "attention_head_dim": 2})
    unet = diffusion_speed.make_unet("tiny", torch.device("cpu"), torch.float32)
    before, step = traces(unet), diffusion_speed.inputs("tiny", 256, 1, 0)
    with torch.no_grad():
        plain = diffusion_speed.step_of(unet, step)
        for name in diffusion_methods.METHODS[1:]:
            off = diffusion_methods.switch_on(name, unet, 32 * 32, min_tokens=256)
            changes = not torch.equal(diffusion_speed.step_of(unet, step), plain)
            peer = diffusion_methods.PEERS.get(name)
            whole = name == "all tokens" or " steps whole" in name
            assert changes != (whole or (peer is not None and peer.remembers)), name
            off()
            assert traces(unet) == before, name
        assert torch.equal(diffusion_speed.step_of(unet, step), plain)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_whole_generations(model, monkeypatch):
    """With what SDXL's UNet takes beside the prompt, too."""
    fields = {
        **UNET,
        **UP,
        "attention_head_dim": 2,
        "cross_attention_dim": diffusion_speed.MODELS[model]["cross_attention_dim"],
    }
    if model == "sdxl":
        added = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
        fields |= {name: diffusion_speed.MODELS[model][name] for name in added}
    monkeypatch.setitem(diffusion_speed.MODELS, model, fields)
    unet = diffusion_speed.make_unet(model, torch.device("cpu"), torch.float32)
    calls = []
    unet.register_forward_hook(lambda *args: calls.append(args[1][0].shape[0]))
    before = traces(unet)
    plain, ours = diffusion_speed.measure(model, 256, ["keys 0.25"], 1, unet=unet, steps=3)
    assert traces(unet) == before and calls.count(2) == 3 * 2  # timed; the others are single steps
    assert plain["steps"] == ours["steps"] == 3 and ours["ideal"] > 1


def test_caches_over_steps_are_for_whole_generations(monkeypatch, capsys):
    fields = {**UNET, **UP, "attention_head_dim": 2, "cross_attention_dim": 768}
    monkeypatch.setitem(diffusion_speed.MODELS, "sd15", fields)
    unet = diffusion_speed.make_unet("sd15", torch.device("cpu"), torch.float32)
    inner = "keys 0.25, inner layers every 2"
    _, cached, of_ours = diffusion_speed.measure("sd15", 256, ["DeepCache 3", inner], 1, unet=unet, steps=3)
    assert of_ours["cosine"] < 0.9999999 and "ideal" not in of_ours
    # Of generations: the first step of each is that of the plain UNet.
    assert cached["cosine"] < 0.9999999
    for more in (
        ["--methods", "DeepCache 3"],
        ["--methods", "blocks 0.25", "--full-every", "2"],
        ["--methods", "keys 0.25", "--inner-every", "2"],
        ["--methods", "keys 0.25, inner layers every 2"],
    ):
        monkeypatch.setattr(sys, "argv", ["diffusion_speed", *more])
        with pytest.raises(SystemExit):
            diffusion_speed.main()
        assert "whole generations" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["diffusion_speed", "--methods", "keys 0.2"])
    with pytest.raises(SystemExit):
        diffusion_speed.main()
    assert "'keys 0.2' is none of 'plain'" in capsys.readouterr().err


def test_compiled_unets_of_their_own_share_weights(monkeypatch):
    monkeypatch.setitem(diffusion_speed.MODELS, "sd15", {**UNET, **UP, "attention_head_dim": 2})
    unet = diffusion_speed.make_unet("sd15", torch.device("cpu"), torch.float32)
    graphs = []
    monkeypatch.setattr(torch, "compile", lambda twin, fullgraph, backend: graphs.append((twin, fullgraph)) or twin)
    rows = diffusion_speed.measure_compiled("sd15", 256, ["blocks 0.5", "ToDo 2"], 1, unet=unet)
    assert [row["method"] for row in rows] == ["plain", "blocks 0.5", "ToDo 2"] and rows[0]["speed_up"] == 1
    assert all(row["compile_s"] > 0 for row in rows) and [row.get("ideal", 0) > 1 for row in rows] == [
        False,
        True,
        False,
    ]
    assert rows[1]["share_of_ideal"] == pytest.approx(rows[1]["speed_up"] / rows[1]["ideal"])
    assert [fullgraph for _, fullgraph in graphs] == [True, True, False]
    assert {twin.conv_in.weight.data_ptr() for twin, _ in graphs} == {unet.conv_in.weight.data_ptr()}
    assert [ailurus_status(twin).active for twin, _ in graphs] == [False, True, False]


def test_ideal_is_what_torch_counts(monkeypatch):
    fields = {**UNET, **UP, "attention_head_dim": 2}
    monkeypatch.setitem(diffusion_speed.MODELS, "tiny", fields)
    unet = diffusion_speed.make_unet("tiny", torch.device("cpu"), torch.float32)
    step = diffusion_speed.inputs("tiny", 256, 1, 0)
    full = harness.model_flops(lambda: unet(**step))
    assert full == diffusion_speed.full_flops("tiny", 256, 1)
    mixed = {"levels": {2: {"scope": "attention", "reduce": "kv"}}, "projections": "merged", "cluster_per": "stack"}
    for way in ({}, {"projections": "merged"}, {"scope": "attention"}, {"scope": "attention", "reduce": "kv"}, mixed):
        apply_ailurus(unet, keep_ratio=0.25, min_tokens=256, **way)
        unet(**step)  # tables of the grid are made once, and are no part of a step
        computed = full - ailurus_status(unet).saved_flops
        counted = harness.model_flops(lambda: unet(**step))
        counted -= harness.model_flops(diffusion_speed.clustering_steps(unet))
        assert counted == pytest.approx(computed, rel=1e-3)
        assert counted < 0.9 * full


@pytest.mark.parametrize("freed_before", [False, True])
def test_peak_memory_sees_what_is_allocated(freed_before):
    # In a process of its own, which has held and freed nothing else before. What is held last keeps the rest resident.
    code = f"""
import torch
from benchmarks import harness
take, held = lambda: [torch.ones(2**16) for _ in range(512)], []
for _ in range(3 * {freed_before}):
    torch.ones(2**22)  # from then on smaller ones come from the heap, which keeps what is freed
    freed = take()
    held.append(torch.ones(2**14))
    del freed
print(harness.peak_bytes(take, torch.device("cpu")))
"""
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == "None\n" or 100 * 2**20 < int(printed) < 300 * 2**20


def test_todo_takes_every_other_key():
    torch.manual_seed(0)
    attn, tokens = Attention(16, heads=2, dim_head=8), torch.randn(1, 64, 16)
    got = ToDoProcessor(64, 2)(attn, tokens)
    grid = tokens.view(1, 8, 8, 16)
    assert any(
        torch.allclose(got, AttnProcessor2_0()(attn, tokens, grid[:, r::2, c::2].flatten(1, 2)), atol=1e-6)
        for r in (0, 1)
        for c in (0, 1)
    )
    # At half the latents' side the factor is 1: nothing is left out.
    torch.testing.assert_close(ToDoProcessor(256, 2)(attn, tokens), AttnProcessor2_0()(attn, tokens))
    with torch.no_grad():
        coarse = ToDoProcessor(256, 4)(attn, tokens)
    assert (coarse - AttnProcessor2_0()(attn, tokens)).abs().max() > 1e-4


def test_full_steps_beside_the_methods_that_take_them(monkeypatch):
    fields = {**UNET, **UP, "attention_head_dim": 2, "cross_attention_dim": 768}
    monkeypatch.setitem(diffusion_speed.MODELS, "sd15", fields)
    unet = diffusion_speed.make_unet("sd15", torch.device("cpu"), torch.float32)
    before = traces(unet)
    methods = diffusion_methods.with_full_steps(["plain", "keys 0.25", "blocks 0.25"], ["2", "4"])
    assert methods == ["plain", "keys 0.25", "blocks 0.25", "blocks 0.25, full every 2", "blocks 0.25, full every 4"]
    rows = diffusion_speed.measure("sd15", 256, methods[2:], 1, unet=unet, steps=4)
    assert traces(unet) == before
    ideal = {row["method"]: row.get("ideal") for row in rows}
    always, second, fourth = (1 - 1 / ideal[name] for name in methods[2:])
    assert 0 < second < 0.5 * always < fourth < 0.75 * always


def test_inner_layers_beside_what_is_reduced():
    unet = UNet2DConditionModel(**UNET, **UP, attention_head_dim=2)
    every = ["2", "3, first 5, extrapolated"]
    methods = diffusion_methods.with_full_steps(["keys 0.25", "DeepCache 3"], [], every)
    assert methods == ["keys 0.25", *(f"keys 0.25, inner layers every {k}" for k in every), "DeepCache 3"]
    for method, wanted in zip(methods[1:3], ((2, 0, False), (3, 5, True)), strict=True):
        assert diffusion_methods.is_ours(method) and diffusion_methods.counts_steps(method)
        off = diffusion_methods.switch_on(method, unet, 32 * 32, min_tokens=1)
        ((_, reducer),) = reducers_of(unet)
        config = reducer.config
        assert (config.inner_every, config.unreduced_first_steps, config.extrapolate) == wanted
        assert config.scope == "attention" and config.keep_ratio == 0.25
        off()
    assert not diffusion_methods.is_ours("DeepCache 3")


def test_full_steps_can_be_extrapolated():
    unet = UNet2DConditionModel(**UNET, **UP, attention_head_dim=2)
    every = ["3, extrapolated", "3, extrapolated, nothing between"]
    drawn_on, nothing = diffusion_methods.with_full_steps(["blocks 0.25"], every)[1:]
    for method, extrapolate in ((drawn_on, True), (nothing, True), ("blocks 0.25, full every 3", False)):
        off = diffusion_methods.switch_on(method, unet, 32 * 32, min_tokens=1)
        ((_, reducer),) = reducers_of(unet)
        assert reducer.config.full_every == 3 and reducer.config.extrapolate == extrapolate
        assert (reducer.config.between == "nothing") == (method == nothing)
        off()
