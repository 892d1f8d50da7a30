"""The registry of methods: by name, how to reduce a model after layer L to a share of its tokens.

Ours and the controls take L and the keep ratio as they are, and so do the peers that reduce once (Expedite, CTM,
CubistMerge). The peers that reduce little by little (ToMe, PiToMe, EViT, ALGM), or attention alone (ACT, StructSAM),
have one knob instead: it is turned until the FLOPs on a few inputs are at most those of the paper's form at that L and
keep ratio, or as far as it goes. "NAME:key=value,…" sets a method's own settings; where that says the knob, nothing is
turned. Tables show the speed that came out.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

from torch import nn

from ailurus_hf import AiluRusConfig, AiluRusError, ailurus_status, remove_ailurus
from ailurus_hf.clustering import ClusterFunction, get_clustering
from ailurus_hf.vision.apply import install

from ..harness import model_flops
from ..peers import act, algm, ctm, cubistmerge, evit, expedite, pitome, structsam, tome
from ..peers.controls import grid_pooling, random_centers
from ..peers.hooks import Applied
from . import variants

# A call of the model on one input, without arguments.
Call = Callable[[], Any]
PAPER = "density peaks, copy (the paper)"
RESTORED = ("copy", "smooth", "residual")
OTHER_CLUSTERINGS = {"local k-means": "local_kmeans", "k-means": "kmeans", "pairs": "pairs", "Ward": "ward"}
# Halvings of a knob's range.
STEPS = 8


@dataclass(frozen=True)
class Amount:
    """After layer `location` `keep` of the tokens, after `restore_location` all tokens again (ours only)."""

    location: int
    keep: float
    restore_location: int | None = None


class AppliedMethod(Protocol):
    """A method that is on a model. `settings`: what it was given; the rest is of the last forward or of `run`."""

    settings: dict[str, Any]

    def num_clusters(self) -> int | None: ...

    def flops(self, full: int, run: Call) -> float: ...

    def undo(self) -> None: ...


@dataclass
class AppliedConfig:
    """`ailurus_hf` on a model."""

    model: nn.Module
    settings: dict[str, Any]

    def num_clusters(self) -> int | None:
        """After the last location."""
        return ailurus_status(self.model).locations[-1].num_clusters

    def flops(self, full: int, run: Call) -> float:
        """By the layers alone: what clustering costs is no part of the ideal. Of the last forward, or of `run`."""
        if ailurus_status(self.model).locations[0].flops is None:
            run()
        return full - ailurus_status(self.model).saved_flops

    def undo(self) -> None:
        remove_ailurus(self.model)


@dataclass
class AppliedPeer:
    """A peer on a model."""

    applied: Applied
    settings: dict[str, Any]

    def num_clusters(self) -> int | None:
        """Tokens after the last layer."""
        return self.applied.peers[0].token_counts[-1]

    def flops(self, full: int, run: Call) -> float:
        return model_flops(run)

    def undo(self) -> None:
        self.applied.undo()


@dataclass(frozen=True)
class Ours:
    """A config's clustering, or another instead, and how it unmerges. of_model: makes one from the model and L."""

    clustering: str
    restore: str
    control: ClusterFunction | None = None
    of_model: Callable[[nn.Module, int], ClusterFunction] | None = None
    takes_restore_location: bool = True

    def apply(self, model: nn.Module, amount: Amount, runs: Sequence[Call], given: dict[str, Any]) -> AppliedMethod:
        fields = {
            "cluster_location": amount.location,
            "keep_ratio": amount.keep,
            "clustering": self.clustering,
            "restore": self.restore,
            "restore_location": amount.restore_location,
        }
        if "num_clusters" in given:
            del fields["keep_ratio"]
        own = vars(get_clustering(self.clustering)).keys() & given.keys()
        if own:
            fields["clustering"] = {"name": self.clustering, **{name: given[name] for name in own}}
        config = AiluRusConfig(**{**fields, **{name: value for name, value in given.items() if name not in own}})
        control = self.control if self.of_model is None else self.of_model(model, config.locations[0])
        install(model, config, control)
        return AppliedConfig(model, config.to_dict())


@dataclass(frozen=True)
class Direct:
    """A peer whose settings follow from L, the keep ratio and the grid."""

    module: ModuleType
    settings: Callable[[Amount, tuple[int, int]], dict[str, Any]]
    takes_restore_location: bool = False

    def apply(self, model: nn.Module, amount: Amount, runs: Sequence[Call], given: dict[str, Any]) -> AppliedMethod:
        settings = {**self.settings(amount, token_grid(model, runs)), **given}
        return AppliedPeer(self.module.apply(model, **settings), settings)


@dataclass(frozen=True)
class Matched:
    """A peer with a knob: from 0 (nothing) to 1 (as much as there is) to its settings, given the number of tokens.

    adaptive: its FLOPs depend on what is in an image, and so are averaged over the runs.
    """

    module: ModuleType
    knob: Callable[[float, int], dict[str, Any]]
    fixed: dict[str, Any] = field(default_factory=dict)
    adaptive: bool = False
    takes_restore_location: bool = False

    def apply(self, model: nn.Module, amount: Amount, runs: Sequence[Call], given: dict[str, Any]) -> AppliedMethod:
        settings = {**self.fixed, **given}
        grid = token_grid(model, runs)
        turn = functools.partial(self.knob, num_tokens=math.prod(grid))
        if not turn(0.0).keys() & given.keys():
            runs = runs if self.adaptive else runs[:1]
            goal = flops_with(METHODS[PAPER], model, amount, runs[:1], {})
            settings |= self._turned(model, goal, runs, settings, turn)
        return AppliedPeer(self.module.apply(model, **settings), settings)

    def _turned(
        self, model: nn.Module, goal: float, runs: Sequence[Call], settings: dict[str, Any], turn: Callable
    ) -> dict[str, Any]:
        """The least turn whose FLOPs are at most the goal; all of it where none is."""
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            with self.module.apply(model, **settings, **turn(middle)):
                reached = sum(model_flops(run) for run in runs) / len(runs)
            low, high = (low, middle) if reached <= goal else (middle, high)
        return turn(high)


