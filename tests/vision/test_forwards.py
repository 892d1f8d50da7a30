"""The state of a forward ends with it: also if it raises, in threads, and for layers that run again or alone."""

import copy
import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from every_model import EVERY, REDUCED, SOME
from models import images, make_model, predict
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from ailurus_hf import AiluRusError, ailurus_status, apply_ailurus, remove_ailurus
from ailurus_hf.per_thread import PerThread
from ailurus_hf.vision.apply import reducers_of
from ailurus_hf.vision.discovery import find_encoders

VIT = "ViTForImageClassification"
some_models = pytest.mark.parametrize("name", SOME)


class OutOfMemoryError(Exception):
    pass


def kept_by(model):
    """What the reducers of a model keep for this thread, by name."""
    return {
        name: value.get()
        for reducer in reducers_of(model)
        for name, value in vars(reducer).items()
        if isinstance(value, PerThread) and value.get() is not None
    }


@some_models
def test_a_forward_that_raises_leaves_nothing_and_the_next_is_right(name):
    every = EVERY[name]
    model, x = apply_ailurus(every.make(), **every.settings), every.images()
    called: list[nn.Module] = []
    watch = nn.modules.module.register_module_forward_pre_hook(lambda module, args: called.append(module))
    want = every.predict(model, x)
    watch.remove()
    middle = called.index(every.layer(model))
    for module, training in ((called[middle], True), (called[middle + 2], False), (called[-1], True)):
        given = []

        def fail(module, args, kwargs, given=given):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            given.extend(map(weakref.ref, tensors))
            raise OutOfMemoryError

        hook = module.register_forward_pre_hook(fail, with_kwargs=True)
        with pytest.raises(OutOfMemoryError):
            every.forward(model, x) if training else every.predict(model, x)
        hook.remove()
        if any(ref() is not None for ref in given):
            gc.collect()
        assert given and not kept_by(model) and all(ref() is None for ref in given)
        copy.deepcopy(model)
        assert torch.equal(every.predict(model, x), want)


def test_a_forward_that_raises_around_the_encoder_leaves_nothing():
    model, x = (
        apply_ailurus(make_model("Segmenter(ViT, mask transformer)"), **REDUCED, restore_at="decoder", restore="copy"),
        images(),
    )
    want = predict(model, "Segmenter(ViT, mask transformer)", x)
    with torch.no_grad():
        # The encoder alone has no decoder after it, and restores by itself.
        assert model.encoder(x, interpolate_pos_encoding=True).last_hidden_state.shape[1] == 97
    for module in (model.decoder, model.decoder.layers[1]):
        hook = module.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OutOfMemoryError()))
        with pytest.raises(OutOfMemoryError):
            model(x)
        hook.remove()
        assert not kept_by(model)
    assert torch.equal(predict(model, "Segmenter(ViT, mask transformer)", x), want)


CHECKPOINTED = (
    "ViTForImageClassification",
    "BeitModel",
    "Blip2VisionModel",
    "YOLOS(positions between layers)",
    "SegFormer",
)
SETTINGS = {name: [{}] for name in CHECKPOINTED}
SETTINGS["ViTForImageClassification"] = [
    {},
    {"cluster_location": (0, 2), "keep_ratio": (0.5, 0.25), "restore_location": 3},
    {"keep_ratio": 1.0},
]


def layers_of(model):
    found = [m for m in model.modules() if type(m).__name__ in ("SegformerLayer", "SegformerBlock")]
    return found or list(find_encoders(model)[0].layers)


def gradients(every, model, x):
    torch.manual_seed(1)
    out = every.forward(model, x)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    named = model.named_parameters()
    return {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in named if p.grad is not None}


@pytest.mark.parametrize("name, settings", [(name, each) for name in CHECKPOINTED for each in SETTINGS[name]])
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_checkpoints_around_layers_give_equal_gradients(name, settings, wrapped_first):
    every = EVERY[name]
    settings, x = {**every.settings, **settings}, every.images()
    want = gradients(every, apply_ailurus(every.make(), **settings), x.clone().requires_grad_())
    model = every.make()
    if not wrapped_first:
        apply_ailurus(model, **settings)
    wrapped_in_checkpoints(model, CheckpointImpl.NO_REENTRANT)
    if wrapped_first:
        apply_ailurus(model, **settings)
    got = gradients(every, model, x.clone().requires_grad_())
    assert got.keys() == want.keys()
    for parameter in want:
        torch.testing.assert_close(got[parameter], want[parameter], rtol=1e-4, atol=1e-5, msg=parameter)
    assert not kept_by(model)
    assert ailurus_status(model).locations[0].forwards == 1
    assert not ailurus_status(remove_ailurus(model)).active


def wrapped_in_checkpoints(model, implementation):
    chosen = {id(layer) for layer in layers_of(model)}
    wrap = partial(checkpoint_wrapper, checkpoint_impl=implementation)
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: id(module) in chosen)


