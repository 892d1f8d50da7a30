"""Layers that hand nothing on to their attention, as DINOv2's up to transformers 5.17: reduced as those that do.

With gradient checkpointing they are tested in test_behaviors.py where transformers is that old: its layers then run
their hooks once more, today's do not.
"""

import pytest
import torch
from models import CASES, images_for, make_model
from traces import traces

from ailurus_hf import apply_ailurus, remove_ailurus

NAME = "Dinov2Model"
SETTINGS = {"cluster_location": 1, "keep_ratio": 0.3}


def without_arguments(model):
    """Its layers take hidden states alone."""
    for layer in model.encoder.layer if hasattr(model, "encoder") and hasattr(model.encoder, "layer") else model.layers:
        layer.__class__ = hands_nothing_on(type(layer))
    return model


def hands_nothing_on(kind):
    class HandsNothingOn(kind):
        # The encoder hands over a mask that is None; no argument of that name is there to take it.
        def forward(self, hidden_states, nothing=None):
            return kind.forward(self, hidden_states)

    return HandsNothingOn


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