def flops_with(method: Any, model: nn.Module, amount: Amount, runs: Sequence[Call], given: dict[str, Any]) -> float:
    """Mean FLOPs of the runs with a method on; it is off again afterwards."""
    reduction = method.apply(model, amount, runs, given)
    try:
        return sum(model_flops(run) for run in runs) / len(runs)
    finally:
        reduction.undo()


def token_grid(model: nn.Module, runs: Sequence[Call]) -> tuple[int, int]:
    """The patch grid of the first run, seen by a peer that does nothing."""
    with tome.apply(model, r=0) as applied:
        runs[0]()
    height, width = applied.peers[0].grid
    return height, width


def _cells(amount: Amount, grid: tuple[int, int]) -> dict[str, Any]:
    """About keep · N cells of the grid's own shape."""
    cells = tuple(max(round(side * math.sqrt(amount.keep)), 1) for side in grid)
    return {"location": amount.location, "cells": cells}


def _share(amount: Amount, grid: tuple[int, int]) -> dict[str, Any]:
    return {"location": amount.location, "keep": amount.keep, "restore_at": "decoder"}


def _pairs(turn: float, num_tokens: int) -> dict[str, Any]:
    return {"r": round(turn * num_tokens / 2)}


# A decoder on tokens runs on the fewer ones wherever a method can, as in the paper's form; else more would have to be
# merged before it for the same FLOPs. "Last values" (EViT) and residuals are there before a decoder only.
METHODS: dict[str, Ours | Direct | Matched] = {
    PAPER: Ours("density_peaks", "copy"),
    **{f"density peaks, {restore}": Ours("density_peaks", restore) for restore in ("smooth", "residual")},
    **{
        f"{name}, {restore}": Ours(clustering, restore)
        for name, clustering in OTHER_CLUSTERINGS.items()
        for restore in RESTORED
    },
    "random centers, copy": Ours("density_peaks", "copy", random_centers),
    "random centers, residual": Ours("density_peaks", "residual", random_centers),
    "grid pooling, copy": Ours("density_peaks", "copy", grid_pooling),
    "grid pooling, residual": Ours("density_peaks", "residual", grid_pooling),
    "Expedite": Direct(expedite, _cells),
    "CTM": Direct(ctm, _share),
    "CubistMerge": Direct(cubistmerge, _cells),
    "ToMe": Matched(tome, _pairs, {"restore_at": "decoder"}),
    "ToMe, backbone": Matched(tome, _pairs),
    "EViT": Matched(evit, lambda turn, num_tokens: {"keep": 1 - 0.99 * turn}),
    "EViT, fused": Matched(
        evit, lambda turn, num_tokens: {"keep": 1 - 0.99 * turn}, {"restore": "fused", "restore_at": "decoder"}
    ),
    "PiToMe": Matched(pitome, lambda turn, num_tokens: {"keep": 1 - 0.5 * turn}, {"restore_at": "decoder"}),
    # One threshold for both locations, as the paper's models have it.
    "ALGM": Matched(algm, lambda turn, num_tokens: {"thresholds": (1 - turn**2, 1 - turn**2)}, adaptive=True),
    "ACT": Matched(act, lambda turn, num_tokens: {"interval": 10 ** (4 * turn - 1)}, adaptive=True),
    # Cells of 2 x 2 leave a quarter.
    "StructSAM": Matched(structsam, lambda turn, num_tokens: {"keep": 1 - 0.75 * turn}),
    "StructSAM, once": Direct(structsam, _share),
}
# Other ways to choose clusters (variants.py), to compare with: no benchmark runs them unasked.
VARIANTS: dict[str, Ours | Direct | Matched] = {
    **{f"{name}, {r}": Ours("density_peaks", r, c) for name, c in variants.CLUSTERINGS.items() for r in RESTORED},
    **{f"{n}, {r}": Ours("density_peaks", r, of_model=make) for n, make in variants.OF_MODEL.items() for r in RESTORED},
}
EVERY = {**METHODS, **VARIANTS}


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """The method's name and its settings in "NAME:key=value,…"; values as Python writes them, or words."""
    name, _, rest = text.partition(":")
    if name not in EVERY:
        raise AiluRusError(f"no method {name!r}: there are {', '.join(map(repr, EVERY))}")
    try:
        call = ast.parse(f"f({rest})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return name, {str(word.arg): _value(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise AiluRusError(f"settings of {name!r} must read key=value,key=value, got {rest!r}") from None


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def apply_method(model: nn.Module, text: str, amount: Amount, runs: Sequence[Call]) -> AppliedMethod:
    """Puts the method "NAME" or "NAME:key=value,…" on a model. runs: calls of that model, to match FLOPs on."""
    name, given = parsed(text)
    return EVERY[name].apply(model, amount, runs, given)
