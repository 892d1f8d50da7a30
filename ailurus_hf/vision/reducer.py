"""EncoderReducer: the hooks that run an encoder's later layers on representatives and unfold the result.

One forward goes: encoder pre-hook (a new Run) -> layers up to L as they are -> pre-hook of layer L (cluster, merge) ->
each later layer gets the count bias as its attention mask -> restored after the last layer, at `restore_location`, or
after the token decoder. Layers receive everything by argument, so that gradient checkpointing recomputes the same.
"""

from __future__ import annotations

import math
import operator
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..clustering import Clustering
from ..clusters import TokenClusters
from ..config import AiluRusConfig
from ..errors import AiluRusError
from ..status import Record
from .backend import attention_configs, attention_mask_position, restore_attention, use_ailurus_attention
from .families import FoundEncoder


@dataclass
class Run:
    """What one forward carries from hook to hook.

    tokens, merged: the patch tokens at L before and after merging, Tensor[B, N, C] and [B, M, C]; None where not needed.
    """

    grid: tuple[int, ...]
    num_clusters: int
    clusters: TokenClusters | None = None
    tokens: Tensor | None = None
    merged: Tensor | None = None


@dataclass
class EncoderReducer:
    """Hooks on one encoder (and its token decoder). `install` puts them there, `remove` takes all of them away."""

    found: FoundEncoder
    config: AiluRusConfig
    clustering: Clustering
    record: Record = field(default_factory=Record)
    handles: list[RemovableHandle] = field(default_factory=list)
    previous_attention: list[tuple[Any, str]] = field(default_factory=list)
    # One model may run in several threads at once, so each has a Run of its own.
    runs: dict[int, Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        depth = len(self.found.layers)
        name = type(self.found.encoder).__name__
        if self.config.cluster_location >= depth:
            raise AiluRusError(
                f"cluster_location {self.config.cluster_location} leaves none of the {depth} layers of {name} to run "
                f"on fewer tokens: use 0 to {depth - 1}"
            )
        if self.config.restore_location is not None and self.config.restore_location > depth:
            raise AiluRusError(
                f"restore_location {self.config.restore_location} is past the {depth} layers of {name}: "
                f"use {self.config.cluster_location + 1} to {depth}"
            )
        self.restore_location = self.config.restore_location or depth
        self.through_decoder = self.config.restores_after_decoder and self.found.decoder is not None
        # Checked before the first hook is placed, so that an error leaves nothing half-applied.
        self.mask_position = attention_mask_position(self.found.layers[0])
        self.decoder_mask_position = 0
        if self.found.decoder_layers:
            self.decoder_mask_position = attention_mask_position(self.found.decoder_layers[0])

    def install(self) -> None:
        encoder, layers = self.found.encoder, self.found.layers
        first, last = self.config.cluster_location, self.restore_location
        self._pre_hook(encoder, self.begin)
        self._pre_hook(layers[first], self.merge)
        for layer in layers[first:last]:
            self._pre_hook(layer, self.add_bias)
        if not self.through_decoder:
            # Prepended, so that hooks that were there before see all N tokens.
            self.handles.append(layers[last - 1].register_forward_hook(self.restore, prepend=True))
        self.handles.append(encoder.register_forward_hook(self.finish_encoder))
        reduced_layers = list(layers[first:last])
        if self.through_decoder:
            assert self.found.decoder is not None
            for layer in self.found.decoder_layers:
                self._pre_hook(layer, self.add_decoder_bias)
            self.handles.append(self.found.decoder.register_forward_hook(self.finish_decoder))
            reduced_layers += self.found.decoder_layers
        self.previous_attention = use_ailurus_attention(attention_configs(reduced_layers))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        restore_attention(self.previous_attention)
        self.previous_attention = []

    # Hooks, in the order in which a forward meets them.

    def begin(self, encoder: nn.Module, args: tuple, kwargs: dict) -> None:
        pixel_values = args[0] if args else kwargs.get("pixel_values")
        if not isinstance(pixel_values, Tensor):
            raise AiluRusError(f"{type(encoder).__name__} was called without pixel_values")
        if kwargs.get("attention_mask") is not None:
            raise AiluRusError("a 2-D attention_mask cannot follow merged tokens: call the model without one")
        # Plain numbers also where torch.compile would keep sizes symbolic.
        grid = tuple(operator.index(side) for side in self.found.family.grid(encoder, pixel_values))
        self.runs[_thread()] = Run(grid, self.config.clusters_for(math.prod(grid)))

    def merge(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        run = self.runs[_thread()]
        hidden_states = args[0]
        prefix, tokens = self._split(hidden_states)
        num_tokens = math.prod(run.grid)
        if tokens.shape[1] != num_tokens:
            raise AiluRusError(f"grid {run.grid} has {num_tokens} places, but there are {tokens.shape[1]} tokens")
        if run.num_clusters == num_tokens:
            self.record.unreduced(num_tokens)
            return args, kwargs
        run.clusters = self.clustering(tokens, run.grid, run.num_clusters)
        merged = run.clusters.merge(tokens)
        # Also where the output is copied: the hidden state at L itself was never reduced.
        run.tokens, run.merged = tokens, merged
        self.record.reduced(num_tokens, run.num_clusters, run.clusters, run.grid)
        return (torch.cat([prefix, merged], 1), *args[1:]), kwargs

    def add_bias(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return self._with_bias(args, kwargs, self.mask_position, self.found.prefix, 0)

    def restore(self, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        run = self.runs[_thread()]
        if run.clusters is None:
            return output
        return self._unfold(run, output)

    def finish_encoder(self, encoder: nn.Module, args: tuple, output: Any) -> Any:
        run = self.runs[_thread()]
        if run.clusters is None:
            del self.runs[_thread()]
            return output
        output = self._unfold_hidden_states(run, output)
        if self.through_decoder:
            run.tokens = run.merged = None
        else:
            del self.runs[_thread()]
        return output

    def add_decoder_bias(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return self._with_bias(args, kwargs, self.decoder_mask_position, 0, self.found.decoder_suffix)

    def finish_decoder(self, decoder: nn.Module, args: tuple, output: Tensor) -> Tensor:
        run = self.runs.pop(_thread(), None)
        return output if run is None or run.clusters is None else run.clusters.unmerge(output)

    def _with_bias(self, args: tuple, kwargs: dict, position: int, prefix: int, suffix: int) -> tuple[tuple, dict]:
        run = self.runs.get(_thread())
        if run is None or run.clusters is None:
            return args, kwargs
        given = args[position] if len(args) > position else kwargs.get("attention_mask")
        if given is not None:
            raise AiluRusError("an attention mask cannot follow merged tokens: call the model without one")
        bias = run.clusters.log_counts(prefix, suffix)[:, None, None, :].to(args[0].dtype)
        if len(args) > position:
            return (*args[:position], bias, *args[position + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": bias}

    def _split(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        prefix = self.found.prefix
        return hidden_states[:, :prefix], hidden_states[:, prefix:]

    def _unfold(self, run: Run, hidden_states: Tensor) -> Tensor:
        """All N tokens from Tensor[B, prefix + M, C]."""
        assert run.clusters is not None
        prefix, representatives = self._split(hidden_states)
        if self.config.restore == "copy":
            return torch.cat([prefix, run.clusters.unmerge(representatives)], 1)
        assert run.tokens is not None and run.merged is not None
        gained = run.clusters.unmerge(representatives - run.merged)
        return torch.cat([prefix, run.tokens + gained], 1)

    def _unfold_hidden_states(self, run: Run, output: Any) -> Any:
        """The encoder's output, its hidden states all N tokens long."""
        if isinstance(output, tuple):
            # return_dict=False: hidden states are the tuple of [B, L, C], attention maps that of [B, heads, L, L].
            return tuple(
                self._unfold_each(run, part) if isinstance(part, tuple) and part[-1].ndim == 3 else part
                for part in output
            )
        if getattr(output, "hidden_states", None) is not None:
            output["hidden_states"] = self._unfold_each(run, output["hidden_states"])
        return output

    def _unfold_each(self, run: Run, hidden_states: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        assert run.tokens is not None
        unfolded = []
        for location, state in enumerate(hidden_states):
            if state is not None and state.shape[1] == self.found.prefix + run.num_clusters:
                if location == self.config.cluster_location:
                    state = torch.cat([self._split(state)[0], run.tokens], 1)
                else:
                    state = self._unfold(run, state)
            unfolded.append(state)
        return tuple(unfolded)

    def _pre_hook(self, module: nn.Module, hook: Any) -> None:
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))


def _thread() -> int:
    # The compiler cannot trace the question; compiled graphs keep a Run of their own.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
