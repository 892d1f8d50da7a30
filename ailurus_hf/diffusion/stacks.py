"""Stacks of transformer blocks: where they are in a network, and their layers of self-attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .backend import CROSS_PROCESSORS, PLAIN_PROCESSORS
from .calls import argument_names
from .frames import Frames
from .networks import DiffusionNetwork, declaration_of
from .rebuildable import RebuildableProcessor

# Called by an attention layer with itself and with what it got.
Processor = Callable[..., Tensor | tuple[Tensor, ...]]


class AttentionLayer(Protocol):
    """What diffusers' attention layers have in common."""

    processor: Processor

    def set_processor(self, processor: Processor) -> None: ...


@dataclass(frozen=True, eq=False)
class Stack:
    """Transformer blocks that follow one another on the tokens of one grid.

    Args:
        name: its path in the network.
        module: what holds it: a Transformer2DModel, a TransformerSpatioTemporalModel, or the network itself.
        blocks: its transformer blocks, and `block_names` their paths.
        patch: how many rows and columns of the latents, or of the map that `module` gets, are one token.
        mask_position: where `module.forward` takes its attention mask, None where it takes none.
    """

    name: str
    module: nn.Module
    blocks: list[nn.Module]
    block_names: list[str]
    patch: int
    mask_position: int | None = None

    @property
    def on_maps(self) -> bool:
        """Whether it goes from a map to a map of the same size: normalized, projected, blocks, projected, added."""
        return isinstance(self.module, Transformer2DModel) and bool(self.module.is_input_continuous)

    @property
    def norm(self) -> nn.Module:
        """The first norm of a stack on maps."""
        return self.module.get_submodule("norm")

    @property
    def in_channels(self) -> int:
        """Channels of the map that a stack on maps gets."""
        return int(cast(Any, self.module).config.in_channels)


# Where BasicTransformerBlock takes its attention mask.
BLOCK_MASK_POSITION = list(inspect.signature(BasicTransformerBlock.forward).parameters).index("attention_mask") - 1


# What is said of a stack, by name, that is left whole for a processor.
CROSS_ATTENTION_ON = (
    "%s runs on all tokens, as its cross-attention is on %s, which may keep where each of them attends to: use "
    "scope='attention'"
)


def find_stacks(network: nn.Module) -> list[Stack]:
    """The stacks of a declared network whose blocks can be reduced; UnsupportedModelError if there is none."""
    declared = declaration_of(network)
    if declared is None:
        raise UnsupportedModelError(f"{type(network).__name__} is not declared: see register_network")
    stacks = _stacks_on_maps(network) if declared.layout == "maps" else [_stack_of_tokens(network, declared)]
    stacks = [stack for stack in stacks if stack.blocks]
    if not stacks:
        raise UnsupportedModelError(
            f"{type(network).__name__} has no transformer blocks with plain self-attention over image tokens "
            "(blocks of cross-attention alone and of gated attention cannot be reduced)"
        )
    return stacks


def largest_level(network: Any, stacks: list[Stack]) -> int | None:
    """The level of a UNet's largest grid with tokens; None of networks on one grid."""
    reached = [int(stack.name.split(".")[1]) for stack in stacks if stack.name.startswith("down_blocks.")]
    if not reached:
        return None
    # Those of ControlNet-XS have a downsampler in each of two networks, which other names begin.
    halved = (
        any(name.endswith("downsamplers") for name, part in block.named_children() if part)
        for block in network.down_blocks[: min(reached)]
    )
    return int(2 ** sum(halved))