def test_checkpoints_around_a_decoder_that_runs_on_representatives_give_equal_gradients():
    every, x = EVERY["Segmenter(ViT, mask transformer)"], images().requires_grad_()
    settings = {**every.settings, "restore_at": "decoder", "restore": "copy"}
    want = gradients(every, apply_ailurus(every.make(), **settings), x)
    model = apply_ailurus(every.make(), **settings)
    layers = {*find_encoders(model)[0].layers, *model.decoder.layers}
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=layers.__contains__)
    got = gradients(every, model, x)
    assert got.keys() == want.keys() and len(want) > 30
    for parameter in want:
        torch.testing.assert_close(got[parameter], want[parameter], rtol=1e-4, atol=1e-5, msg=parameter)


def test_a_reentrant_checkpoint_inside_is_an_error_and_around_hooks_is_right():
    # The unmerging adds to tokens that the checkpoint was not given, and so hands no gradient to.
    every, x = EVERY[VIT], images().requires_grad_()
    model = apply_ailurus(every.make(), **every.settings)
    wrapped_in_checkpoints(model, CheckpointImpl.REENTRANT)
    with pytest.raises(AiluRusError, match="reentrant checkpoint around the layers of ViTModel loses gradients"):
        gradients(every, model, x)
    want = gradients(every, apply_ailurus(every.make(), **every.settings), x)
    model = every.make()
    wrapped_in_checkpoints(model, CheckpointImpl.REENTRANT)
    got = gradients(every, apply_ailurus(model, **every.settings), x)
    for parameter in want:
        torch.testing.assert_close(got[parameter], want[parameter], rtol=1e-4, atol=1e-5, msg=parameter)


def test_a_loop_with_a_checkpoint_in_the_encoders_forward():
    model, x = make_model("ViTModel").train(), images()
    apply_ailurus(model, **REDUCED)
    model(x, interpolate_pos_encoding=True).last_hidden_state.sum().backward()
    want = model.layers[0].mlp.fc1.weight.grad.clone()
    model.zero_grad()
    for index, layer in enumerate(model.layers):
        model.layers[index].forward = partial(checkpoint, layer.forward, use_reentrant=False)
    model(x, interpolate_pos_encoding=True).last_hidden_state.sum().backward()
    torch.testing.assert_close(model.layers[0].mlp.fc1.weight.grad, want)


@pytest.mark.parametrize("name", [VIT, "Segmenter(ViT, mask transformer)", "SegFormer", "SAM"])
def test_switching_in_the_middle_of_another_threads_forward_is_an_error(name):
    every = EVERY[name]
    model, x = apply_ailurus(every.make(), **every.settings), every.images()
    want, got, both = every.predict(model, x), [], threading.Barrier(2, timeout=60)
    hook = every.layer(model).register_forward_hook(lambda *_: [both.wait(), both.wait(), None][2])
    thread = threading.Thread(target=lambda: got.append(every.predict(model, x)))
    thread.start()
    both.wait()
    for switch in (remove_ailurus, lambda m: apply_ailurus(m, cluster_location=1, keep_ratio=0.5)):
        with pytest.raises(AiluRusError, match="another thread is in the middle of a forward"):
            switch(model)
    both.wait()
    thread.join()
    hook.remove()
    assert torch.equal(got[0], want) and torch.equal(every.predict(model, x), want)
    remove_ailurus(model)


@torch.no_grad()
def test_layers_called_without_their_encoder_are_one_clear_error():
    model, x = apply_ailurus(make_model(VIT), **REDUCED), images()
    want = predict(model, VIT, x)
    hidden = model.vit.embeddings(x, interpolate_pos_encoding=True)
    hidden = model.vit.layers[0](hidden)  # before the location nothing is reduced
    for layer in model.vit.layers[1:]:
        with pytest.raises(AiluRusError, match=r"of ViTModel \(ViTLayer\) was called outside of a forward of ViTModel"):
            layer(hidden)
    stages = EVERY["SegFormer"]
    segformer = apply_ailurus(stages.make(), **stages.settings)
    stage = [m for m in segformer.modules() if type(m).__name__ == "SegformerStage"][2]
    for block in stage.blocks[1:]:
        with pytest.raises(AiluRusError, match="outside of a forward of stage 3 of SegFormer"):
            block(torch.randn(1, 60, 32), 6, 10)
    assert torch.equal(predict(model, VIT, x), want)
    remove_ailurus(model).vit.layers[2](hidden)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [VIT, "SegFormer", "SAM"])
def test_what_traces_by_running_is_refused(name):
    every = EVERY[name]
    model = apply_ailurus(every.make(), **every.settings)
    with pytest.raises(
        AiluRusError, match=r"torch.jit.trace.*use torch.export.export, or torch.onnx.export\(..., dynamo=True\)"
    ):
        torch.jit.trace(model, every.images(), strict=False)
