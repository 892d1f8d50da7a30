"""The registry of others' methods for diffusion that are written here from their papers, by name.

ToMA: the share of tokens kept; around self-attention alone, or also around cross-attention and MLP ("all"). SiTo: the
share left out. ClusCa, DeepCache and TaylorSeer: each how many steps are full. FirstBlockCache: its threshold.
Controls: whole blocks as ours, on tokens drawn at random, or for speed alone on the first ones; "reuse": as many full
steps as ours, and nothing computed between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ailurus_hf import AiluRusDiffusionConfig, remove_ailurus
from ailurus_hf.diffusion.apply import install
from ailurus_hf.diffusion.stacks import find_stacks

from ..peers.clusca import ClusCa
from ..peers.controls import random_centers
from ..peers.sito import SiTo
from ..peers.slicing import slice_layers
from ..peers.step_cache import deep_cache, first_block_cache, reuse, taylorseer
from ..peers.toma import ToMA

# On one network, for which the number of image tokens at full size is given; returns the call that undoes it.
On = Callable[[nn.Module, int], Callable[[], Any]]


@dataclass(frozen=True)
class DiffusionPeer:
    """on: what switches it on. networks: "UNets", "transformers" or both. remembers: it gains over steps alone."""

    on: On
    networks: tuple[str, ...] = ("UNets", "transformers")
    remembers: bool = False


def _toma(network: Any, tokens: int, keep: float, modules: tuple[str, ...], levels: int = 1) -> Callable[[], None]:
    sizes = [tokens // 4**level for level in range(levels)]
    return ToMA(network, keep, sizes, modules=modules).hooks.remove


def _sito(network: Any, tokens: int, prune: float) -> Callable[[], None]:
    return SiTo(network, prune, [tokens]).hooks.remove


def _clusca(network: Any, tokens: int, every: int) -> Callable[[], None]:
    return ClusCa(network, every).hooks.remove


def _deep_cache(network: Any, tokens: int, every: int) -> Callable[[], None]:
    # A ControlNet runs whole: it has no way up whose last layer could go on from what is kept.
    return deep_cache(network, every) if hasattr(network, "up_blocks") else lambda: None


def _first_block_cache(network: Any, tokens: int, threshold: float) -> Callable[[], None]:
    return first_block_cache(network, threshold)


def _taylorseer(network: Any, tokens: int, every: int) -> Callable[[], None]:
    return taylorseer(network, every)


def _reuse(network: Any, tokens: int, every: int) -> Callable[[], None]:
    return reuse(network, every)


def _random(network: Any, tokens: int, keep: float) -> Callable[[], Any]:
    config = AiluRusDiffusionConfig(keep_ratio=keep, cluster_per="stack", min_tokens=max(1, tokens // 4))
    install(network, config, random_centers)
    return lambda: remove_ailurus(network)


def _slicing(network: Any, tokens: int, keep: float) -> Callable[[], None]:
    blocks = [block for stack in find_stacks(network) for block in stack.blocks]
    return slice_layers(blocks, {size: round(keep * size) for size in (tokens, tokens // 4)}).remove


ATTENTION, ALL = ("attn", "attn1"), ("attn", "attn1", "attn2", "ff")
UNETS, TRANSFORMERS = ("UNets",), ("transformers",)
PEERS: dict[str, DiffusionPeer] = {
    **{f"ToMA {keep}": DiffusionPeer(partial(_toma, keep=keep, modules=ATTENTION)) for keep in (0.5, 0.25)},
    **{f"ToMA {keep}, all": DiffusionPeer(partial(_toma, keep=keep, modules=ALL)) for keep in (0.5, 0.25)},
    **{
        f"ToMA {keep}, all, half size too": DiffusionPeer(partial(_toma, keep=keep, modules=ALL, levels=2), UNETS)
        for keep in (0.5, 0.25)
    },
    **{f"SiTo {prune}": DiffusionPeer(partial(_sito, prune=prune), UNETS) for prune in (0.5, 0.7)},
    **{f"DeepCache {every}": DiffusionPeer(partial(_deep_cache, every=every), UNETS, True) for every in (2, 3, 5)},
    **{f"ClusCa {every}": DiffusionPeer(partial(_clusca, every=every), TRANSFORMERS, True) for every in (2, 3, 5)},
    **{
        f"FirstBlockCache {threshold}": DiffusionPeer(
            partial(_first_block_cache, threshold=threshold), TRANSFORMERS, True
        )
        for threshold in (0.05, 0.1, 0.2)
    },
    **{
        f"TaylorSeer {every}": DiffusionPeer(partial(_taylorseer, every=every), TRANSFORMERS, True)
        for every in (2, 3, 5)
    },
    **{f"reuse {every}": DiffusionPeer(partial(_reuse, every=every), TRANSFORMERS, True) for every in (2, 3, 4, 5)},
    **{f"random representatives {keep}": DiffusionPeer(partial(_random, keep=keep)) for keep in (0.5, 0.25)},
    **{f"slicing {keep}": DiffusionPeer(partial(_slicing, keep=keep), UNETS) for keep in (0.5, 0.25)},
}


def peers_of(networks: str) -> tuple[str, ...]:
    """The names of those for "UNets" or "transformers"."""
    return tuple(name for name, peer in PEERS.items() if networks in peer.networks)
