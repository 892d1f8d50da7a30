"""Which networks can be reduced, one declaration each; `register_network` adds more.

register_network(DiffusionNetwork(MyTransformer, blocks=("layers",)))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
)
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn

from ..clusters import TokenClusters
from ..errors import AiluRusError, UnsupportedModelError
from .backend import modules_of
from .calls import NetworkCall
from .flops import block_flops, joint_block_flops, wan_block_flops
from .grids import GridReader, IdGrid, LatentGrid
from .joint import JointProcessor, rotary_of_ids
from .rotary import Rotary
from .token_order import IMAGE_FIRST, IMAGE_ONLY, TEXT_FIRST, TokenOrder
from .wan import WanProcessor, refuse_timesteps_of_tokens, rotary_of_centroids


@dataclass(frozen=True)
class OwnProcessor:
    """Attention that gets the counts through a processor of ours, as its own takes no bias on the keys.

    Args:
        processor: ours.
        stands_in_for: the processors that it does the same as, by class.
        kwargs: the argument of the network's forward that processors are given more with.
        rotary: the rotary embedding of text and representatives; None: the network has none.

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
        grid: makes what reads the grid of a call; by default the sides of the latents over the patch size.
        token_order: where image and text tokens stand in attention: IMAGE_ONLY, IMAGE_FIRST or TEXT_FIRST.
        attention: "mask" where blocks take `attention_mask`, Tensor[B, 1, M], and hand it to self-attention, as
            BasicTransformerBlock does; else OwnProcessor(...).
        unmerge_before: path of the module that needs all tokens again; None: they are back after the last block.
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
    token_order: TokenOrder = IMAGE_ONLY
    attention: Literal["mask"] | OwnProcessor = "mask"
    unmerge_before: str | None = None
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


JOINT_KWARGS = "joint_attention_kwargs"

_DECLARED: dict[type, DiffusionNetwork] = {}


def register_network(declaration: DiffusionNetwork) -> DiffusionNetwork:
    """Has `apply_ailurus` reduce networks of a class.

    Args:
        declaration: replaces an earlier one of the same class.

    Returns:
        The declaration.

    Example:
        register_network(DiffusionNetwork(MyTransformer, blocks=("layers",)))
    """
    _DECLARED[declaration.network] = declaration
    return declaration


for _declaration in (
    DiffusionNetwork(UNet2DConditionModel, layout="maps"),
    DiffusionNetwork(ControlNetModel, layout="maps"),
    DiffusionNetwork(ControlNetUnionModel, layout="maps"),
    # Its motion modules are of another class: their tokens are frames.
    DiffusionNetwork(UNetMotionModel, layout="maps"),
    DiffusionNetwork(PixArtTransformer2DModel),
    DiffusionNetwork(DiTTransformer2DModel),
    DiffusionNetwork(
        SD3Transformer2DModel,
        grid=partial(LatentGrid, kwargs=JOINT_KWARGS),
        token_order=IMAGE_FIRST,
        attention=OwnProcessor(),
        unmerge_before="norm_out",
        flops=joint_block_flops,
    ),
    DiffusionNetwork(
        FluxTransformer2DModel,
        blocks=("transformer_blocks", "single_transformer_blocks"),
        # Its pipelines make one token of so many rows and columns of the latents.
        patch=2,
        grid=IdGrid,
        token_order=TEXT_FIRST,
        attention=OwnProcessor(stands_in_for=(FluxAttnProcessor,), rotary=rotary_of_ids),
        unmerge_before="norm_out",
        flops=joint_block_flops,
    ),
    DiffusionNetwork(
        WanTransformer3DModel,
        blocks=("blocks",),
        grid=partial(LatentGrid, axes=3, kwargs="attention_kwargs"),
        attention=OwnProcessor(WanProcessor, (WanAttnProcessor,), "attention_kwargs", rotary_of_centroids),
        unmerge_before="norm_out",
        refuses=refuse_timesteps_of_tokens,
        guides_by_halves=False,
        flops=wan_block_flops,
    ),
):
    register_network(_declaration)

# Parts of pipelines whose attention is not over latents: motion modules, which are in the UNet, too.
NO_LATENTS = ("MotionAdapter",)

# Why the better known of the others are refused, by their class.
REFUSED = {
    "SanaTransformer2DModel": "its attention is linear in the number of tokens: fewer of them gain nothing",
}


def declaration_of(module: nn.Module) -> DiffusionNetwork | None:
    """The declaration of a module's class, or of the nearest class it derives from; None where there is none."""
    return next((_DECLARED[base] for base in type(module).__mro__ if base in _DECLARED), None)


def parts_left_whole(target: Any) -> list[tuple[str, nn.Module]]:
    """The parts of a pipeline that have attention over latents and no declaration, such as some ControlNets."""
    if not isinstance(target, DiffusionPipeline):
        return []
    return [found for name, part in modules_of(target) for found in _undeclared(name, part)]


def _undeclared(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if declaration_of(module) is not None or not hasattr(module, "register_to_config"):
        return []
    if any(declaration_of(part) is not None for part in module.modules()):
        # A list of ControlNets.
        children = ((f"{name}.{path}", part) for path, part in module.named_modules() if path)
        return [found for path, part in children for found in _undeclared(path, part)]
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if ".autoencoders." in kind or kind.endswith(NO_LATENTS):
        return []
    return [(name, module)] if any(hasattr(part, "set_processor") for part in module.modules()) else []


def find_networks(target: Any) -> list[nn.Module]:
    """Every declared network in a pipeline or module, each once; raises UnsupportedModelError where there is none."""
    parts = [module for _, part in modules_of(target) for module in part.modules()]
    networks = {id(module): module for module in parts if declaration_of(module) is not None}
    if networks:
        return list(networks.values())
    supported = ", ".join(network.__name__ for network in _DECLARED)
    for module in parts:
        for base in type(module).__mro__:
            if base.__name__ in REFUSED:
                raise UnsupportedModelError(
                    f"{base.__name__} is not supported: {REFUSED[base.__name__]}. Supported networks: {supported}"
                )
    raise UnsupportedModelError(
        f"{type(target).__name__} holds no network whose tokens can be reduced. Supported networks: {supported}"
    )
