"""Undo belongs to the object that was changed: copies, pickles, averaged models, shared configs, other attention."""

import copy
import io
import pickle

import pytest
import torch
from every_model import EVERY, SOME
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ailurus_hf import ailurus_status, apply_ailurus, remove_ailurus

every_model = pytest.mark.parametrize("name", EVERY)
some_models = pytest.mark.parametrize("name", SOME)


def made(name):
    every = EVERY[name]
    model, x = every.make(), every.images()
    return every, model, x, every.predict(model, x)


@every_model
def test_removing_from_a_copy_leaves_the_original_reduced(name):
    every, model, x, plain = made(name)
    reduced = every.predict(apply_ailurus(model, **every.settings), x)
    assert not torch.equal(reduced, plain)
    twin = remove_ailurus(copy.deepcopy(model))
    assert torch.equal(every.predict(twin, x), plain) and not ailurus_status(twin).active
    assert torch.equal(every.predict(model, x), reduced) and ailurus_status(model).active
    assert torch.equal(every.predict(remove_ailurus(model), x), plain)


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@some_models
@pytest.mark.parametrize("through", [saved_and_loaded, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_pickled_model_is_reduced_and_on_its_own(name, through):
    every, model, x, plain = made(name)
    reduced = every.predict(apply_ailurus(model, **every.settings), x)
    # Hooks that transformers itself places in some models' first forward cannot be pickled.
    fresh = apply_ailurus(every.make(), **every.settings)
    loaded = through(fresh)
    assert torch.equal(every.predict(loaded, x), reduced)
    assert torch.equal(every.predict(remove_ailurus(loaded), x), plain)
    assert torch.equal(every.predict(fresh, x), reduced)


@some_models
def test_an_average_of_weights_is_reduced_as_the_model(name):
    every, model, x, _ = made(name)
    reduced = every.predict(apply_ailurus(model, **every.settings), x)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(every.predict(average.module, x), reduced)


@pytest.mark.parametrize("name", [name for name in SOME if name not in ("VitDet", "SAM")])
def test_two_models_on_one_config_object(name):
    every, model, x, plain = made(name)
    other = copy.deepcopy(model)
    own = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for module, twin in zip(model.modules(), other.modules(), strict=True):
        if hasattr(module, "config"):
            twin.config = own[id(module.config)]
    for m in (model, other):
        apply_ailurus(m, **every.settings)
    reduced = every.predict(other, x)
    assert torch.equal(every.predict(remove_ailurus(model), x), plain)
    assert torch.equal(every.predict(other, x), reduced) and not torch.equal(reduced, plain)
    assert torch.equal(every.predict(remove_ailurus(other), x), plain)


@pytest.mark.parametrize("name", [name for name in SOME if "Data2Vec" not in name and name not in ("VitDet", "SAM")])
def test_another_attention_after_it_was_switched_on(name):
    every, model, x, plain = made(name)
    reduced = every.predict(apply_ailurus(model, **every.settings), x)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        got = every.predict(model, x)
        torch.testing.assert_close(got, reduced, rtol=1e-4, atol=1e-4 * reduced.abs().max().item())
    model.set_attn_implementation("eager")
    remove_ailurus(model)
    torch.testing.assert_close(every.predict(model, x), plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    assert model.config._attn_implementation == "eager"


def test_the_config_says_what_the_model_was_made_with():
    every, model, _, _ = made("ViTForImageClassification")
    before = model.config._attn_implementation
    apply_ailurus(model, **every.settings)
    assert model.config._attn_implementation == before == type(model)(model.config).config._attn_implementation


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchao's successor is a package of its own
def test_a_quantized_model_has_a_status():
    every, model, x, _ = made("ViTForImageClassification")
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    want = apply_ailurus(model, **every.settings)
    every.predict(want, x)
    apply_ailurus(quantized, **every.settings)
    every.predict(quantized, x)
    (row,), (expected,) = ailurus_status(quantized).locations, ailurus_status(want).locations
    assert row.flops == expected.flops and row.flops_saved == expected.flops_saved
    for layer in model.vit.layers:
        layer.mlp = layer.attention = nn.Identity()
    assert ailurus_status(model).locations[0].flops is None and "–" in str(ailurus_status(model))
