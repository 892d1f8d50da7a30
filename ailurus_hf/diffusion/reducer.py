"""NetworkReducer: what the reduction of any network needs: its hooks, its clock, its assignments, its records.

`unet.py` and `transformer.py` derive from it. A forward makes a ForwardState; the hooks around a stack, or processors
of self-attention, ask `assign` for the clusters of their grid; the end of the forward drops the state.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..clustering import ClusterFunction
from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError, UnsupportedModelError
from ..hooks import Hooks
from ..status import Record
from .backend import modules_of
from .caches import reason_beside_steps, refuse_caches
from .calls import NetworkCall, argument_names, is_running
from .checkpointing import drop_state_in_checkpoints
from .clock import Clock
from .cluster_tokens import cluster_tokens, cluster_videos
from .compiled_blocks import eager_in_compiled_blocks
from .forward_state import Forwards, ForwardState, StackState, key_bias
from .frames import Clusters, JointClusters
from .inner_layers import inner_layers
from .networks import DiffusionNetwork
from .notices import check_levels, notice_lost_processors, say_that_nothing_was_reduced
from .processor import AiluRusProcessor, Assigned, SharedClusters
from .replay import replayed
from .skipping import Skipping
from .stacks import AttentionLayer, Processor, Stack, find_stacks, frames_of, largest_level, self_attentions, takes_mask

log = logging.getLogger(__name__)

# The attribute on a network that holds its reducer; gone again after `uninstall`.
ATTRIBUTE = "_ailurus_reducer"


class NetworkReducer:
    """Reduces one network.

    Args:
        network: the network.
        declared: its declaration.
        config: the settings.
        clustering: what clusters its tokens.

    Attributes:
        records: what was done, by the names of the stacks.
        processor: what self-attention runs on, where it runs on one of ours; `previous_processors` is what it ran on
        before.
        last_levels: of each stack's grid, in the last forward.
        left_whole: why stacks, by name, ran on all tokens in the last forward, where it was not for their size.
        text_tokens: in joint attention, in the last forward; None elsewhere.
    """

    def __init__(
        self,
        network: nn.Module,
        declared: DiffusionNetwork,
        config: AiluRusDiffusionConfig,
        clustering: ClusterFunction,
    ) -> None:
        self.network, self.declared, self.config, self.clustering = network, declared, config, clustering
        self.stacks = find_stacks(network)
        self.largest_level = largest_level(network, self.stacks)
        self.records = {stack.name: Record() for stack in self.stacks}
        self.hooks, self.forwards = Hooks(), Forwards()
        self.skipping = Skipping(self.hooks, self.forwards, declared.gives_image_first)
        self.clock = Clock(config, type(network).__name__)
        self.processor: Processor | None = None
        self.previous_processors: dict[str, Processor] = {}
        self.last_levels: dict[str, int] = {}
        self.left_whole: dict[str, str] = {}
        self.text_tokens: int | None = None
        self._names = argument_names(network)
        self.lost_processors: list[str] = []
        self.said: set[str] = set()
        for stack in self.stacks:
            if self.first_reduced(stack) >= len(stack.blocks):
                raise AiluRusError(
                    f"cluster_location must be below the {len(stack.blocks)} blocks of {type(network).__name__}, "
                    f"got {config.cluster_location}"
                )

    # On and off

    def install(self) -> None:
        """Puts the hooks on the network; subclasses add those of its stacks."""
        if self.config.inner_every is not None:
            inner_layers(self.network)
        self.hooks.pre_forward(self.network, self.begin)
        self.hooks.post_forward(self.network, self.end, always_call=True)
        if self.config.builds_on_steps and hasattr(self.network, "cache_context"):
            # Some pipelines guide by two calls a step, and tell them apart by diffusers' cache contexts.
            self.hooks.replace_method(self.network, "cache_context", self.clock.contexts.entered)
        log.debug("%s: %d stacks are reduced", type(self.network).__name__, len(self.stacks))

    def remove(self) -> None:
        """Takes off hooks and processors; what somebody else has put there since stays."""
        self.hooks.remove()
        drop_state_in_checkpoints(self.network)
        for name, layer in self_attentions(self.stacks).items():
            if name in self.previous_processors and self.owns(layer.processor):
                layer.set_processor(self.previous_processors[name])
        log.debug("%s: no longer reduced", type(self.network).__name__)

    def is_in_forward(self) -> bool:
        """Whether another thread is in a forward of the network, or this one."""
        # An interrupt from the keyboard leaves the state of a forward that is over.
        return self.forwards.running_elsewhere or (self.forwards.current is not None and is_running(self.network))

    def first_reduced(self, stack: Stack) -> int:
        """Which of its blocks is the first on representatives."""
        return 0 if self.declared.layout == "maps" else self.config.cluster_location

    def runs_in_some_steps(self, stack: Stack) -> bool:
        """Whether it is among the inner layers of a UNet, and these do not run in all steps."""
        return False

    def set_processor(self, processor: Processor, layers: Mapping[str, AttentionLayer]) -> None:
        """Runs layers of self-attention on one processor; `remove` puts back what was there."""
        self.processor = processor
        for name, layer in layers.items():
            self.previous_processors[name] = layer.processor
            layer.set_processor(processor)

    def reduce_self_attention(self) -> None:
        """Runs self-attention on an AiluRusProcessor that asks this reducer for its clusters."""
        layers = self_attentions(self.stacks)
        known = {name: layer for name, layer in layers.items() if takes_mask(layer)}
        others = sorted({type(layer.processor).__name__ for name, layer in layers.items() if name not in known})
        if not known:
            raise UnsupportedModelError(
                f"self-attention of {type(self.network).__name__} runs on {', '.join(others)}, which AiluRus cannot "
                "stand in for"
            )
        if others:
            self.say_once(
                "%d self-attention layers run on all tokens: AiluRusProcessor cannot stand in for %s",
                len(layers) - len(known),
                ", ".join(others),
            )
        self.set_processor(AiluRusProcessor(source=SharedClusters(self)), known)

    def owns(self, processor: Processor) -> bool:
        """Whether a processor asks this reducer for clusters: ours, one its class made, or one that stands for it."""
        processor = getattr(processor, "stands_for", processor)
        return getattr(getattr(processor, "source", None), "reducer", None) is self

    def without_processor(self) -> list[str]:
        """Self-attention layers that run on something else by now."""
        return [
            name
            for name, layer in self_attentions(self.stacks).items()
            if name in self.previous_processors and not self.owns(layer.processor)
        ]

    # A forward begins and ends

    def begin(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the network's forward."""
        call = NetworkCall(self.network, self._names, args, kwargs)
        self.refuse(call)
        batch = call.latents.shape[0]
        if self.config.share_cfg and batch % 2:
            raise AiluRusError(f"share_cfg takes a batch as two halves, but it has {batch} images")
        if not torch.compiler.is_compiling():
            notice_lost_processors(self)
            self.left_whole.clear()
        frames = frames_of(self.stacks[0])
        tick = self.clock.tick(call, self.declared.guides_by_halves, None if frames is None else frames.numbers)
        if tick.additions is not None or tick.layers is not None:
            refuse_caches((block for stack in self.stacks for block in stack.blocks), reason_beside_steps(self.config))
        self.forwards.begin(
            ForwardState(
                max(call.latents.shape[-2:]),
                tick.reduce,
                tick.share_cfg,
                tick.assignments,
                traced=torch.compiler.is_compiling(),
                additions=tick.additions,
                layers=tick.layers,
                factor=tick.factor,
            )
        )

    def end(self, network: nn.Module, args: tuple, output: Any) -> None:
        """After the network's forward, also where it raised; then there is no output."""
        forward = self.forwards.end()
        if torch.compiler.is_compiling():
            return
        if output is None:
            self.clock.forget()
            return
        check_levels(self)
        if forward is not None and forward.most_unreduced and not (forward.assignments or forward.skips):
            say_that_nothing_was_reduced(self, forward.most_unreduced)

    def refuse(self, call: NetworkCall) -> None:
        """Raises AiluRusError on a call that cannot follow merged tokens, whatever is reduced in it."""

    def running(self) -> ForwardState:
        """The forward that this thread is in; raises AiluRusError where a part of the network is called on its own."""
        forward = self.forwards.current
        if forward is None:
            raise AiluRusError(
                f"a part of {type(self.network).__name__} was called outside a forward of the network, where AiluRus "
                "does not know its tokens' grid: call the network, or remove_ailurus first. Where a checkpoint around "
                "a block runs it again in the backward: enable_gradient_checkpointing() instead, with scope='attention'"
            )
        return forward

    # Clusters

    @property
    def parts(self) -> int:
        """How many parts there are whose keep ratios may differ: stacks here, blocks in a transformer on patches."""
        return len(self.stacks)

    def num_clusters(self, forward: ForwardState, running: StackState) -> int:
        """M for a stack in this forward; N where it runs unreduced."""
        return self._reduced_to(forward, running) if forward.reduce else math.prod(running.grid)

    def _reduced_to(self, forward: ForwardState, running: StackState) -> int:
        factor = forward.factor * self.config.block_factor(running.number, self.parts)
        level = forward.level_of(running.grid)
        is_largest = self.largest_level in (None, level)
        return self.config.clusters_for(math.prod(running.grid), level, factor, largest=is_largest)

    def keeps_additions(self, forward: ForwardState, running: StackState) -> bool:
        """Whether a stack runs on all tokens in this forward, and what it adds serves in later ones."""
        if forward.additions is None or forward.reduce or running.scope != "blocks":
            return False
        return self._reduced_to(forward, running) < math.prod(running.grid)

    def runs_nothing(self, forward: ForwardState, running: StackState) -> bool:
        """Whether a stack that would run on representatives shall not run at all, as what it adds was kept.

        What no full step reached, as skip-layer guidance leaves it out, is not kept; it runs on all tokens.
        """
        if self.config.between != "nothing" or running.scope != "blocks" or not forward.reduce:
            return False
        if self._reduced_to(forward, running) == math.prod(running.grid):
            return False
        running.skipped = forward.additions is not None and forward.additions.has(running.stack.name)
        if running.skipped:
            forward.skips = True
            self.records[running.stack.name].skipped(math.prod(running.grid))
        else:
            self.leave(forward, running.stack, math.prod(running.grid))
        return True

    def assign(self, forward: ForwardState, running: StackState, tokens: Tensor) -> Clusters:
        """The forward's clusters of a stack's grid, made from Tensor[B, N, C] if it has none."""
        grid, num_clusters = running.grid, self.num_clusters(forward, running)
        clusters, made = self._clusters(forward, running, tokens, num_clusters)
        record, frames = self.records[running.stack.name], frames_of(running.stack)
        if forward.recomputing:
            if made:
                record.clusterings += 1
            return clusters
        record.attended = 1 if frames is None else len(frames.sources[0])
        if isinstance(clusters, JointClusters):
            record.reduced(tokens.shape[1], num_clusters, clusters.clusters, (clusters.frames, *grid), made)
        else:
            record.reduced(tokens.shape[1], num_clusters, clusters, grid, made)
        return clusters

    def _clusters(
        self, forward: ForwardState, running: StackState, tokens: Tensor, num_clusters: int
    ) -> tuple[Clusters, bool]:
        """The forward's clusters of a stack's grid, of that number, and whether they were made now."""
        grid, frames = running.grid, frames_of(running.stack)
        if tokens.shape[1] != math.prod(grid):
            raise AiluRusError(f"grid {grid} has {math.prod(grid)} tokens, but there are {tokens.shape[1]}")
        own = running.stack.name if self.config.cluster_per == "stack" else ""
        key = grid, num_clusters, tokens.shape[0], None if frames is None else frames.numbers, own
        if key in forward.assignments:
            return forward.assignments[key], False
        clusters: Clusters
        if frames is not None and frames.all_joined and self.config.frames == "joint":
            clusters = cluster_videos(self.clustering, frames, tokens, grid, num_clusters, forward.share_cfg)
        else:
            clusters = cluster_tokens(self.clustering, tokens, grid, num_clusters, forward.share_cfg)
        forward.assignments[key] = clusters
        return clusters, True

    @eager_in_compiled_blocks
    def assigned(self, tokens: Tensor) -> Assigned | None:
        """For a layer of self-attention that gets Tensor[B, N, C]; None where it runs unreduced."""
        forward = self.running()
        running = forward.stack
        if running is None or not running.reached or running.scope != "attention":
            return None
        num_clusters, num_tokens = self.num_clusters(forward, running), tokens.shape[1]
        if num_clusters == math.prod(running.grid):
            self.leave(forward, running.stack, num_tokens)
            return None
        clusters = self.assign(forward, running, tokens)
        num_queries = self.config.queries_for(num_tokens, forward.level_of(running.grid), num_clusters)
        if num_queries in (num_clusters, num_tokens):
            return Assigned(clusters, clusters if num_queries == num_clusters else None)
        return Assigned(clusters, self._clusters(forward, running, tokens, num_queries)[0])

    def merged(self, forward: ForwardState, running: StackState, tokens: Tensor) -> Tensor:
        """The representatives of the tokens that a stack is about to run on."""
        clusters = self.assign(forward, running, tokens)
        representatives = clusters.merge(tokens)
        running.clusters, running.kept, running.start = clusters, tokens, representatives
        return representatives

    def unmerged(self, running: StackState, representatives: Tensor) -> Tensor:
        """All tokens after a stack: each adds what its representative gained."""
        assert running.kept is not None and running.start is not None
        return running.kept + self.gained(running, representatives - running.start)

    def gained(self, running: StackState, gained: Tensor) -> Tensor:
        """What all tokens add where representatives gained Tensor[B, M, C]."""
        assert running.clusters is not None
        additions, of_each = self.running().additions, running.clusters.unmerge(gained)
        apart = None if additions is None else additions.apart(running.stack.name)
        return of_each if apart is None else apart + of_each

    @torch.no_grad()
    def keep(self, running: StackState, added: Tensor) -> None:
        """After a stack that ran on all tokens and added Tensor[B, N, C] to them: on representatives, too."""
        forward = self.running()
        assert forward.additions is not None
        if self.config.between == "nothing":
            forward.additions.keep(running.stack.name, added)
            return
        again = StackState(running.stack, running.grid, running.scope, running.number, reached=True, call=running.call)
        state = dataclasses.replace(forward, reduce=True, recomputing=True, stack=again)
        with self.forwards.resumed(state):
            gained = self.replay(state, again, running)
        assert again.clusters is not None
        self.records[running.stack.name].ran_again(math.prod(running.grid), self.num_clusters(state, again))
        forward.additions.keep(running.stack.name, added, again.clusters, gained)

    def replay(self, forward: ForwardState, again: StackState, running: StackState) -> Tensor:
        """What representatives gain in a stack that ran on all tokens, Tensor[B, M, C]; `again` gets their clusters."""
        assert running.kept is not None
        representatives = self.start(forward, again, running.kept)
        return replayed(running.calls, representatives, partial(self.with_bias, again)) - representatives

    def start(self, forward: ForwardState, running: StackState, tokens: Tensor) -> Tensor:
        """The representatives for the first block, with what weighs them."""
        representatives = self.merged(forward, running, tokens)
        running.key_bias = key_bias(running.clusters, tokens)
        return representatives

    def with_bias(self, running: StackState, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A block's arguments with the weights of its representatives, where it takes them as a mask."""
        raise NotImplementedError

    def leave(self, forward: ForwardState, stack: Stack, num_tokens: int, reason: str | None = None) -> None:
        """A stack runs unreduced. reason: why, where it is not for the size of its grid."""
        if forward.recomputing:
            return
        record, frames = self.records[stack.name], frames_of(stack)
        record.attended = 1 if frames is None else len(frames.sources[0])
        record.unreduced(num_tokens)
        if torch.compiler.is_compiling():
            return
        if reason is not None:
            self.left_whole[stack.name] = reason
        elif forward.reduce:
            forward.most_unreduced = max(forward.most_unreduced, num_tokens)

    # What is said, once

    def say_once(self, message: str, *args: Any) -> None:
        """Logs a warning, once for each message."""
        text = message % args
        if text not in self.said:
            self.said.add(text)
            log.warning("%s: %s", type(self.network).__name__, text)


def reducers_of(target: Any) -> list[tuple[str, NetworkReducer]]:
    """The reducers on `target` and its parts with their paths, each once."""
    found = {
        id(vars(module)[ATTRIBUTE]): (".".join(filter(None, (part, path))), vars(module)[ATTRIBUTE])
        for part, root in modules_of(target)
        for path, module in root.named_modules()
        if ATTRIBUTE in vars(module)
    }
    return list(found.values())
