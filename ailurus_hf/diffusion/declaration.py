"""DiffusionNetwork: what AiluRus has to know of a class of networks, and OwnProcessor, of its attention.

`declarations.py` holds those of diffusers' networks, `networks.py` finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from torch import nn

from ..clusters import TokenClusters
from ..errors import AiluRusError
from .calls import NetworkCall
from .flops import block_flops
from .grids import GridReader, LatentGrid
from .joint import JointProcessor
from .rotary import Rotary
from .token_order import IMAGE_ONLY, TokenOrder


@dataclass(frozen=True)
class OwnProcessor:
    """Attention that gets the counts through a processor of ours, as its own takes no bias on the keys.

    Args:
        processor: ours.
        stands_in_for: the processors that it does the same as, by class.
        kwargs: the argument of the network's forward that processors are given more with.
        rotary: the rotary embedding of text and representatives; None: where blocks get one of their tokens, it is
            drawn on from token to token to each cluster's mean position, which is right where positions are even.

    Example:
        DiffusionNetwork(MyTransformer, token_order=IMAGE_FIRST, attention=OwnProcessor())
    """

    processor: type[JointProcessor] = JointProcessor
    stands_in_for: tuple[type, ...] = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0)
    kwargs: str = "joint_attention_kwargs"
    rotary: Callable[[NetworkCall, TokenClusters, tuple[int, ...]], Rotary] | None = None


@dataclass(frozen=True)
class DiffusionNetwork:
    """What AiluRus has to know of a class of networks.

    Args:
        network: the class; its subclasses follow it where they have no declaration of their own.
        layout: "tokens" (the network is one stack of blocks on image tokens) or "maps" (every Transformer2DModel in it
            is a stack, as in UNets).
        blocks: for "tokens", the paths of its lists of blocks, in the order in which they run. A block takes
            `hidden_states` first; its self-attention is `attn1`, or `attn` and `attn2`.
        patch: rows and columns of the latents that are one token; None: the config's `patch_size`.
        grid: makes what reads the grid of a call; by default the sides of the latents over the patch size. Where its
            attribute `references` is True, tokens of packed latents, Tensor[B, L, C], after those of the grid are of
            reference images, which stay as they are.
        token_order: where image and text tokens stand in attention: IMAGE_ONLY, IMAGE_FIRST or TEXT_FIRST; or what
            reads it from a call, where it differs from image to image.
        attention: "mask" where blocks take `attention_mask`, Tensor[B, 1, M], and hand it to self-attention, as
            BasicTransformerBlock does; else OwnProcessor(...).
        gives_image_first: whether blocks of joint attention return image and text, and not text and image.
        unmerge_before: path of the module that needs all tokens again; None: they are back after the last block.
        unmerge_before_each: paths of lists of modules, of which each needs all tokens as one block gave them, as in
            ControlNets.
        by_token: arguments of its blocks that hold one value for all tokens of the image, and others for those of
            reference images, Tensor[B, L].
        modulation: the argument of its blocks that holds something for each token, Tensor[B, N, ...], where the network
            is called with a timestep for each, Tensor[B, N]. A cluster gets the mean of its tokens'.
        refuses: raises AiluRusError on calls that cannot follow merged tokens.
        guides_by_halves: False where the pipelines guide by a second call of the network, and not by a batch of two
            halves.
        flops: FLOPs of one block; see `flops.py`.

    Raises:
        AiluRusError: the network is no class of modules, or layout and attention do not go together.

    Example:
        DiffusionNetwork(MyTransformer, blocks=("layers",))
    """

    network: type
    layout: Literal["tokens", "maps"] = "tokens"
    blocks: tuple[str, ...] = ("transformer_blocks",)
    patch: int | None = None
    grid: Callable[[], GridReader] = LatentGrid
    token_order: TokenOrder | Callable[[NetworkCall], TokenOrder] = IMAGE_ONLY
    attention: Literal["mask"] | OwnProcessor = "mask"
    gives_image_first: bool = False
    unmerge_before: str | None = None
    unmerge_before_each: tuple[str, ...] = ()
    by_token: tuple[str, ...] = ()
    modulation: str | None = None
    refuses: Callable[[NetworkCall], None] | None = None
    guides_by_halves: bool = True
    flops: Callable[[Any, int, int, int, int, int], float] = field(default=block_flops)

    def __post_init__(self) -> None:
        if not (isinstance(self.network, type) and issubclass(self.network, nn.Module)):
            raise AiluRusError(f"network must be a class of torch modules, got {self.network!r}")
        if self.layout not in ("tokens", "maps"):
            raise AiluRusError(f"layout must be 'tokens' or 'maps', got {self.layout!r}")
        if self.attention != "mask" and not isinstance(self.attention, OwnProcessor):
            raise AiluRusError(f"attention must be 'mask' or OwnProcessor(...), got {self.attention!r}")
        if self.layout == "maps" and self.attention != "mask":
            raise AiluRusError("the stacks of layout='maps' take a mask: leave attention='mask'")
