"""Layers that hand nothing on to their attention, as DINOv2's up to transformers 5.17: reduced as those that do."""

import pytest
import torch
from models import CASES, enable_checkpointing, images_for, make_model
from traces import traces

from ailurus_hf import apply_ailurus, remove_ailurus

NAME = "Dinov2Model"
SETTINGS = {"cluster_location": 1, "keep_ratio": 0.3}


def without_arguments(model):
    """Its layers take hidden states alone."""
    for layer in model.encoder.layer if hasattr(model.encoder, "layer") else model.layers:
        kind = type(layer)
        body = {"forward": lambda self, hidden_states, kind=kind: kind.forward(self, hidden_states)}
        layer.__class__ = type("HandsNothingOn", (kind,), body)
    return model


def predict(model, x):
    with torch.no_grad():
        return CASES[NAME].prediction(model(x))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_they_are_reduced_as_layers_that_hand_it_on(attention):
    x, outputs = images_for(NAME), []
    for changed in (False, True):
        model = make_model(NAME)
        model.set_attn_implementation(attention)
        model = without_arguments(model) if changed else model
        plain, before = predict(model, x), traces(model)
        apply_ailurus(model, **SETTINGS)
        outputs.append(predict(model, x))
        assert not torch.equal(outputs[-1], plain)
        remove_ailurus(model)
        assert torch.equal(predict(model, x), plain) and traces(model) == before
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_checkpoints_find_the_bias_again():
    gradients = []
    for checkpointing in (False, True):
        model = apply_ailurus(without_arguments(make_model(NAME)), **SETTINGS).train()
        if checkpointing:
            enable_checkpointing(model)
        CASES[NAME].prediction(model(images_for(NAME))).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for got, want in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, want)


def test_a_forward_that_raises_leaves_no_bias():
    model, x = apply_ailurus(without_arguments(make_model(NAME)), **SETTINGS), images_for(NAME)
    reduced = predict(model, x)
    broken = [m for m in model.modules() if type(m).__name__ == "HandsNothingOn"][-1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
    )
    with pytest.raises(RuntimeError, match="stop"):
        predict(model, x)
    broken.remove()
    assert torch.equal(predict(model, x), reduced)
