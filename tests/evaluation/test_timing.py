"""Turns, warm-up, contexts and medians of the timing loop; tables; hooks that leave no trace."""

import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from ailurus_hf.evaluation.timing import interleaved, markdown
from ailurus_hf.hooks import Hooks


def test_contenders_take_turns_and_warm_up_uncounted():
    turns = []

    def slow_at_first(number):
        turns.append(("a", number))
        time.sleep(0.5 if number == 0 else 0.01)

    times = interleaved({"a": slow_at_first, "b": lambda n: turns.append(("b", n))}, repeats=1, warmup=1)
    assert turns == [(name, n) for n in range(2) for name in "ab"]
    assert 0.01 <= times["a"] < 0.2 and times["b"] < 0.2


def test_what_is_switched_around_a_turn_is_not_timed():
    events = []

    @contextmanager
    def switched(name):
        events.append(f"{name} on")
        time.sleep(0.2)
        yield
        events.append(f"{name} off")

    runs = {name: (lambda _, name=name: events.append(f"{name} run")) for name in "ab"}
    times = interleaved(
        runs, repeats=1, warmup=0, around=switched, progress=lambda rounds: events.append(rounds) or rounds
    )
    assert events == [range(1), "a on", "a run", "a off", "b on", "b run", "b off"]
    assert max(times.values()) < 0.1


def test_an_unknown_cell_is_a_dash():
    rows = [{"a": 1.234, "b": None}, {"a": float("nan"), "b": "x"}]
    table = markdown(rows, {"a": "A|{:.1f}×", "b": "B"}).splitlines()
    assert table == ["| A | B |", "| --- | --- |", "| 1.2× | – |", "| – | x |"]


def test_hooks_are_taken_off_the_last_first():
    module, hooks, undone = nn.Linear(2, 2), Hooks(), []
    before = module(torch.ones(1, 2))
    hooks.pre_forward(module, lambda module, args, kwargs: ((2 * args[0],), kwargs))
    hooks.post_forward(module, lambda module, args, output: output + 1)
    hooks.post_forward(module, lambda module, args, kwargs, output: output * 0, prepend=True, with_kwargs=True)
    hooks.on_removal(lambda: undone.append("first"))
    hooks.on_removal(lambda: undone.append("second"))
    assert module(torch.ones(1, 2)).tolist() == [[1.0, 1.0]]
    hooks.remove()
    hooks.remove()
    assert undone == ["second", "first"]
    assert torch.equal(module(torch.ones(1, 2)), before)
    assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_cpu_has_nothing_to_wait_for(device):
    assert interleaved({"a": lambda n: n}, repeats=1, device=device).keys() == {"a"}
