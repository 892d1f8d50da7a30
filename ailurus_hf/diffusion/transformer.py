"""TransformerReducer: networks that are one stack of transformer blocks on image tokens, as PixArt, SD3, Flux and Wan.

scope="blocks": image tokens are merged after block `cluster_location` and unmerged after the last; each adds what its
representative gained. scope="attention": in these blocks queries, keys and values of the image are merged. Text tokens
stay as they are, also where they are in one sequence with the image's. Self-attention gets the counts as a mask, or
runs on a JointProcessor: the declaration says which.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..clustering import ClusterFunction
from ..clusters import TokenClusters
from ..config import AiluRusDiffusionConfig
from ..errors import AiluRusError, UnsupportedModelError
from .caches import refuse_caches
from .calls import NetworkCall, argument_names, with_argument
from .checkpointing import keep_state_in_checkpoints
from .compiled_blocks import eager_in_compiled_blocks
from .forward_state import ForwardState, StackState
from .joint import JointProcessor, JointReduction
from .networks import DiffusionNetwork, OwnProcessor
from .of_tokens import of_representatives
from .reducer import NetworkReducer
from .replay import call_without_tokens, replayed_jointly
from .rotary import Rotary, at_centroids
from .skipping import with_kept
from .stacks import CROSS_ATTENTION_ON, other_cross_processor, self_attentions, takes_mask
from .token_order import IMAGE_FIRST, TokenOrder

# The arguments of blocks that hold a rotary embedding of their tokens.
EMBEDDINGS = ("image_rotary_emb", "rotary_emb", "freqs_cis", "rope")
CONTROLS = ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")


class TransformerReducer(NetworkReducer):
    """Reduces one transformer."""

    def __init__(
        self,
        network: nn.Module,
        declared: DiffusionNetwork,
        config: AiluRusDiffusionConfig,
        clustering: ClusterFunction,
    ) -> None:
        super().__init__(network, declared, config, clustering)
        self.stack, self.own = self.stacks[0], declared.attention
        self.read_grid = declared.grid()
        self.mask_positions: dict[type, int] = {}
        self.tokens_names: dict[type, str] = {}
        self.block_arguments = {type(block): argument_names(block) for block in self.stack.blocks}
        reduced = self.stack.blocks[self.first_reduced(self.stack) :]
        self.numbers = {block: number for number, block in enumerate(reduced)}
        if config.block_factors is not None and config.has_scope("blocks"):
            raise AiluRusError(
                f"block_factors={config.block_factors} cannot be: {type(network).__name__} merges once for all of its "
                "blocks with scope='blocks': use scope='attention', or leave them out"
            )
        if isinstance(self.own, OwnProcessor):
            self._check_processors(self.own)
            if config.query_ratio is not None:
                raise AiluRusError(
                    f"query_ratio={config.query_ratio} cannot be: {type(network).__name__} merges queries as keys and "
                    "values are, or not at all with reduce='kv'"
                )
        else:
            self._find_masks()

    def _check_processors(self, own: OwnProcessor) -> None:
        if self.config.levels:
            raise AiluRusError(
                f"{type(self.network).__name__} has one resolution: leave levels out (presets: preset(name, "
                f"network='transformer')), got {self.config.levels!r}"
            )
        for name, layer in self_attentions(self.stacks).items():
            # A subclass may do something else.
            if type(layer.processor) not in own.stands_in_for and not isinstance(layer.processor, JointProcessor):
                raise UnsupportedModelError(
                    f"{name} runs on a {type(layer.processor).__name__}: it can be reduced where it runs on one of "
                    f"{', '.join(kind.__name__ for kind in own.stands_in_for)} (no IP-Adapter, no perturbed attention)"
                )

    def _find_masks(self) -> None:
        """Where each class of block takes its attention mask."""
        for kind, names in self.block_arguments.items():
            if "attention_mask" not in names:
                raise UnsupportedModelError(
                    f"{kind.__name__} takes no attention_mask: declare {type(self.network).__name__} with "
                    "attention=OwnProcessor(...)"
                )
            self.mask_positions[kind] = names.index("attention_mask")

    def install(self) -> None:
        super().install()
        if isinstance(self.own, OwnProcessor):
            processor = self.own.processor(JointClustersOfReducer(self))
            self.set_processor(processor, self_attentions(self.stacks))
        elif self.config.has_scope("attention"):
            self.reduce_self_attention()
        # On all of them: the first one may be skipped.
        for block in self.stack.blocks[self.first_reduced(self.stack) :]:
            self.hooks.pre_forward(block, self.enter_block)
        if not self.config.has_scope("blocks"):
            return
        if self.config.between == "nothing":
            self.skipping.install(self.stack.blocks[self.first_reduced(self.stack) :])
        following = self._following()
        if not following:
            # Prepended, so that hooks that were there before see all N tokens.
            self.hooks.post_forward(self.stack.blocks[-1], self.unmerge_after, prepend=True)
        for after in following:
            self.tokens_names[type(after)] = argument_names(after)[0]
            self.hooks.pre_forward(after, self.unmerge_before)

    def _following(self) -> list[nn.Module]:
        """The modules that need all tokens again."""
        declared = self.declared
        following = [] if declared.unmerge_before is None else [self.network.get_submodule(declared.unmerge_before)]
        for path in declared.unmerge_before_each:
            following += list(cast(nn.ModuleList, self.network.get_submodule(path)))
        return following

    def begin(self, network: nn.Module, args: tuple, kwargs: dict) -> None:
        call = NetworkCall(self.network, self._names, args, kwargs)
        grid = self.read_grid(call)
        super().begin(network, args, kwargs)
        forward = self.running()
        forward.latent_side = self.stack.patch * max(grid)
        scope = self.config.scope_at(forward.level_of(grid))
        if not torch.compiler.is_compiling():
            self.last_levels[self.stack.name] = forward.level_of(grid)
        if reason := self._runs_whole(scope):
            # Some layers would not weigh the representatives, so none runs on them.
            self.leave(forward, self.stack, math.prod(grid), reason)
            return
        running = StackState(self.stack, grid, scope, call=call if scope == "blocks" else None)
        running.whole = self.keeps_additions(forward, running)
        if self._reduces_nothing(forward, running):
            self.leave(forward, self.stack, math.prod(grid))
            if not running.whole:
                return
        elif self.runs_nothing(forward, running) and not running.skipped:
            return
        self._refuse_reduced(call, scope, running.whole)
        running.order = self.token_order_of(call)
        if getattr(self.read_grid, "references", False):
            references = int(call.latents.shape[1]) - math.prod(grid)
            running.order = dataclasses.replace(running.order, references=references)
        text = call.argument("encoder_hidden_states")
        if isinstance(self.own, OwnProcessor) and not torch.compiler.is_compiling():
            # All that stay as they are.
            self.text_tokens = (text.shape[1] if isinstance(text, Tensor) else 0) + running.order.references
        forward.stack = running

    def token_order_of(self, call: NetworkCall) -> TokenOrder:
        """Where image and text tokens stand in attention in a call."""
        order = self.declared.token_order
        return order if isinstance(order, TokenOrder) else order(call)

    @property
    def parts(self) -> int:
        return len(self.numbers)

    def _reduces_nothing(self, forward: ForwardState, running: StackState) -> bool:
        """Whether no block of the stack has fewer tokens."""
        numbers = range(self.parts) if running.scope == "attention" else (0,)
        each = (dataclasses.replace(running, number=number) for number in numbers)
        return min(self.num_clusters(forward, part) for part in each) == math.prod(running.grid)

    def _runs_whole(self, scope: str) -> str | None:
        own = isinstance(self.own, OwnProcessor)
        if own and self.without_processor():
            return "processor lost"
        if scope == "attention":
            return None
        others = [layer for layer in self_attentions(self.stacks).values() if not own and not takes_mask(layer)]
        if not others:
            cross = other_cross_processor(self.stacks, getattr(self.own, "stands_in_for", ()))
            if cross is not None:
                self.say_once(CROSS_ATTENTION_ON, "it", cross)
            return None if cross is None else f"left whole: {cross}"
        other = type(others[0].processor).__name__
        self.say_once(
            "runs on all tokens, as its self-attention is on %s, of which AiluRus does not know whether it runs the "
            "whole batch and takes a mask",
            other,
        )
        return f"left whole: {other}"

    def _refuse_reduced(self, call: NetworkCall, scope: str, whole: bool) -> None:
        """Raises AiluRusError on a call that cannot follow merged tokens."""
        if self.declared.refuses is not None:
            self.declared.refuses(call)
        kwargs = self.own.kwargs if isinstance(self.own, OwnProcessor) else "cross_attention_kwargs"
        given = call.argument(kwargs) or {}
        for name in ("attention_mask", "ip_adapter_image_embeds", "ip_hidden_states", "ip_adapter_masks", "gligen"):
            if given.get(name) is not None:
                raise AiluRusError(f"{name} in {kwargs} cannot follow merged tokens: call without it")
        if getattr(self.processor, "_parallel_config", None) is not None:
            raise AiluRusError(
                "context parallelism cuts the sequence, and AiluRus needs all of its tokens: switch one of them off"
            )
        network: Any = self.network
        checkpoints = torch.is_grad_enabled() and getattr(network, "gradient_checkpointing", False)
        if scope == "attention":
            if checkpoints:
                keep_state_in_checkpoints(network, self.forwards)
            return
        if self.own == "mask" and call.argument("attention_mask") is not None:
            raise AiluRusError("an attention mask cannot follow merged tokens: call the network without one")
        if checkpoints:
            raise AiluRusError(
                "gradient checkpointing runs blocks again on their own: train without it, or use scope='attention'"
            )
        if whole and self.declared.unmerge_before_each:
            raise AiluRusError(
                f"full_every={self.config.full_every} keeps what the last block gave, and {type(network).__name__} "
                "needs what each gave: leave it out, or use scope='attention'"
            )
        for name in CONTROLS:
            if call.argument(name) is not None:
                raise AiluRusError(
                    f"{name} are added to all tokens between blocks, where there are only representatives: use "
                    "scope='attention', or no ControlNet"
                )
        if not torch.compiler.is_compiling():
            refuse_caches(
                self.stack.blocks,
                "keeps what blocks did to another step's representatives: disable_cache() first, or use "
                "scope='attention'",
            )

    # Around the blocks

    @eager_in_compiled_blocks
    def enter_block(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before a block: merges at the first one, and hands on the bias to those that take it as a mask."""
        forward = self.running()
        running = forward.stack
        if running is None:
            return None
        first, running.reached = not running.reached, True
        if running.scope == "attention":
            running.number = self.numbers[block]
            return None
        if first:
            tokens = self._image_tokens(running, args[0] if args else kwargs["hidden_states"])
            self._note_embedding(running, block, args, kwargs)
        if running.whole or running.skipped:
            if first:
                running.kept = tokens
            if self.config.between == "representatives":
                running.calls.append(call_without_tokens(block, args, kwargs))
            return None
        if first:
            args, kwargs = with_argument(args, kwargs, 0, "hidden_states", self.start(forward, running, tokens))
        args, kwargs = of_representatives(self.declared, self.block_arguments[type(block)], running, args, kwargs)
        return self.with_bias(running, block, args, kwargs)

    def _image_tokens(self, running: StackState, tokens: Tensor) -> Tensor:
        """The image's of the tokens that the first block gets; the others in their sequence are kept beside them."""
        num_tokens = math.prod(running.grid)
        if tokens.shape[1] <= num_tokens or not isinstance(self.own, OwnProcessor):
            return tokens
        running.others, image = running.token_order.split(tokens, num_tokens)
        if not torch.compiler.is_compiling():
            self.text_tokens = max(self.text_tokens or 0, running.others.shape[1])
        return image

    def _note_embedding(self, running: StackState, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keeps the rotary embedding that blocks get, for that of representatives."""
        if running.call is None or not isinstance(self.own, OwnProcessor) or self.own.rotary is not None:
            return
        given = {**dict(zip(self.block_arguments[type(block)], args)), **kwargs}
        running.call.embedding = next((given[name] for name in EMBEDDINGS if given.get(name) is not None), None)

    def start(self, forward: ForwardState, running: StackState, tokens: Tensor) -> Tensor:
        if not isinstance(self.own, OwnProcessor):
            return super().start(forward, running, tokens)
        representatives = self.merged(forward, running, tokens)
        running.rotary = self._rotary(running)
        return representatives if running.others is None else running.token_order.join(running.others, representatives)

    def with_bias(self, running: StackState, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if running.key_bias is None:
            return args, kwargs
        return with_argument(args, kwargs, self.mask_positions[type(block)], "attention_mask", running.key_bias)

    def _rotary(self, running: StackState) -> Rotary | None:
        """The embedding of text and representatives."""
        call, clusters = running.call, running.clusters
        assert call is not None and isinstance(clusters, TokenClusters)
        rotary = cast(OwnProcessor, self.own).rotary
        if rotary is not None:
            return rotary(call, clusters, running.grid)
        if call.embedding is None:
            return None
        layer = next(iter(self_attentions(self.stacks).values()))
        cos, sin = cast(JointProcessor, self.processor).by_token(layer, call.embedding)
        # With a batch, as text and representatives have one; the image's own may be alone.
        batch = clusters.counts.shape[0]
        parts = [
            part.expand(batch, -1, -1) if part.ndim == 3 else part.expand(batch, *part.shape) for part in (cos, sin)
        ]
        texts, images = zip(*(running.token_order.split(part, clusters.num_tokens) for part in parts))
        joined = zip(texts, at_centroids(images, clusters, running.grid))
        cos, sin = (running.token_order.join(text, image.to(text.dtype)) for text, image in joined)
        return cos, sin

    def replay(self, forward: ForwardState, again: StackState, running: StackState) -> Tensor:
        if not isinstance(self.own, OwnProcessor):
            return super().replay(forward, again, running)
        assert running.kept is not None
        again.order, again.others = running.order, running.others
        tokens = self.start(forward, again, running.kept)
        calls = [
            (block, *of_representatives(self.declared, self.block_arguments[type(block)], again, args, kwargs))
            for block, args, kwargs in running.calls
        ]
        tokens = replayed_jointly(calls, tokens, running.token_order, self.declared.gives_image_first)
        assert again.start is not None
        return again.token_order.split(tokens, again.start.shape[1])[1] - again.start

    @eager_in_compiled_blocks
    def unmerge_after(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return self._all_tokens(output)

    @eager_in_compiled_blocks
    def unmerge_before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        name = self.tokens_names[type(module)]
        restored = self._all_tokens(args[0] if args else kwargs[name])
        return None if restored is None else with_argument(args, kwargs, 0, name, restored)

    def _all_tokens(self, tokens: Tensor) -> Tensor | None:
        """After the last block, or another one, on what it gave: all tokens again; None where it gave all of them."""
        forward = self.running()
        running = forward.stack
        if not self.declared.unmerge_before_each:
            # What comes after is no concern of the stack.
            forward.stack = None
        if running is None or not running.reached:
            return None
        if running.whole and running.kept is not None:
            self.keep(running, running.token_order.split(tokens, running.kept.shape[1])[1] - running.kept)
        if running.skipped and running.kept is not None:
            others = running.token_order.split(tokens, running.kept.shape[1])[0]
            return self._joined(running, others, with_kept(forward, running))
        if running.clusters is None or running.start is None:
            return None
        if self.declared.unmerge_before_each and tokens.shape[1] == math.prod(running.grid):
            # What a block gave before tokens were merged.
            return None
        others, representatives = running.token_order.split(tokens, running.start.shape[1])
        return self._joined(running, others, self.unmerged(running, representatives))

    def _joined(self, running: StackState, others: Tensor, image: Tensor) -> Tensor:
        return image if others.shape[1] == 0 else running.token_order.join(others, image)

    # For the processor

    @eager_in_compiled_blocks
    def joint_reduction(self, tokens: Tensor) -> JointReduction | None:
        """How a layer of joint attention is reduced that gets Tensor[B, L, C]; None where it runs as it is."""
        running = self.running().stack
        if running is None or running.whole or not running.reached:
            return None
        if running.scope == "blocks":
            assert isinstance(running.clusters, TokenClusters)
            return JointReduction(running.clusters, running.token_order, running.rotary)
        image = running.token_order.split(tokens, math.prod(running.grid))[1]
        assigned = self.assigned(image)
        if assigned is None:
            return None
        assert isinstance(assigned.clusters, TokenClusters)
        queries_too = assigned.queries is not None
        return JointReduction(assigned.clusters, running.token_order, merges=True, merges_queries=queries_too)


@dataclass(eq=False)
class JointClustersOfReducer:
    """Where a JointProcessor of `apply_ailurus` reads how it is reduced."""

    reducer: TransformerReducer

    @property
    def token_order(self) -> TokenOrder:
        """Where text is given apart."""
        order = self.reducer.declared.token_order
        return order if isinstance(order, TokenOrder) else IMAGE_FIRST

    def reduction(self, layer: nn.Module, tokens: Tensor) -> JointReduction | None:
        return self.reducer.joint_reduction(tokens)
