"""torch.compile is never silently plain: on, changed and off, before and after compiling, whole or layer by layer.

A few of all models, as each compiles for seconds; AILURUS_TEST_EVERY=1 tests them all, with either attention.
"""

import copy
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from every_model import EVERY
from models import CASES, SIZES, images
from torch._dynamo.testing import CompileCounter
from transformers import ViTConfig, ViTModel

from ailurus_hf import apply_ailurus, remove_ailurus
from ailurus_hf.vision.discovery import find_encoders

# Attention that takes the bias as its mask, by adapters, in place of a mask, by its probabilities; stages; windows.
NAMES = ("ViTForImageClassification", "BeitModel", "Data2VecVisionModel", "BlipVisionModel", "SegFormer", "SAM")
WAYS = [(name, "sdpa") for name in NAMES] + [("ViTForImageClassification", "eager")]
if os.environ.get("AILURUS_TEST_EVERY"):
    WAYS = [(name, attention) for name in EVERY for attention in ("sdpa", "eager")]
with_attention = pytest.mark.parametrize("name, attention", WAYS)
# Of models whose layers are in stages.
STAGE_LAYERS = ("SegformerLayer", "SegformerBlock", "SamVisionLayer", "VitDetLayer")


def whole(model, fullgraph):
    return torch.compile(model, backend="eager", fullgraph=fullgraph)


def layer_by_layer(model, fullgraph):
    found = [module for module in model.modules() if type(module).__name__ in STAGE_LAYERS]
    found = found or [layer for encoder in find_encoders(model) for layer in encoder.layers]
    assert len(found) >= 4
    for module in found:
        # transformers' own hooks, for hidden states, do not compile.
        has_hooks = any(part._forward_hooks for part in module.modules())
        module.compile(backend="eager", fullgraph=fullgraph and not has_hooks)
    return model


def made(name, attention):
    every = EVERY[name]
    model, x = every.make(), every.images()
    if attention == "eager":
        model.set_attn_implementation("eager")
    # transformers puts hooks of its own on in the first forward, under a lock that does not compile.
    every.predict(model, x)
    return every, model, x


def agree(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@with_attention
@pytest.mark.parametrize("compiled_by", [whole, layer_by_layer])
def test_on_changed_and_off_before_and_after_compiling(name, attention, compiled_by):
    every, model, x = made(name, attention)
    torch.compiler.reset()
    # Grids that are given as tensors, as SigLIP 2's, are read between two graphs.
    fullgraph = name not in CASES or CASES[name].compiles
    other = compiled_by(copy.deepcopy(model), fullgraph)
    every.predict(other, x)  # a plain model of the class, compiled before
    eager = copy.deepcopy(model)
    compiled, outputs = compiled_by(model, fullgraph), []
    for settings in (None, {"keep_ratio": 0.25}, None, {"keep_ratio": 0.5}):
        for each in (model, eager):
            if settings is None:
                remove_ailurus(each)
            else:
                apply_ailurus(each, cluster_location=1, **settings)
        outputs.append(every.predict(compiled, x))
        agree(outputs[-1], every.predict(eager, x))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3 * outputs[0].abs().max()
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[1], outputs[3])


@pytest.mark.parametrize("name", ("ViTForImageClassification", "BeitModel", "BlipVisionModel"))
def test_layers_wrapped_by_the_compiler_before(name):
    every, model, x = made(name, "sdpa")
    want = every.predict(apply_ailurus(copy.deepcopy(model), cluster_location=1, keep_ratio=0.25), x)
    for module in list(model.modules()):
        if isinstance(module, torch.nn.ModuleList):
            for index, layer in enumerate(module):
                if type(layer).__name__ in ("ViTLayer", "BeitLayer", "BlipEncoderLayer"):
                    module[index] = torch.compile(layer, backend="eager")
    plain = every.predict(model, x)
    apply_ailurus(model, cluster_location=1, keep_ratio=0.25)
    agree(every.predict(model, x), want)
    agree(every.predict(remove_ailurus(model), x), plain)


@torch.no_grad()
def test_layers_of_one_kind_share_what_was_compiled():
    model, x = ViTModel(ViTConfig(**{**SIZES, "num_hidden_layers": 9})).eval(), images()
    model(x, interpolate_pos_encoding=True)
    torch.compiler.reset()
    counter = CompileCounter()
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    apply_ailurus(model, cluster_location=2, keep_ratio=0.5)
    counts = []
    for _ in range(3):
        model(x, interpolate_pos_encoding=True)
        counts.append(counter.frame_count)
    # Layers on all tokens, layers on representatives, merging, the bias, unmerging; nothing for each of nine layers.
    assert counts[0] <= 5 and counts[1:] == counts[:2]


@pytest.mark.parametrize("name", ("ViTForImageClassification", "BeitModel"))
def test_threads_share_a_compiled_model(name):
    every = EVERY[name]
    model = apply_ailurus(every.make(), cluster_location=1, keep_ratio=0.25)
    inputs = [every.images() + seed for seed in range(4)]
    want = [every.predict(model, x) for x in inputs]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda number: every.predict(compiled, inputs[number % 4]), range(24)))
    for number, output in enumerate(got):
        agree(output, want[number % 4])
    assert not torch.allclose(want[0], want[1], rtol=1e-2)
