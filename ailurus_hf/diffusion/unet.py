"""UNetReducer: stacks of transformer blocks between convolutions, as in UNets and ControlNets.

With scope="blocks" there are two ways. projections="all": tokens are merged before the first block and unmerged after
the last; each token adds what its representative gained in between. projections="merged": the whole Transformer2DModel
runs on the representatives, as on an image of one row, and each pixel adds what its representative gained.

Self-attention gets the count bias through the blocks' own attention mask, so it runs on whatever processor is there.
With scope="attention" it runs on an AiluRusProcessor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AiluRusError
from .calls import NetworkCall, with_argument
from .checkpointing import keep_state_in_checkpoints
from .compiled_blocks import eager_in_compiled_blocks
from .forward_state import ForwardState, StackState, key_bias
from .inner_layers import InnerLayers
from .reducer import NetworkReducer
from .replay import call_without_tokens
from .skipping import with_kept
from .stacks import BLOCK_MASK_POSITION, CROSS_ATTENTION_ON, Stack, other_cross_processor, self_attentions, takes_mask


class UNetReducer(NetworkReducer):
    """Reduces one UNet or ControlNet."""

    def install(self) -> None:
        super().install()
        in_order = sorted((stack.name for stack in self.stacks), key=_part_of_unet)
        self.numbers = {name: number for number, name in enumerate(in_order)}
        for stack in self.stacks:
            self.hooks.pre_forward(stack.module, partial(self.arrive, stack))
            if self.config.has_scope("blocks"):
                self._install_on_blocks(stack)
            self.hooks.post_forward(stack.module, self.depart, always_call=True)
        if self.config.has_scope("attention"):
            self.reduce_self_attention()
        self.inner_stacks: set[str] = set()
        if (self.config.inner_every or 1) > 1:
            layers = InnerLayers(self.network, self.hooks, self.forwards)
            self.inner_stacks = {stack.name for stack in self.stacks if layers.has(stack.name)}

    def begin(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        super().begin(network, args, kwargs)
        for stack in filter(self._is_skipped, self.stacks):
            record = self.records[stack.name]
            if record.last_tokens is not None:
                self.running().skips = True
                record.skipped(record.last_tokens)

    def runs_in_some_steps(self, stack: Stack) -> bool:
        return stack.name in self.inner_stacks

    def _is_skipped(self, stack: Stack) -> bool:
        layers = self.running().layers
        return layers is not None and layers.skips and self.runs_in_some_steps(stack)

    def _install_on_blocks(self, stack: Stack) -> None:
        if self._merges_maps(stack):
            self.hooks.post_forward(stack.norm, self.give_merged_map)
            self.hooks.post_forward(stack.module, self.unmerge_map)
            return
        if self.config.between == "nothing":
            self.skipping.install(stack.blocks)
        self.hooks.pre_forward(stack.blocks[0], self.merge_tokens)
        for block in stack.blocks:
            self.hooks.pre_forward(block, self.add_bias)
        # Prepended, so that hooks that were there before see all N tokens.
        self.hooks.post_forward(stack.blocks[-1], self.unmerge_tokens, prepend=True)

    def _merges_maps(self, stack: Stack) -> bool:
        return stack.on_maps and self.config.projections == "merged"

    def refuse(self, call: NetworkCall) -> None:
        given = call.argument("cross_attention_kwargs") or {}
        for name in ("ip_adapter_masks", "gligen"):
            if given.get(name) is not None:
                raise AiluRusError(f"{name} in cross_attention_kwargs cannot follow merged tokens: call without them")

    # Around a stack

    @eager_in_compiled_blocks
    def arrive(self, stack: Stack, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before a stack: what is to be done with it."""
        forward = self.running()
        hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
        # Plain numbers also where torch.compile would keep sizes symbolic.
        height, width = (int(side) // stack.patch for side in hidden_states.shape[-2:])
        grid, forward.stack = (height, width), None
        if self._is_skipped(stack):
            return None
        level = forward.level_of(grid)
        scope = self.config.scope_at(level)
        if not torch.compiler.is_compiling():
            self.last_levels[stack.name] = level
        running = StackState(stack, grid, scope, self.numbers[stack.name], reached=True)
        again = not forward.arrive_at(stack) or (forward.share_cfg and hidden_states.shape[0] % 2 == 1)
        if again and self._reduced_to(forward, running) < height * width:
            raise AiluRusError(
                f"{stack.name} of {type(self.network).__name__} is called with {hidden_states.shape[0]} images, a part "
                "of its batch: in such parts, as enable_free_noise_split_inference makes them, one would get the "
                f"clusters of another. Leave that out, or set min_tokens above {height * width}"
            )
        checkpoints = torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False)
        if scope == "attention":
            # Its processor asks for the clusters of the stack that is running.
            forward.stack = running
            if checkpoints:
                keep_state_in_checkpoints(module, self.forwards)
            return None
        running.whole = self.keeps_additions(forward, running)
        if self.num_clusters(forward, running) == height * width and not running.whole:
            self.leave(forward, stack, height * width)
            return None
        if self.runs_nothing(forward, running):
            forward.stack = running if running.skipped else None
            return None
        if (other := self._other_processor(stack)) is not None:
            self.leave(forward, stack, height * width, f"left whole: {other}")
            return None
        self._refuse_blocks(stack, checkpoints, args, kwargs)
        forward.stack = running
        if running.whole:
            running.kept = hidden_states
            if self._merges_maps(stack):
                running.calls.append(call_without_tokens(module, args, kwargs))
            self.leave(forward, stack, height * width)
            return None
        return self._merge_map(forward, running, hidden_states, args, kwargs) if self._merges_maps(stack) else None

    def _refuse_blocks(self, stack: Stack, checkpoints: bool, args: tuple, kwargs: dict) -> None:
        """Raises AiluRusError where the blocks of a stack cannot run on merged tokens."""
        if checkpoints and not self._merges_maps(stack):
            raise AiluRusError("gradient checkpointing runs blocks again on their own: use projections='merged'")
        position = stack.mask_position
        given = args[position] if position is not None and len(args) > position else kwargs.get("attention_mask")
        if given is not None:
            raise AiluRusError("an attention mask cannot follow merged tokens: call the network without one")

    @eager_in_compiled_blocks
    def depart(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After a stack, also where it raised."""
        if (forward := self.forwards.current) is not None:
            forward.stack = None

    def _other_processor(self, stack: Stack) -> str | None:
        """The class of a processor in the stack that AiluRus does not know to take the bias, or representatives."""
        for layer in self_attentions([stack]).values():
            if not takes_mask(layer):
                other = type(layer.processor).__name__
                self.say_once(
                    "%s runs on all tokens, as its self-attention is on %s, of which AiluRus does not know whether it "
                    "runs the whole batch and takes a mask",
                    stack.name,
                    other,
                )
                return other
        cross = other_cross_processor([stack])
        if cross is not None:
            self.say_once(CROSS_ATTENTION_ON, stack.name, cross)
        return cross

    # projections="all"

    @eager_in_compiled_blocks
    def merge_tokens(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        forward = self.running()
        running = forward.stack
        if running is None or running.scope == "attention":
            return None
        tokens: Tensor = args[0] if args else kwargs["hidden_states"]
        if running.whole or running.skipped:
            running.kept = tokens
            return None
        return with_argument(args, kwargs, 0, "hidden_states", self.start(forward, running, tokens))

    @eager_in_compiled_blocks
    def add_bias(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        running = self.running().stack
        if running is not None and running.whole and self.config.between == "representatives":
            running.calls.append(call_without_tokens(block, args, kwargs))
        return None if running is None or running.key_bias is None else self.with_bias(running, block, args, kwargs)

    def with_bias(self, running: StackState, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return with_argument(args, kwargs, BLOCK_MASK_POSITION, "attention_mask", running.key_bias)

    @eager_in_compiled_blocks
    def unmerge_tokens(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        forward = self.running()
        running = forward.stack
        if running is not None and running.whole:
            assert running.kept is not None
            self.keep(running, output - running.kept)
            return None
        if running is not None and running.skipped:
            return with_kept(forward, running)
        return None if running is None or running.clusters is None else self.unmerged(running, output)

    # projections="merged"

    def _merge_map(
        self, forward: ForwardState, running: StackState, hidden_states: Tensor, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        # Normalized over all pixels: statistics of the representatives would be others.
        tokens = running.stack.norm(hidden_states).flatten(2).transpose(1, 2)
        merged = self.merged(forward, running, tokens).transpose(1, 2).unsqueeze(2)
        running.kept, running.start, running.key_bias = hidden_states, merged, key_bias(running.clusters, tokens)
        # The module adds its input to its output: from zeros, the output is the gain.
        zeros = hidden_states.new_zeros(()).expand_as(merged)
        args, kwargs = with_argument(args, kwargs, 0, "hidden_states", zeros)
        position = running.stack.mask_position
        assert position is not None
        return with_argument(args, kwargs, position, "attention_mask", running.key_bias)

    def replay(self, forward: ForwardState, again: StackState, running: StackState) -> Tensor:
        if not self._merges_maps(running.stack):
            return super().replay(forward, again, running)
        assert running.kept is not None
        [(module, args, kwargs)] = running.calls
        args, kwargs = self._merge_map(forward, again, running.kept, args, kwargs)
        gained: Tensor = module.forward(*args, **kwargs)[0]
        return gained.squeeze(2).transpose(1, 2)

    @eager_in_compiled_blocks
    def give_merged_map(self, norm: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        forward = self.forwards.current
        running = None if forward is None else forward.stack
        # `_merge_map` calls the norm itself, before there is anything to give.
        return None if running is None or running.key_bias is None else running.start

    @eager_in_compiled_blocks
    def unmerge_map(self, module: nn.Module, args: tuple, output: Any) -> Any:
        running = self.running().stack
        if running is None or running.kept is None:
            return None
        if running.whole:
            self.keep(running, (output[0] - running.kept).flatten(2).transpose(1, 2))
            return None
        if running.clusters is None:
            return None
        gained = self.gained(running, output[0].squeeze(2).transpose(1, 2))
        restored = running.kept + gained.transpose(1, 2).reshape(running.kept.shape)
        return (restored,) if isinstance(output, tuple) else type(output)(sample=restored)


def _part_of_unet(path: str) -> int:
    """Where a stack is in the order in which they run: modules are listed as they were made, the middle last."""
    parts = ("down_blocks", "mid_block", "up_blocks")
    part = path.partition(".")[0]
    return parts.index(part) if part in parts else 0