def _stacks_on_maps(network: nn.Module) -> list[Stack]:
    stacks = []
    for name, module in network.named_modules():
        if isinstance(module, Transformer2DModel) and not getattr(module, "is_input_vectorized", False):
            position = argument_names(module).index("attention_mask")
            patch = 1 if module.is_input_continuous else int(cast(Any, module).config.patch_size)
        elif isinstance(module, TransformerSpatioTemporalModel) and len(module.transformer_blocks) == 1:
            # Where it holds more, there are temporal blocks between them.
            position, patch = None, 1
        else:
            continue
        blocks = list(cast(nn.ModuleList, module.transformer_blocks))
        if all(map(_is_plain, blocks)):
            names = [f"transformer_blocks.{number}" for number in range(len(blocks))]
            stacks.append(Stack(name, module, blocks, names, patch, position))
    return stacks


def _stack_of_tokens(network: nn.Module, declared: DiffusionNetwork) -> Stack:
    found = {
        f"{path}.{number}": block
        for path in declared.blocks
        for number, block in enumerate(cast(nn.ModuleList, network.get_submodule(path)))
    }
    patch = declared.patch
    if patch is None:
        size: Any = cast(Any, network).config.patch_size
        patch = int(size if isinstance(size, int) else size[-1])
    blocks = list(found.values())
    if any(isinstance(block, BasicTransformerBlock) and not _is_plain(block) for block in blocks):
        blocks = []
    return Stack("", network, blocks, list(found), patch)


def _is_plain(block: nn.Module) -> bool:
    return (
        isinstance(block, BasicTransformerBlock)
        and not block.only_cross_attention
        and not block.double_self_attention
        and block.pos_embed is None
        and not hasattr(block, "fuser")
    )


def self_attentions(stacks: Iterable[Stack]) -> dict[str, AttentionLayer]:
    """The self-attention layers of stacks, by path."""
    return {
        f"{stack.name}.{block_name}.{name}".lstrip("."): getattr(block, name)
        for stack in stacks
        for block_name, block in zip(stack.block_names, stack.blocks)
        for name in _attention_names(block)
    }


def _attention_names(block: nn.Module) -> tuple[str, ...]:
    """`attn1` beside cross-attention in `attn2`; or joint attention in `attn`, the image's own in `attn2` (SD3.5)."""
    alone = next((name for name in ("attn1", "self_attention", "attention") if hasattr(block, name)), None)
    names = ("attn", "attn2") if alone is None else (alone,)
    return tuple(name for name in names if getattr(block, name, None) is not None)


def takes_mask(layer: AttentionLayer) -> bool:
    """Whether a layer of self-attention is known to run the whole batch and to take a bias on its keys as a mask."""
    return type(layer.processor) in PLAIN_PROCESSORS or isinstance(layer.processor, RebuildableProcessor)


def other_cross_processor(stacks: Iterable[Stack], known: tuple[type, ...] = ()) -> str | None:
    """The class of a processor of cross-attention that may not take representatives as its queries; None: of none.

    Args:
        known: those that may, beside diffusers' plain ones.
    """
    blocks = (block for stack in stacks for block in stack.blocks)
    names = {"attn1": "attn2", "self_attention": "cross_attention"}
    layers = (getattr(block, names.get(next(iter(_attention_names(block)), ""), ""), None) for block in blocks)
    for processor in (layer.processor for layer in layers if layer is not None):
        if type(processor) not in (*CROSS_PROCESSORS, *known) and not isinstance(processor, RebuildableProcessor):
            return type(processor).__name__
    return None


def frames_of(stack: Stack) -> Frames | None:
    """The frames that a batch holds, where the stack's self-attention runs on a CrossFrameProcessor."""
    layer = getattr(stack.blocks[0], "attn1", None)
    return getattr(getattr(layer, "processor", None), "frames", None)


def convolution_norms(network: nn.Module) -> list[nn.GroupNorm]:
    """The group norms around a network's convolutions: of its ResNet blocks, and before its last convolution."""
    blocks: list[Any] = [module for module in network.modules() if isinstance(module, ResnetBlock2D)]
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    norms.append(getattr(network, "conv_norm_out", None))
    return [norm for norm in norms if isinstance(norm, nn.GroupNorm)]
