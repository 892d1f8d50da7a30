"""Stacks of transformer blocks on representatives: hooks around a stack, in one of two ways where its scope is "blocks".

projections="all": tokens are merged before the first block and restored after the last; each token adds what its
representative gained in between. projections="merged": the whole Transformer2DModel runs on the representatives, as
on an image of one row, and each pixel adds what its representative gained.

Self-attention gets the count bias through the blocks' own attention mask, so it runs on whatever processor is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..clusters import TokenClusters
from ..errors import AiluRusError
from .backend import BLOCK_MASK_POSITION, Stack
from .frames import JointClusters
from .reducer import Attending, NetworkReducer, level_of
from .store import Run


@dataclass
class Merged:
    """What a reduced stack carries from its first hook to its last.

    kept: what all N tokens keep, [B, N, C] or [B, C, H, W]. start: the representatives that the gain is counted from.
    """

    clusters: TokenClusters | JointClusters
    kept: Tensor
    start: Tensor
    bias: Tensor


@dataclass
class Arriving:
    """A stack that is to be reduced and has not met the first block to be."""

    grid: tuple[int, int]
    scope: str


class StackHooks:
    """The hooks of one stack; they find the run of their thread through the reducer."""

    def __init__(self, reducer: NetworkReducer, stack: Stack) -> None:
        self.reducer, self.stack = reducer, stack

    def install(self) -> None:
        reducer, stack = self.reducer, self.stack
        reducer.hooks.pre_forward(stack.module, self.arrive)
        reduced = stack.blocks[reducer.first_reduced(stack) :]
        if not reducer.config.has_scope("blocks"):
            if not stack.on_maps:
                reducer.hooks.pre_forward(reduced[0], self.merge_tokens)
            return
        if self._merges_maps:
            reducer.hooks.post_forward(stack.module.norm, self.give_merged_map)  # type: ignore
            reducer.hooks.post_forward(stack.module, self.restore_map)
            return
        reducer.hooks.pre_forward(reduced[0], self.merge_tokens)
        for block in reduced:
            reducer.hooks.pre_forward(block, self.add_bias)
        # Prepended, so that hooks that were there before see all N tokens.
        reducer.hooks.post_forward(stack.blocks[-1], self.restore_tokens, prepend=True)

    @property
    def _merges_maps(self) -> bool:
        return self.stack.on_maps and self.reducer.config.projections == "merged"

    def arrive(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        run = self.reducer.store.run
        assert run is not None
        hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
        # Plain numbers also where torch.compile would keep sizes symbolic.
        height, width = (int(side) // self.stack.patch for side in hidden_states.shape[-2:])
        grid, run.current = (height, width), None
        level = level_of(run, grid)
        scope = self.reducer.config.scope_at(level)
        if not torch.compiler.is_compiling():
            self.reducer.last_levels[self.stack.name] = level
        if scope == "attention":
            # The processor asks for the clusters of the stack that is running.
            run.current = Attending(self.stack, grid) if self.stack.on_maps else Arriving(grid, scope)
            return None
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False) and not self._merges_maps:
            raise AiluRusError("gradient checkpointing runs blocks again on their own: use projections='merged'")
        if self.reducer.num_clusters(run, grid) == height * width:
            self.reducer.leave(run, self.stack, height * width)
            return None
        self._refuse_mask(args, kwargs, self.stack.mask_position)
        if self._merges_maps:
            return self._merge_map(run, grid, hidden_states, args, kwargs)
        run.current = Arriving(grid, scope)
        return None

    # projections="all"

    def merge_tokens(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        run = self.reducer.store.run
        if run is None:
            if not self.reducer.config.has_scope("blocks"):
                return None
            raise AiluRusError(
                "a transformer block was called outside a forward of its network. Where blocks are compiled one by one, "
                "compile the network instead, or use projections='merged'"
            )
        if not isinstance(run.current, Arriving):
            return None
        if run.current.scope == "attention":
            run.current = Attending(self.stack, run.current.grid)
            return None
        tokens = args[0] if args else kwargs["hidden_states"]
        clusters = self.reducer.assign(run, self.stack, run.current.grid, tokens)
        merged = clusters.merge(tokens)
        run.current = Merged(clusters, tokens, merged, _bias(clusters, tokens))
        return with_argument(args, kwargs, 0, "hidden_states", merged)

    def add_bias(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        run = self.reducer.store.run
        if run is None or not isinstance(run.current, Merged):
            return None
        return with_argument(args, kwargs, BLOCK_MASK_POSITION, "attention_mask", run.current.bias)

    def restore_tokens(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        run = self.reducer.store.run
        if run is None or not isinstance(run.current, Merged):
            return None
        state, run.current = run.current, None
        return state.kept + state.clusters.unmerge(output - state.start)

    # projections="merged"

    def _merge_map(
        self, run: Run, grid: tuple[int, int], hidden_states: Tensor, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        # Normalized over all pixels: statistics of the representatives would be others.
        tokens = self.stack.module.norm(hidden_states).flatten(2).transpose(1, 2)  # type: ignore[operator]
        clusters = self.reducer.assign(run, self.stack, grid, tokens)
        merged = clusters.merge(tokens).transpose(1, 2).unsqueeze(2)
        # The module adds its input to its output: from zeros, the output is the gain.
        zeros = hidden_states.new_zeros(()).expand_as(merged)
        run.current = Merged(clusters, hidden_states, merged, _bias(clusters, tokens))
        args, kwargs = with_argument(args, kwargs, 0, "hidden_states", zeros)
        return with_argument(args, kwargs, self.stack.mask_position, "attention_mask", run.current.bias)

    def give_merged_map(self, norm: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        run = self.reducer.store.run
        return run.current.start if run is not None and isinstance(run.current, Merged) else None

    def restore_map(self, module: nn.Module, args: tuple, output: Any) -> Any:
        run = self.reducer.store.run
        if run is None or not isinstance(run.current, Merged):
            return None
        state, run.current = run.current, None
        gained = state.clusters.unmerge(output[0].squeeze(2).transpose(1, 2))
        restored = state.kept + gained.transpose(1, 2).reshape(state.kept.shape)
        return (restored,) if isinstance(output, tuple) else type(output)(sample=restored)

    # Both

    def _refuse_mask(self, args: tuple, kwargs: dict, position: int) -> None:
        given = args[position] if len(args) > position else kwargs.get("attention_mask")
        if given is not None:
            raise AiluRusError("an attention mask cannot follow merged tokens: call the network without one")


def _bias(clusters: TokenClusters | JointClusters, tokens: Tensor) -> Tensor:
    """Log counts as blocks take a bias on self-attention: Tensor[B, 1, M]."""
    return clusters.log_counts()[:, None, :].to(tokens.dtype)


def with_argument(args: tuple, kwargs: dict, position: int, name: str, value: Any) -> tuple[tuple, dict]:
    """The arguments with one of them replaced, wherever it stood."""
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}
