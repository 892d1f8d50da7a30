"""EncoderReducer: the hooks that run an encoder's later layers on representatives and unmerge the result.

One forward goes: encoder pre-hook (a new ForwardState) -> layers up to L as they are -> pre-hook of layer L (cluster, merge) ->
each later layer gets the count bias as an argument -> restored after the last layer, at `restore_location`, or after the
token decoder. Hidden states that somebody reads are unmerged where they leave the stack of layers. Layers receive
everything by argument, so that gradient checkpointing recomputes the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..clustering import ClusterFunction
from ..clusters import TokenClusters
from ..config import AiluRusConfig
from ..errors import AiluRusError, UnsupportedModelError
from ..hooks import Hooks
from ..status import LocationStatus, Record
from . import adapters
from .backend import (
    EAGER_NAME,
    KEY_BIAS,
    attention_configs,
    bias_parameter,
    parameters_of,
    use_ailurus_attention,
)
from .discovery import FoundEncoder
from .encoder_status import encoder_locations
from .forward_state import ForwardState, Reduction, thread
from .weighted_probabilities import weighted_probabilities


@dataclass
class EncoderReducer:
    """Hooks on one encoder (and its token decoder). `install` puts them there, `remove` takes all of them away."""

    found: FoundEncoder
    config: AiluRusConfig
    clustering: ClusterFunction
    nesting: Callable[..., TokenClusters]
    records: list[Record] = field(default_factory=list)
    hooks: Hooks = field(default_factory=Hooks)
    # One model may run in several threads at once, so each has a ForwardState of its own.
    runs: dict[int, ForwardState] = field(default_factory=dict)
    # What the reader around the encoder is about to read.
    wanted: dict[int, frozenset[int] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        depth, locations = len(self.found.layers), self.config.locations
        name = type(self.found.encoder).__name__
        if locations[-1] >= depth:
            raise AiluRusError(
                f"cluster_location {locations[-1]} leaves none of the {depth} layers of {name} to run "
                f"on fewer tokens: use 0 to {depth - 1}"
            )
        if self.config.restore_location is not None and self.config.restore_location > depth:
            raise AiluRusError(
                f"restore_location {self.config.restore_location} is past the {depth} layers of {name}: "
                f"use {locations[-1] + 1} to {depth}"
            )
        self.records = [Record() for _ in locations]
        self.restore_location = self.config.restore_location or depth
        self.through_decoder = self.config.restores_after_decoder and self.found.decoder is not None
        # Checked before the first hook is placed, so that an error leaves nothing half-applied.
        self.reduced_layers = list(self.found.layers[locations[0] : self.restore_location])
        self.bias_parameter = bias_parameter(self.found.layers[0])
        self.parameters = parameters_of(self.found.layers[0])
        self.encoder_parameters = parameters_of(self.found.encoder)
        in_layers = {id(module) for layer in self.found.layers for module in layer.modules()}
        self.shared_bias = [m for m in adapters.relative_bias_modules(self.found.encoder) if id(m) not in in_layers]
        family = self.found.family
        self.takes_masks = bool(self.shared_bias) or family.queries is not None or family.layout is not None
        self.adapters = [self._adapters_of(layer) for layer in self.found.layers]
        self.decoder_bias_parameter = "attention_mask"
        self.decoder_parameters: list[str] = []
        if self.found.decoder_layers:
            self.decoder_bias_parameter = bias_parameter(self.found.decoder_layers[0])
            self.decoder_parameters = parameters_of(self.found.decoder_layers[0])

    def _adapters_of(self, layer: nn.Module) -> list[adapters.Adapter]:
        """What this layer is given beside tokens and a bias."""
        found = []
        if modules := self.shared_bias + adapters.relative_bias_modules(layer):
            found.append(adapters.add_relative_bias(modules))
        if "position_embeddings" in self.parameters:
            found.append(adapters.rotate_at_centroids)
        if self.found.family.queries is not None:
            found.append(adapters.follow_query_mask)
        if self.found.family.layout is not None:
            found.append(adapters.mask_padding)
        return found

    @property
    def module(self) -> nn.Module:
        return self.found.encoder

    def locations(self) -> list[LocationStatus]:
        """What the last forward did at each location, for the status table."""
        return encoder_locations(self)

    def install(self) -> None:
        found, locations, last, hooks = self.found, self.config.locations, self.restore_location, self.hooks
        if found.reader is not None:
            hooks.pre_forward(found.reader[0], self.note_reader)
        hooks.pre_forward(found.encoder, self.begin)
        for index in range(locations[0], last):
            hooks.pre_forward(found.layers[index], partial(self.enter_layer, index))
            restores = index == last - 1 and not self.through_decoder
            if restores or found.family.between is not None:
                # Prepended, so that hooks that were there before see all N tokens.
                hooks.post_forward(found.layers[index], partial(self.leave_layer, index), prepend=True)
        for bias in adapters.relative_bias_modules(found.encoder):
            hooks.pre_forward(bias, adapters.shrink_relative_bias)
            hooks.post_forward(bias, adapters.drop_relative_bias, with_kwargs=True)
        for weighted in weighted_probabilities(self.reduced_layers):
            weighted.install(hooks)
        if found.stack is not found.encoder:
            hooks.post_forward(found.stack, self.finish_stack)
        hooks.post_forward(found.encoder, self.finish_encoder)
        reduced_layers = list(self.reduced_layers)
        if self.through_decoder:
            assert found.decoder is not None
            for layer in found.decoder_layers:
                hooks.pre_forward(layer, self.enter_decoder_layer)
            hooks.post_forward(found.decoder, self.finish_decoder)
            reduced_layers += found.decoder_layers
        eager_as = EAGER_NAME if self.bias_parameter == KEY_BIAS else "eager"
        hooks.on_removal(use_ailurus_attention(attention_configs(reduced_layers), eager_as))

    def remove(self) -> None:
        self.hooks.remove()

    # Hooks, in the order in which a forward meets them.

    def note_reader(self, reader: nn.Module, args: tuple, kwargs: dict) -> None:
        assert self.found.reader is not None
        reads = self.found.reader[1].reads
        self.wanted[thread()] = None if _asks_for_states(reader, kwargs) else frozenset(reads(reader))

    def begin(self, encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        family = self.found.family
        pixel_values = args[0] if args else kwargs.get("pixel_values")
        if not isinstance(pixel_values, Tensor):
            raise AiluRusError(f"{type(encoder).__name__} was called without pixel_values")
        if kwargs.get("attention_mask") is not None:
            raise AiluRusError("a 2-D attention_mask cannot follow merged tokens: call the model without one")
        arguments = {**dict(zip(self.encoder_parameters, args)), **kwargs}
        if family.layout is None:
            sides, suffix = family.grid(encoder, pixel_values), self.found.suffix
        else:
            sides, suffix = family.layout(encoder, arguments)
        # Plain numbers also where torch.compile would keep sizes symbolic.
        grid = tuple(operator.index(side) for side in sides)
        num_tokens = math.prod(grid)
        if thread() in self.wanted:
            # A reader asks for all states, to read some, so the encoder cannot tell what is wanted.
            wanted = self.wanted.pop(thread())
        else:
            reads = None if _asks_for_states(encoder, kwargs) else family.reads
            wanted = None if reads is None else frozenset(reads(encoder))
        self.runs[thread()] = ForwardState(
            grid,
            num_tokens,
            self._targets(num_tokens),
            suffix,
            frozenset() if family.between is None else frozenset(family.between(encoder)),
            wanted,
            encoder.training,
        )
        if family.prepare is None:
            return None
        family.prepare(encoder, arguments)
        return (), arguments

    def _targets(self, num_tokens: int) -> list[int | None]:
        """M at each place, None where a place leaves as many tokens as came to it."""
        targets: list[int | None] = []
        left = num_tokens
        for place in range(len(self.config.locations)):
            count = self.config.clusters_for(num_tokens, place)
            targets.append(count if count < left else None)
            left = min(count, left)
        return targets

    def enter_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        run = self.runs[thread()]
        arguments = {**dict(zip(self.parameters, args)), **kwargs}
        # The first of a layer's arguments in all versions, by place in some and by name in others.
        hidden_states = arguments.pop(self.parameters[0])
        if index in self.config.locations:
            hidden_states = self._reduce(run, self.config.locations.index(index), hidden_states)
        elif run.reduction is not None and index - 1 in run.between:
            hidden_states = run.merge(hidden_states, run.reduction)
        if run.reduction is None:
            return args, kwargs
        if arguments.get(self.bias_parameter) is not None and not self.takes_masks:
            raise AiluRusError("an attention mask cannot follow merged tokens: call the model without one")
        front = hidden_states.shape[1] - run.suffix - run.reduction.clusters.num_clusters
        bias = run.reduction.clusters.log_counts(front, run.suffix)[:, None, None, :]
        for adapter in self.adapters[index]:
            bias = adapter(arguments, run, run.reduction, bias)
        arguments[self.bias_parameter] = bias.to(hidden_states.dtype)
        return (hidden_states,), arguments

    def _reduce(self, run: ForwardState, place: int, hidden_states: Tensor) -> Tensor:
        """Clusters, and gives back the sequence with representatives for patches."""
        target, record, location = run.targets[place], self.records[place], self.config.locations[place]
        before = run.reduction
        left = run.num_tokens if before is None else before.clusters.num_clusters
        # Behind a layer whose output the model reads on the grid there are all patches again.
        is_merged = before is not None and location - 1 not in run.between
        count = left if is_merged else run.num_tokens
        self._check_length(run, hidden_states, count, location)
        if target is None:
            record.unreduced(left)
            return hidden_states if before is None or is_merged else run.merge(hidden_states, before)
        front, patches, suffix = run.split(hidden_states, count)
        if before is None:
            tokens = patches
            clusters = self.clustering(tokens, run.grid, target)
        else:
            tokens = before.unmerge(patches, self.config.restore) if is_merged else patches
            representatives = patches if is_merged else before.clusters.merge(patches)
            clusters = self.nesting(before.clusters, representatives, tokens, run.grid, target)
        # Also where the output is copied: the hidden state at L itself was never reduced.
        run.reductions.append(Reduction(location, run.grid, clusters, tokens, clusters.merge(tokens)))
        record.reduced(left, clusters.num_clusters, clusters, run.grid)
        return torch.cat([front, run.reductions[-1].merged, suffix], 1)

    def _check_length(self, run: ForwardState, hidden_states: Tensor, patches: int, location: int) -> None:
        """Whether the sequence is prefix + patches + suffix; queries that have joined count to the prefix."""
        around, queries = self.found.prefix + run.suffix, self.found.family.queries
        length = hidden_states.shape[1] - around
        joined = 0 if queries is None else int(getattr(self.found.encoder.config, queries))
        if length not in (patches, patches + joined):
            raise AiluRusError(
                f"grid {run.grid} has {run.num_tokens} places, for which {patches} tokens should come to location {location}, "
                f"but there are {length}"
            )

    def leave_layer(self, index: int, layer: nn.Module, args: tuple, output: Any) -> Any:
        run = self.runs[thread()]
        is_last = index == self.restore_location - 1 and not self.through_decoder
        if run.reduction is None or not (is_last or index in run.between):
            return output
        if isinstance(output, tuple):
            return (run.unmerge(output[0], run.reduction, self.config.restore), *output[1:])
        return run.unmerge(output, run.reduction, self.config.restore)

    def finish_stack(self, stack: nn.Module, args: tuple, output: Any) -> Any:
        return self._unmerge_hidden_states(self.runs[thread()], output)

    def finish_encoder(self, encoder: nn.Module, args: tuple, output: Any) -> Any:
        run = self.runs[thread()]
        if not run.reductions and any(target is not None for target in run.targets):
            raise UnsupportedModelError(
                f"{type(encoder).__name__} ran without calling its layers as modules, so their hooks saw no token and nothing "
                "was reduced; this version of transformers runs them in a way that is not known here"
            )
        output = self._unmerge_hidden_states(run, output)
        if run.reduction is None or not self.through_decoder:
            del self.runs[thread()]
        return output

    def enter_decoder_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        run = self.runs.get(thread())
        if run is None or run.reduction is None:
            return args, kwargs
        arguments = {**dict(zip(self.decoder_parameters[1:], args[1:])), **kwargs}
        if arguments.get(self.decoder_bias_parameter) is not None:
            raise AiluRusError("an attention mask cannot follow merged tokens: call the model without one")
        bias = run.reduction.clusters.log_counts(0, self.found.decoder_suffix)[:, None, None, :]
        arguments[self.decoder_bias_parameter] = bias.to(args[0].dtype)
        return (args[0],), arguments

    def finish_decoder(self, decoder: nn.Module, args: tuple, output: Tensor) -> Tensor:
        run = self.runs.pop(thread(), None)
        return output if run is None or run.reduction is None else run.reduction.unmerge(output, self.config.restore)

    # Hidden states: transformers collects what layers put out, which is M long; they are unmerged once, where they leave.

    def _unmerge_hidden_states(self, run: ForwardState, output: Any) -> Any:
        """The output with all hidden states that somebody reads N tokens long."""
        if not run.reductions or run.states_unmerged:
            return output
        if isinstance(output, tuple):
            # return_dict=False: hidden states are the tuple of [B, L, C], attention maps that of [B, heads, L, L].
            parts = [isinstance(part, tuple) and part[-1].ndim == 3 for part in output]
            run.states_unmerged = any(parts)
            return tuple(
                self._unmerge_each(run, part) if is_states else part
                for part, is_states in zip(output, parts, strict=True)
            )
        if getattr(output, "hidden_states", None) is not None:
            output["hidden_states"] = self._unmerge_each(run, output["hidden_states"])
            run.states_unmerged = True
        return output

    def _unmerge_each(self, run: ForwardState, hidden_states: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        unmerged = []
        for location, state in enumerate(hidden_states):
            is_read = run.wanted is None or location in run.wanted
            if state is not None and is_read:
                state = self._unmerge_at(run, location, state)
            unmerged.append(state)
        return tuple(unmerged)

    def _unmerge_at(self, run: ForwardState, location: int, state: Tensor) -> Tensor:
        """The hidden state at a location, from what was collected there."""
        first = run.reductions[0]
        if location == first.location == 0:
            if state.shape[1] == self.found.prefix + run.num_tokens + run.suffix:
                return state
            # Collected as the first layer's input, which was merged already.
            front, _, suffix = run.split(state, first.clusters.num_clusters)
            return torch.cat([front, first.tokens, suffix], 1)
        is_last = location == self.restore_location and not self.through_decoder
        if is_last or location > self.restore_location or location - 1 in run.between:
            return state
        for reduction in reversed(run.reductions):
            if reduction.location < location:
                return run.unmerge(state, reduction, self.config.restore)
        return state


def _asks_for_states(module: nn.Module, kwargs: dict) -> bool:
    asked = kwargs.get("output_hidden_states")
    return bool(getattr(module.config, "output_hidden_states", False) if asked is None else asked)
