"""Hooks are undone on the object that has them, copies included; the compiler sees them; values are per thread."""

import copy
import pickle
import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from ailurus_hf.hooks import Hooks
from ailurus_hf.per_thread import PerThread


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_hooks_lie_in_the_order_in_which_they_run():
    # torch.compile reads them as a plain dict, in which moving one to the front moves nothing.
    layer, hooks = Layer(), Hooks()
    layer.register_forward_hook(lambda *_: None)
    hooks.post_forward(layer, lambda *_: None, prepend=True)
    assert list(dict.keys(layer._forward_hooks)) == list(layer._forward_hooks)
    hooks.remove()
    assert len(layer._forward_hooks) == 1


class Doubling:
    """Doubles what the later layers (or their linear layers) are given, by a factor that the model's pre-hook sets."""

    def __init__(self, model, factor=2.0, inside=False):
        self.hooks, self.state, self.factor = Hooks(), PerThread(), factor
        self.hooks.pre_forward(model, self.begin)
        for layer in model.layers[2:]:
            self.hooks.pre_forward(layer.linear if inside else layer, self.enter)
        self.hooks.post_forward(model, self.end, always_call=True)

    def begin(self, module, args, kwargs):
        self.state.set([self.factor])

    def enter(self, module, args, kwargs):
        return (self.state.get()[0] * args[0],), kwargs

    def end(self, module, args, output):
        self.state.pop()


def whole(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def layer_by_layer(model):
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    return model


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("compiled_by", [whole, layer_by_layer])
def test_a_compiled_model_sees_hooks_come_change_and_go(compiled_by, inside):
    x = torch.randn(2, 4)
    other = compiled_by(Model())
    other(x)  # a plain network of the same class, compiled before
    model = Model()
    compiled = compiled_by(model)
    for factor in (None, 2.0, None, 3.0, 2.0):
        twin = copy.deepcopy(model)
        hooks = [Doubling(m, factor, inside).hooks for m in (model, twin) if factor]
        other(x)
        torch.testing.assert_close(compiled(x), twin(x))
        for each in hooks:
            each.remove()


@pytest.mark.parametrize("inside", [False, True])
def test_two_compiled_models_of_one_class_keep_their_own_hooks(inside):
    x, models = torch.randn(2, 4), [Model() for _ in range(3)]
    Doubling(models[1], 2.0, inside)
    Doubling(models[2], 3.0, inside)
    want = [model(x) for model in models]
    for model, expected in zip(models, want, strict=True):
        torch.testing.assert_close(whole(model)(x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_undoes_what_was_done_to_the_copy(copied):
    x, model = torch.randn(2, 4), Model()
    plain = model(x)
    model.doubling = Doubling(model)
    model.doubling.hooks.replace(model, "name", "reduced")
    model.doubling.hooks.replace_method(model.layers[0], "forward", Negative())
    reduced = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), reduced) and not torch.equal(reduced, plain)
    twin.doubling.hooks.remove()
    assert torch.equal(twin(x), plain) and torch.equal(model(x), reduced)
    assert not hasattr(twin, "name") and model.name == "reduced"
    model.doubling.hooks.remove()
    assert torch.equal(model(x), plain) and "forward" not in vars(model.layers[0])


class Negative:
    def __call__(self, original, x):
        return -original(x)


@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize("unwrapped_first", [False, True])
def test_a_replaced_forward_leaves_the_wrapper_of_accelerate(wrapped_first, unwrapped_first):
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Counting.calls += 1
            return args, kwargs

    layer, x, hooks = Layer(), torch.randn(2, 4), Hooks()
    plain = layer(x)
    steps = [
        lambda: add_hook_to_module(layer, Counting()),
        lambda: hooks.replace_method(layer, "forward", Negative()),
    ]
    for step in steps if wrapped_first else reversed(steps):
        step()
    assert torch.equal(layer(x), -plain) and Counting.calls == 1
    if unwrapped_first:
        remove_hook_from_module(layer)
        assert torch.equal(layer(x), -plain) and Counting.calls == 1
    hooks.remove()
    assert torch.equal(layer(x), plain) and Counting.calls == (1 if unwrapped_first else 2)


def test_a_wrapper_that_nobody_knows_calls_the_original_once_undone():
    layer, x, hooks = Layer(), torch.randn(2, 4), Hooks()
    plain = layer(x)
    hooks.replace_method(layer, "forward", Negative())
    inner = layer.forward
    layer.forward = lambda x: inner(x)
    hooks.remove()
    assert torch.equal(layer(x), plain)


def test_a_value_for_each_thread_that_copies_do_not_have():
    state = PerThread()
    state.set("mine")
    seen, both = [], threading.Barrier(2, timeout=30)

    def work():
        seen.append(state.get())
        state.set("theirs")
        both.wait()
        both.wait()

    thread = threading.Thread(target=work)
    thread.start()
    both.wait()
    assert state.get() == "mine" and state.is_busy_elsewhere()
    both.wait()
    thread.join()
    assert seen == [None] and not state.is_busy_elsewhere()  # what a thread leaves dies with it
    assert copy.deepcopy(state).get() is None and pickle.loads(pickle.dumps(state)).get() is None
    assert state.pop() == "mine" and state.get() is None
