"""The registry of methods for diffusion: by name, what reduces the networks of a pipeline, or one network alone.

"Keys": self-attention alone, of all tokens to fewer keys and values. "Of each stack", and where sizes are told apart:
each stack clusters its own tokens, every second step where nothing else is said; else the first stack of a resolution
clusters for the later ones, in every step. "K-means", "density peaks", "pairs", "Ward": these instead of local k-means,
every fourth step. "Halves apart": with and without the prompt, each has its own clusters. "All": tomesd merges
cross-attention and MLP too. The peers written from their papers are in diffusion_peers.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ailurus_hf import AiluRusDiffusionConfig, apply_ailurus, remove_ailurus

from ..peers.todo import ToDoProcessor
from ..peers.tomesd import merged_by_tomesd
from .diffusion_peers import PEERS, peers_of

# What tomesd merges beside self-attention.
PARTS: dict[str, dict[str, Any]] = {
    "": {},
    ", MLP": {"merge_mlp": True},
    ", cross": {"merge_crossattn": True},
    ", all": {"merge_mlp": True, "merge_crossattn": True},
}
# Arguments of tomesd.apply_patch.
TOMESD: dict[str, dict[str, Any]] = {
    f"tomesd {ratio}, max_downsample {most}{parts}": {"ratio": ratio, "max_downsample": most, **fields}
    for parts, fields in PARTS.items()
    for most in (1, 2)
    for ratio in (0.25, 0.5, 0.75)
}
# By how much keys are downsampled per side.
TODO = {"ToDo 2": 2, "ToDo 4": 4}

KEYS = {"scope": "attention", "reduce": "kv"}
RESOLUTIONS = {"cluster_per": "resolution"}
STACKS = {"cluster_per": "stack", "refresh_every": 2}
MIXED = {"levels": {1: {"scope": "attention", "reduce": "kv"}}, **STACKS}
# Keys far apart on the grid may share a cluster: self-attention looks everywhere, so their position matters little.
ANYWHERE = {"clustering": "kmeans", "cluster_per": "stack", "refresh_every": 4}
EVERY: dict[str, dict[str, Any]] = {
    "": {},
    ", every step": {"refresh_every": 1},
    ", every 4 steps": {"refresh_every": 4},
}
# Fields of AiluRusDiffusionConfig.
OURS: dict[str, dict[str, Any]] = {
    "all tokens": {"keep_ratio": 1.0},
    **{
        f"{name} {keep}": {"keep_ratio": keep, **fields}
        for name, (keeps, fields) in {
            "attention": ((0.5, 0.25), {"scope": "attention", **RESOLUTIONS}),
            "keys": ((0.5, 0.25), {**KEYS, **RESOLUTIONS}),
            "keys of each stack": ((0.25, 0.125), {**KEYS, **STACKS}),
            "blocks": ((0.5, 0.35, 0.25, 0.125), RESOLUTIONS),
            "blocks, every 4 steps": ((0.5, 0.35, 0.25, 0.125), {"refresh_every": 4, **RESOLUTIONS}),
            "blocks of each stack": ((0.5, 0.25), STACKS),
        }.items()
        for keep in keeps
    },
    **{
        f"blocks {keep}, {name}": {"keep_ratio": keep, **RESOLUTIONS, **fields}
        for name, fields in {
            "merged projections": {"projections": "merged"},
            "density peaks": {"clustering": "density_peaks"},
            "first 4 steps whole": {"unreduced_first_steps": 4},
        }.items()
        for keep in (0.5, 0.25)
    },
    "blocks of each stack 0.25, first 3 steps whole": {"keep_ratio": 0.25, "unreduced_first_steps": 3, **STACKS},
    **{
        f"{name}, k-means": {**fields, **ANYWHERE}
        for name, fields in {
            "attention 0.25 at full size": {"scope": "attention", "keep_ratio": {"largest": 0.25}},
            **{
                f"keys {keys} at full size": {**KEYS, "keep_ratio": {"largest": keys}}
                for keys in (0.125, 0.0625, 0.03125)
            },
            "keys 0.0625 at full size, 0.25 at half": {**KEYS, "keep_ratio": {1: 0.0625, 2: 0.25}},
        }.items()
    },
    **{
        f"keys {keys} at full size, {name}": {
            **KEYS,
            **ANYWHERE,
            "keep_ratio": {"largest": keys},
            "clustering": clustering,
        }
        for name, clustering in (("density peaks", "density_peaks"), ("pairs", "pairs"), ("Ward", "ward"))
        for keys in (0.25, 0.125)
    },
    **{
        f"{name}, halves apart": {**fields, "share_cfg": False}
        for name, fields in {
            "keys 0.03125 at full size, 0.25 at half": {**KEYS, **STACKS, "keep_ratio": {1: 0.03125, 2: 0.25}},
            "keys 0.0625 at full size, blocks 0.35 at half": {**MIXED, "keep_ratio": {1: 0.0625, 2: 0.35}},
            "keys 0.03125 at full size, merged projections 0.2 at half": {
                **MIXED,
                "keep_ratio": {1: 0.03125, 2: 0.2},
                "projections": "merged",
            },
        }.items()
    },
    **{
        f"keys {keys} at full size{every}": {"keep_ratio": {"largest": keys}, **KEYS, **STACKS, **steps}
        for every, steps in EVERY.items()
        for keys in (0.25, 0.125, 0.0625, 0.03125)
    },
    **{
        f"keys {keys} at full size, {half} at half{every}": {"keep_ratio": {1: keys, 2: keep}, **fields, **EVERY[every]}
        for half, (keep, fields) in {
            "0.5": (0.5, {**KEYS, **STACKS}),
            "0.25": (0.25, {**KEYS, **STACKS}),
            "blocks 0.5": (0.5, MIXED),
            "blocks 0.25": (0.25, MIXED),
            "blocks 0.125": (0.125, MIXED),
            "merged projections 0.125": (0.125, {**MIXED, "projections": "merged"}),
        }.items()
        for keys, every in ((0.0625, ""), (0.03125, ""), (0.03125, ", every 4 steps"))
    },
}
# Of transformers: in which block tokens are merged, and how many of its blocks run on all tokens.
OURS_OF_TRANSFORMERS: dict[str, dict[str, Any]] = {
    **{
        f"blocks {keep} after layer {layer}{every}": {"keep_ratio": keep, "cluster_location": layer, **EVERY[every]}
        for keep in (0.5, 0.25)
        for layer in (0, 1, 2, 4)
        for every in ("", ", every 4 steps")
    },
    **{
        f"attention {keep} after layer 1": {"keep_ratio": keep, "scope": "attention", "cluster_location": 1}
        for keep in (0.5, 0.25)
    },
    **{
        f"blocks {keep} after layer {layer}": {"keep_ratio": keep, "cluster_location": layer}
        for keep in (0.125, 0.0625)
        for layer in (0, 1)
    },
    **{
        f"blocks {keep} after layer {layer}, first 3 steps whole": {
            "keep_ratio": keep,
            "cluster_location": layer,
            "unreduced_first_steps": 3,
        }
        for keep, layer in ((0.25, 1), (0.0625, 1), (0.0625, 0))
    },
    **{
        f"blocks 0.25 after layer 1, {name}": {"keep_ratio": 0.25, "cluster_location": 1, **fields}
        for name, fields in {
            "Ward": {"clustering": "ward"},
            "density peaks": {"clustering": "density_peaks"},
            "first 4 steps whole": {"unreduced_first_steps": 4},
            "last 4 steps whole": {"unreduced_last_steps": 4},
            "more early": {"step_factors": (2, 1, 0.5)},
            "more late": {"step_factors": (0.5, 1, 2)},
        }.items()
    },
}
METHODS = ("plain", *TOMESD, *TODO, *peers_of("UNets"), *OURS)
METHODS_OF_TRANSFORMERS = ("plain", *peers_of("transformers"), *OURS_OF_TRANSFORMERS)
# Ends the name of a method of ours whose every k-th step runs on all tokens; k follows, and what may end it then.
FULL_EVERY = ", full every "
EXTRAPOLATED, NOTHING = ", extrapolated", ", nothing between"
# The same of the inner layers of UNets, with ", first N" for so many whole steps at the beginning.
INNER_EVERY, FIRST = ", inner layers every ", ", first "


def networks_of(target: Any) -> list[nn.Module]:
    """Transformer, or UNet and ControlNet, of a pipeline: given one, tomesd takes the UNet alone, and AiluRus both."""
    if isinstance(target, nn.Module):
        return [target]
    if hasattr(target, "transformer"):
        return [target.transformer]
    return [target.unet, *([target.controlnet] if hasattr(target, "controlnet") else [])]


def switch_on(name: str, target: Any, latent_tokens: int, **more: Any) -> Callable[[], Any]:
    """Switches a method on for a pipeline or network; returns the call that switches it off.

    latent_tokens: of the full grid. more: fields of AiluRusDiffusionConfig that go before ours.
    """
    if name == "plain":
        return lambda: None
    if name in TOMESD:
        return merged_by_tomesd(networks_of(target), **TOMESD[name])
    if name in TODO:
        offs = [_downsampled(network, latent_tokens, TODO[name]) for network in networks_of(target)]
        return lambda: [off() for off in offs]
    if name in PEERS:
        offs = [PEERS[name].on(network, latent_tokens) for network in networks_of(target)]
        return lambda: [off() for off in offs]
    apply_ailurus(target, **{**fields_of(name), **more})
    return lambda: remove_ailurus(target)


def fields_of(name: str) -> dict[str, Any]:
    """The fields of AiluRusDiffusionConfig of a method of ours."""
    ours = OURS | OURS_OF_TRANSFORMERS
    for ending, field in ((FULL_EVERY, "full_every"), (INNER_EVERY, "inner_every")):
        base, _, every = name.partition(ending)
        if not every:
            continue
        number, *_ = every.split(",")
        fields = {**ours[base], field: int(number), "extrapolate": EXTRAPOLATED in every}
        if NOTHING in every:
            fields["between"] = "nothing"
        if FIRST in every:
            fields["unreduced_first_steps"] = int(every.partition(FIRST)[2].split(",")[0])
        return fields
    return ours[name]


def without_ending(name: str) -> str:
    """What a method is called without "full every" or "inner layers every"."""
    return name.partition(FULL_EVERY)[0].partition(INNER_EVERY)[0]


def is_ours(name: str) -> bool:
    """Whether `fields_of` knows a method."""
    return without_ending(name) in OURS | OURS_OF_TRANSFORMERS


def method_of_unets(name: str) -> str:
    """Of the command line: one of METHODS, or one of ours with an ending of "full every" or "inner layers every"."""
    if name not in METHODS and without_ending(name) not in OURS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(map(repr, METHODS))}")
    return name


def method_of_any(name: str) -> str:
    """Of the command line: one of UNets, as `method_of_unets` takes them, or the same of transformers."""
    return name if name in METHODS_OF_TRANSFORMERS or is_ours(name) else method_of_unets(name)


def needs_pipeline(name: str) -> bool:
    """Whether a method of ours has to know how many steps a generation has, so that a network alone cannot take it."""
    return is_ours(name) and bool({"unreduced_last_steps", "step_factors"} & fields_of(name).keys())


def counts_steps(name: str) -> bool:
    """Whether a method does in a step what depends on which step of a generation it is, and gains over steps alone."""
    return FULL_EVERY in name or INNER_EVERY in name or (name in PEERS and PEERS[name].remembers)


def add_full_every(parser: argparse.ArgumentParser) -> None:
    """The option whose values `with_full_steps` takes."""
    words = 'beside ours, each K-th step on all tokens; also "K, extrapolated" and "K, extrapolated, nothing between"'
    parser.add_argument("--full-every", nargs="+", default=[], metavar="K", help=words)


def add_inner_every(parser: argparse.ArgumentParser) -> None:
    """The option whose values `with_full_steps` takes, of UNets alone."""
    words = 'beside ours, all layers in each K-th step; also "K, first N" and "K, first N, extrapolated"'
    parser.add_argument("--inner-every", nargs="+", default=[], metavar="K", help=words)


def with_full_steps(methods: Sequence[str], every: Sequence[str], inner: Sequence[str] = ()) -> list[str]:
    """The methods, and after each of ours that reduces whole blocks the same with every k-th step on all tokens.

    Args:
        methods: names.
        every: k each, as a user gives it: "3", "3, extrapolated", "3, nothing between", "3, extrapolated, nothing
            between".
        inner: after each of ours the same with all layers in every k-th step, of UNets: "3", "3, first 3",
            "3, first 3, extrapolated".
    """
    named, ours = [], OURS | OURS_OF_TRANSFORMERS
    for name in methods:
        reduces_blocks = name in ours and AiluRusDiffusionConfig(**ours[name]).has_scope("blocks")
        named += [name, *(f"{name}{FULL_EVERY}{steps}" for steps in every if reduces_blocks)]
        named += [f"{name}{INNER_EVERY}{steps}" for steps in inner if name in OURS]
    return named


def _downsampled(network: Any, latent_tokens: int, factor: int) -> Callable[[], Any]:
    before = dict(network.attn_processors)
    network.set_attn_processor(ToDoProcessor(latent_tokens, factor))
    return lambda: network.set_attn_processor(before)
