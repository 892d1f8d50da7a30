"""EncoderReducer: the hooks that run an encoder's later layers on representatives and unmerge the result.

One forward goes: pre-hook of the encoder (a new ForwardState) -> layers up to L as they are -> pre-hook of layer L
(cluster, merge) -> each later layer gets the count bias as an argument -> restored after the last layer, at
`restore_location`, or after the token decoder. Hidden states that are read are unmerged where they leave the
stack of layers. Layers receive everything by argument, so that gradient checkpointing recomputes the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..clustering import ClusterFunction
from ..config import AiluRusConfig
from ..errors import AiluRusError, UnsupportedModelError
from ..per_thread import PerThread
from ..status import LocationStatus
from . import adapters
from .backend import EAGER_NAME, KEY_BIAS, use_attention
from .base import JoinFunction, Reducer, refuse_stages, refuse_tracing
from .discovery import find_encoders
from .encoder_plan import EncoderPlan, LayerPlan, plan_encoder
from .encoder_status import encoder_status
from .forward_state import ForwardState, Reduction
from .hidden_states import asks_for_states, unmerge_hidden_states
from .recompute import Recompute, may_run_again
from .relayed_bias import relayed_biases
from .weighted_probabilities import weighted_probabilities


class EncoderReducer(Reducer):
    """Hooks on one encoder (and its token decoder).

    Args:
        plan: what will happen in every forward.
        clustering, join: as in `Reducer.find`.
    """

    per_forward = ("states", "again", "wanted", "around_decoder")

    def __init__(self, plan: EncoderPlan, clustering: ClusterFunction, join: JoinFunction) -> None:
        super().__init__(plan.found.encoder, plan.config, clustering, len(plan.config.locations))
        self.plan = plan
        self.join = join
        self.states: PerThread[ForwardState] = PerThread()
        # What the reader around the encoder is about to read, (None,) for all.
        self.wanted: PerThread[tuple[frozenset[int] | None]] = PerThread()
        # Whether the module that will call the decoder after the encoder is running.
        self.around_decoder: PerThread[bool] = PerThread()
        # The states of forwards that are over, for layers that a checkpoint runs again; and that of the one running
        # again.
        self.recompute: Recompute[ForwardState] = Recompute()
        self.again: PerThread[ForwardState] = PerThread()

    @classmethod
    def find(
        cls, target: nn.Module, config: AiluRusConfig, clustering: ClusterFunction, join: JoinFunction
    ) -> Sequence[EncoderReducer]:
        """One for each supported encoder; raises UnsupportedModelError, naming the class, where there is none."""
        encoders = find_encoders(target)
        refuse_stages(target, config)
        return [cls(plan_encoder(found, config), clustering, join) for found in encoders]

    def status(self) -> list[LocationStatus]:
        return encoder_status(self.plan, self.records)

    def put_hooks(self) -> None:
        plan, found, hooks = self.plan, self.plan.found, self.hooks
        if found.reader is not None:
            hooks.pre_forward(found.reader[0], self.note_reader)
            hooks.post_forward(found.reader[0], self.forget_reader, always_call=True)
        if plan.through_decoder:
            assert found.around_decoder is not None
            hooks.pre_forward(found.around_decoder, self.enter_around_decoder)
            hooks.post_forward(found.around_decoder, self.forget, always_call=True)
        hooks.pre_forward(found.encoder, self.begin)
        reduced = {layer.index: layer for layer in plan.layers}
        for index, layer in enumerate(found.layers):
            if index not in reduced:
                hooks.pre_forward(layer, self.pass_layer)
                continue
            hooks.pre_forward(layer, partial(self.enter_layer, reduced[index]))
            if reduced[index].may_restore:
                # Prepended, so that hooks that were there before see all N tokens.
                hooks.post_forward(layer, partial(self.leave_layer, index), prepend=True)
                hooks.post_forward(layer, self.forget_again, always_call=True)
        for bias in adapters.relative_bias_modules(found.encoder):
            hooks.pre_forward(bias, adapters.shrink_relative_bias)
            hooks.post_forward(bias, adapters.drop_relative_bias, with_kwargs=True)
        if plan.bias == KEY_BIAS:
            for relayed in relayed_biases(plan.reduced_layers):
                relayed.install(hooks)
        for weighted in weighted_probabilities(plan.reduced_layers):
            weighted.install(hooks)
        if found.stack is not found.encoder:
            hooks.post_forward(found.stack, self.finish_stack)
        hooks.post_forward(found.encoder, self.finish_encoder)
        hooks.post_forward(found.encoder, self.end, always_call=True)
        for path in found.family.methods:
            owner, _, name = path.rpartition(".")
            hooks.replace_method(found.encoder.get_submodule(owner), name, self.run_method)
        if plan.through_decoder:
            assert found.decoder is not None
            for layer in found.decoder_layers:
                hooks.pre_forward(layer, self.enter_decoder_layer)
            hooks.post_forward(found.decoder, self.finish_decoder)
        eager_as = EAGER_NAME if plan.bias == KEY_BIAS else "eager"
        in_decoder = found.decoder_layers if plan.through_decoder else ()
        use_attention(hooks, [*plan.reduced_layers, *in_decoder], eager_as)

    # Hooks, in the order in which a forward meets them.

    def note_reader(self, reader: nn.Module, args: tuple, kwargs: dict) -> None:
        assert self.plan.found.reader is not None
        reads = self.plan.found.reader[1].reads
        self.wanted.set((None if asks_for_states(reader, kwargs) else frozenset(reads(reader)),))

    def forget_reader(self, reader: nn.Module, args: tuple, output: Any) -> None:
        self.wanted.pop()

    def enter_around_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.around_decoder.set(True)

    def begin(self, encoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        refuse_tracing(encoder)
        family, names = self.plan.found.family, self.plan.encoder_parameters
        arguments = {**dict(zip(names, args)), **kwargs}
        pixel_values = arguments.get(names[0])
        if not isinstance(pixel_values, Tensor):
            raise AiluRusError(f"{type(encoder).__name__} was called without {names[0]}")
        if kwargs.get("attention_mask") is not None:
            raise AiluRusError("a 2-D attention_mask cannot follow merged tokens: call the model without one")
        if family.layout is None:
            sides, suffix = family.grid(encoder, pixel_values), self.plan.found.suffix
        else:
            sides, suffix = family.layout(encoder, arguments)
        # Plain numbers also where torch.compile would keep sizes symbolic.
        grid = tuple(operator.index(side) for side in sides)
        if family.prepare is not None:
            family.prepare(encoder, arguments)
        num_tokens = math.prod(grid)
        state = ForwardState(
            grid,
            num_tokens,
            self.plan.targets(num_tokens),
            suffix,
            frozenset() if family.between is None else frozenset(family.between(encoder)),
            self._wanted(encoder, kwargs),
            encoder.training,
            self.plan.through_decoder and self.around_decoder.get() is not None,
        )
        self.states.set(state)
        return None if family.prepare is None else ((), arguments)

    def _wanted(self, encoder: nn.Module, kwargs: dict) -> frozenset[int] | None:
        # A reader asks for all states, to read some, so the encoder cannot tell what is wanted.
        if (noted := self.wanted.pop()) is not None:
            return noted[0]
        reads = self.plan.found.family.reads
        return None if reads is None or asks_for_states(encoder, kwargs) else frozenset(reads(encoder))

    def run_method(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A method that runs all layers, where it is called instead of the encoder."""
        if self.states.get() is not None:
            return original(*args, **kwargs)
        encoder = self.plan.found.encoder
        try:
            self.begin(encoder, args, kwargs)
            return self.finish_encoder(encoder, args, original(*args, **kwargs))
        finally:
            self.end(encoder, args, None)

    def pass_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A layer that runs on all tokens."""
        if self.plan.takes_masks or not torch.compiler.is_compiling():
            return None
        # Compiled and exported, transformers writes out a mask that masks nothing.
        arguments = {**dict(zip(self.plan.parameters, args)), **kwargs}
        if arguments.get("attention_mask") is not None:
            arguments["attention_mask"] = None
        return (arguments.pop(self.plan.parameters[0]),), arguments

    def enter_layer(self, planned: LayerPlan, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        plan = self.plan
        arguments = {**dict(zip(plan.parameters, args)), **kwargs}
        # The first of a layer's arguments in all versions, by position in some and by name in others.
        given: Tensor = arguments.pop(plan.parameters[0])
        state = self.states.get()
        runs_again = state is None
        if state is None:
            state = self._state_again(planned, layer, given)
        hidden_states = given
        if planned.reduces is not None:
            hidden_states = self._reduce(state, planned.reduces, hidden_states, runs_again)
        elif state.between and state.reduction is not None and planned.index - 1 in state.between:
            hidden_states = state.merge(hidden_states, state.reduction)
        if not runs_again and may_run_again(given):
            self.recompute.keep(given, state.kept())
        if state.reduction is None:
            return args, kwargs
        if arguments.get(plan.bias) is not None and not plan.takes_masks and not torch.compiler.is_compiling():
            raise AiluRusError("an attention mask cannot follow merged tokens: call the model without one")
        prefix = hidden_states.shape[1] - state.suffix - state.reduction.clusters.num_clusters
        bias = state.reduction.clusters.log_counts(prefix, state.suffix)[:, None, None, :]
        for adapter in planned.adapters:
            bias = adapter(arguments, state, state.reduction, bias)
        arguments[plan.bias] = bias.to(hidden_states.dtype)
        return (hidden_states,), arguments

    def _state_again(self, planned: LayerPlan, layer: nn.Module, given: Tensor) -> ForwardState:
        """The state of a forward that is over, where a checkpoint runs a layer again."""
        kept = self.recompute.find(given)
        if kept is None:
            raise AiluRusError(
                f"layer {planned.index + 1} of {self.plan.name} ({type(layer).__name__}) was called outside of a "
                f"forward of {self.plan.name}, so nothing says what its tokens are: call the whole model, or switch "
                "off with remove_ailurus"
            )
        if kept.reductions and not self.recompute.is_kept_on(given):
            raise AiluRusError(
                f"a reentrant checkpoint around the layers of {self.plan.name} loses gradients: use use_reentrant=False"
            )
        state = kept.up_to(planned.index)
        if planned.may_restore:
            self.again.set(state)
        return state

    def _reduce(self, state: ForwardState, number: int, hidden_states: Tensor, runs_again: bool) -> Tensor:
        """Clusters, and returns the sequence with representatives for patches."""
        target, record, location = state.targets[number], self.records[number], self.config.locations[number]
        known = None
        if runs_again and state.reduction is not None and state.reduction.location == location:
            known = state.reductions.pop()
        before = state.reduction
        left = state.num_tokens if before is None else before.clusters.num_clusters
        # After a layer whose output the model reads on the grid there are all patches again.
        is_merged = before is not None and location - 1 not in state.between
        count = left if is_merged else state.num_tokens
        self._check_length(state, hidden_states, count, location)
        if target is None:
            if not runs_again:
                record.unreduced(left)
            return hidden_states if before is None or is_merged else state.merge(hidden_states, before)
        # A plain number also where torch.compile would keep it symbolic, as for a second keep_ratio.
        target = operator.index(target)
        prefix, patches, suffix = state.split(hidden_states, count)
        if before is None:
            tokens = patches
            clusters = self.clustering(tokens, state.grid, target) if known is None else known.clusters
        else:
            tokens = before.unmerge(patches, self.config.restore) if is_merged else patches
            representatives = patches if is_merged else before.clusters.merge(patches)
            clusters = (
                self.join(before.clusters, representatives, tokens, state.grid, target)
                if known is None
                else known.clusters
            )
        # Also where the output is copied: the hidden state at L itself was never reduced.
        state.reductions.append(Reduction(location, state.grid, clusters, tokens, clusters.merge(tokens)))
        if not runs_again:
            record.reduced(left, clusters.num_clusters, clusters, state.grid)
        return torch.cat([prefix, state.reductions[-1].merged, suffix], 1)

    def _check_length(self, state: ForwardState, hidden_states: Tensor, patches: int, location: int) -> None:
        """Whether the sequence is prefix + patches + suffix; queries that have joined count to the prefix."""
        found = self.plan.found
        around, queries = found.prefix + state.suffix, found.family.queries
        length = hidden_states.shape[1] - around
        joined = 0 if queries is None else int(getattr(found.encoder.config, queries))
        if length not in (patches, patches + joined):
            raise AiluRusError(
                f"a grid of {state.grid} has {state.num_tokens} tokens, {patches} of which should come to location "
                f"{location}, but there are {length}"
            )

    def leave_layer(self, index: int, layer: nn.Module, args: tuple, output: Any) -> Any:
        state = self.again.pop() or self.states.get()
        if state is None or state.reduction is None:
            return output
        is_last = self.plan.is_last(index) and not state.through_decoder
        if not is_last and index not in state.between:
            return output
        if isinstance(output, tuple):
            return (state.unmerge(output[0], state.reduction, self.config.restore), *output[1:])
        return state.unmerge(output, state.reduction, self.config.restore)

    def forget_again(self, layer: nn.Module, args: tuple, output: Any) -> None:
        self.again.pop()

    def finish_stack(self, stack: nn.Module, args: tuple, output: Any) -> Any:
        state = self.states.get()
        return output if state is None else unmerge_hidden_states(self.plan, state, output)

    def finish_encoder(self, encoder: nn.Module, args: tuple, output: Any) -> Any:
        state = self.states.get()
        assert state is not None
        if not state.reductions and any(target is not None for target in state.targets):
            raise UnsupportedModelError(
                f"{type(encoder).__name__} ran without calling its layers as modules, so their hooks saw no token and "
                "nothing was reduced; this version of transformers runs them in a way that is not known here"
            )
        output = unmerge_hidden_states(self.plan, state, output)
        state.for_decoder = state.through_decoder and state.reduction is not None
        return output

    def end(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        """The forward is over, or has raised."""
        state = self.states.get()
        if state is not None and not state.for_decoder:
            self.states.pop()

    def enter_decoder_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # Once the forward is over, a checkpoint runs the layer again.
        state = self.states.get() or self.recompute.find(args[0])
        if state is None or state.reduction is None:
            return args, kwargs
        if may_run_again(args[0]):
            self.recompute.keep(args[0], state.kept())
        arguments = {**dict(zip(self.plan.decoder_parameters[1:], args[1:])), **kwargs}
        if arguments.get(self.plan.decoder_bias) is not None:
            raise AiluRusError("an attention mask cannot follow merged tokens: call the model without one")
        bias = state.reduction.clusters.log_counts(0, self.plan.found.decoder_suffix)[:, None, None, :]
        arguments[self.plan.decoder_bias] = bias.to(args[0].dtype)
        return (args[0],), arguments

    def finish_decoder(self, decoder: nn.Module, args: tuple, output: Tensor) -> Tensor:
        state = self.states.pop()
        if state is None or state.reduction is None:
            return output
        return state.reduction.unmerge(output, self.config.restore)
