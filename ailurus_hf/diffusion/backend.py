"""The one file that knows diffusers' internals: which networks, where their transformer blocks are, how attention is called."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
)
from diffusers import DiTTransformer2DModel as DiTModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.attention_processor import Attention, FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn

from ..attention import biased_attention, with_extra_channel
from ..errors import UnsupportedModelError

UNETS = (UNet2DConditionModel, ControlNetModel, UNetMotionModel)
# Networks that are one stack of transformer blocks on patches of the latents.
PATCH_TRANSFORMERS = (PixArtTransformer2DModel, DiTModel)
# Those whose attention is over image and text tokens at once, and the processors that joint.py can stand in for.
JOINT_TRANSFORMERS = (SD3Transformer2DModel, FluxTransformer2DModel)
JOINT_PROCESSORS = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0, FluxAttnProcessor)
# As wan.py does it.
WAN_PROCESSORS = (WanAttnProcessor,)
NETWORKS = (*UNETS, *PATCH_TRANSFORMERS, *JOINT_TRANSFORMERS, WanTransformer3DModel)
# Flux's pipelines make one token of so many rows and columns of the latents.
FLUX_PATCH = 2

# Why the better known of the others are refused, by their class.
REFUSED = {
    "SanaTransformer2DModel": "its attention is linear in the number of tokens: fewer of them gain nothing",
}


@dataclass(frozen=True, eq=False)
class Stack:
    """Transformer blocks that follow one another on the tokens of one grid.

    name: its path in the network.
    module: what is called with a map [B, C, H, W]: a Transformer2DModel, or the network itself.
    blocks: its transformer blocks. patch: how many rows and columns of the map are one token.
    mask_position: where `module.forward` takes its attention mask.
    """

    name: str
    module: nn.Module
    blocks: list[nn.Module]
    patch: int
    mask_position: int

    @property
    def on_maps(self) -> bool:
        """Whether it goes from a map to a map of the same size: normalized, projected, blocks, projected, added."""
        return isinstance(self.module, Transformer2DModel) and self.module.is_input_continuous


# Where BasicTransformerBlock takes its attention mask.
BLOCK_MASK_POSITION = list(inspect.signature(BasicTransformerBlock.forward).parameters).index("attention_mask") - 1


def modules_of(target: Any) -> list[tuple[str, nn.Module]]:
    """The modules of a pipeline with their names, or the module itself, without one."""
    if isinstance(target, DiffusionPipeline):
        return [(n, part) for n, part in target.components.items() if isinstance(part, nn.Module)]  # type: ignore
    return [("", target)]


def find_networks(target: Any) -> list[nn.Module]:
    """Every supported network in a pipeline or module, each once; raises UnsupportedModelError where there is none."""
    parts = [module for _, part in modules_of(target) for module in part.modules()]
    networks = {id(module): module for module in parts if isinstance(module, NETWORKS)}
    if networks:
        return list(networks.values())
    supported = ", ".join(network.__name__ for network in NETWORKS)
    for module in parts:
        for base in type(module).__mro__:
            if base.__name__ in REFUSED:
                raise UnsupportedModelError(
                    f"{base.__name__} is not supported: {REFUSED[base.__name__]}. Supported networks: {supported}"
                )
    raise UnsupportedModelError(
        f"{type(target).__name__} holds no network whose tokens can be reduced. Supported networks: {supported}"
    )


def find_stacks(network: nn.Module) -> list[Stack]:
    """The stacks of a network whose blocks are self-attention, cross-attention at most, and an MLP, on image tokens."""
    if isinstance(network, JOINT_TRANSFORMERS):
        return [_joint_stack(network)]
    if isinstance(network, WanTransformer3DModel):
        return [Stack("", network, list(network.blocks), int(network.config.patch_size[-1]), 0)]  # type: ignore
    if isinstance(network, PATCH_TRANSFORMERS):
        found = [("", network)]
    else:
        # Motion modules are of another class: their tokens are frames.
        found = [(name, module) for name, module in network.named_modules() if isinstance(module, Transformer2DModel)]
    stacks = []
    for name, module in found:
        blocks = list(module.transformer_blocks)  # type: ignore[arg-type]
        if getattr(module, "is_input_vectorized", False) or not blocks or not all(map(_plain, blocks)):
            continue
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        position = names.index("attention_mask") if "attention_mask" in names else len(names)
        patch = 1 if getattr(module, "is_input_continuous", False) else int(module.config.patch_size)  # type: ignore
        stacks.append(Stack(name, module, blocks, patch, position))
    if not stacks:
        raise UnsupportedModelError(
            f"{type(network).__name__} has no transformer blocks with plain self-attention over image tokens "
            "(blocks of cross-attention alone and of gated attention cannot be reduced)"
        )
    return stacks


def _joint_stack(network: Any) -> Stack:
    blocks = [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]
    patch = FLUX_PATCH if isinstance(network, FluxTransformer2DModel) else int(network.config.patch_size)
    return Stack("", network, blocks, patch, 0)


def _plain(block: nn.Module) -> bool:
    return (
        isinstance(block, BasicTransformerBlock)
        and not block.only_cross_attention
        and not block.double_self_attention
        and block.pos_embed is None
        and not hasattr(block, "fuser")
    )


def self_attentions(stacks: Iterable[Stack]) -> dict[str, Attention]:
    """The self-attention layers of stacks, by path."""
    return {
        f"{stack.name}.{_block_path(stack, number)}.{name}".lstrip("."): getattr(block, name)
        for stack in stacks
        for number, block in enumerate(stack.blocks)
        for name in (("attn1",) if hasattr(block, "attn1") else ("attn", "attn2"))
        if getattr(block, name, None) is not None
    }


def _block_path(stack: Stack, number: int) -> str:
    if isinstance(stack.module, WanTransformer3DModel):
        return f"blocks.{number}"
    first: int = len(stack.module.transformer_blocks)  # type: ignore[arg-type]
    return f"transformer_blocks.{number}" if number < first else f"single_transformer_blocks.{number - first}"


def convolution_norms(network: nn.Module) -> list[nn.GroupNorm]:
    """The group norms around a network's convolutions: of its ResNet blocks, and before its last convolution."""
    blocks = [module for module in network.modules() if isinstance(module, ResnetBlock2D)]
    norms: list[Any] = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    norms.append(getattr(network, "conv_norm_out", None))
    return [norm for norm in norms if isinstance(norm, nn.GroupNorm)]


class Call:
    """Reads the arguments of a network's forward by name, given in whatever way."""

    def __init__(self, network: nn.Module) -> None:
        # Of the class: offloading puts a forward of its own on the instance.
        self.names = list(inspect.signature(type(network).forward).parameters)[1:]

    def argument(self, name: str, args: tuple, kwargs: dict) -> Any:
        if name in kwargs or name not in self.names:
            return kwargs.get(name)
        position = self.names.index(name)
        return args[position] if position < len(args) else None

    def latents(self, args: tuple, kwargs: dict) -> Tensor:
        """The map that the network is called with, Tensor[B, C, H, W] or [B, C, F, H, W]."""
        value: Tensor = self.argument(self.names[0], args, kwargs)
        return value


def pairs_halves(pipeline: Any, call: Call, args: tuple, kwargs: dict) -> bool:
    """Whether a pipeline's batches are two halves, without and with the prompt, of the same latents."""
    if not getattr(pipeline, "do_classifier_free_guidance", False) or call.argument("guess_mode", args, kwargs):
        return False
    # These have a third part.
    perturbed = getattr(pipeline, "do_perturbed_attention_guidance", False)
    # Stable Diffusion 3 guides by a call of its own that skips layers, of one half.
    skips = call.argument("skip_layers", args, kwargs) is not None
    return not perturbed and not skips and not hasattr(pipeline, "image_guidance_scale")


# What FLOPs of cross-attention are counted for: the length of CLIP's texts.
TEXT_TOKENS = 77


def block_flops(block: nn.Module, queries: int, keys: int, others: int, attended: int = 1) -> float:
    """FLOPs of a block on one image, by its tokens: queries and keys of self-attention, and those of all the rest.

    attended: images (frames) whose keys a query takes.
    """
    attention, cross = block.attn1, getattr(block, "attn2", None)
    rest = [block.ff] if cross is None else [block.ff, cross.to_q, cross.to_out]
    flops: float = (
        queries * _linear_flops([attention.to_q, attention.to_out])  # type: ignore
        + keys * _linear_flops([attention.to_k, attention.to_v])  # type: ignore
        + others * _linear_flops(rest)  # type: ignore
        + 4.0 * queries * keys * attended * attention.inner_dim  # type: ignore
    )
    if cross is not None:
        flops += TEXT_TOKENS * (_linear_flops([cross.to_k, cross.to_v]) + 4.0 * others * cross.inner_dim)
    return flops


def joint_block_flops(block: nn.Module, queries: int, keys: int, others: int, text: int) -> float:
    """FLOPs of a block of joint attention on one image.

    queries, keys: image tokens in attention; others: in all the rest. text: text tokens.
    """
    single = not hasattr(block.attn, "add_q_proj")
    width: int = block.attn.inner_dim  # type: ignore
    flops = 4.0 * (queries + text) * (keys + text) * width
    if getattr(block, "attn2", None) is not None:
        flops += 4.0 * queries * keys * width
    for name, part in block.named_children():
        of_image: list[nn.Module] = []
        of_text: list[nn.Module] = []
        if not name.startswith("norm"):
            for path, module in part.named_modules():
                is_text = name == "ff_context" or path.startswith(("add_", "to_add_out"))
                (of_text if is_text else of_image).append(module)
        flops += _own_flops(of_image) * (others + text * single) + _own_flops(of_text) * text
    return flops


def wan_block_flops(block: nn.Module, queries: int, keys: int, others: int, text: int) -> float:
    """FLOPs of a block of Wan on one video; tokens as in `joint_block_flops`."""
    own, cross, mlp = block.attn1, block.attn2, block.ffn
    width: int = own.inner_dim  # type: ignore
    flops = 4.0 * width * (queries * keys + others * text)
    flops += others * _linear_flops([own, cross.to_q, cross.to_out, mlp])  # type: ignore
    return flops + text * _linear_flops([cross.to_k, cross.to_v])  # type: ignore


def projection_flops(stack: Stack, num_tokens: int) -> float:
    """FLOPs of the linear maps into and out of a stack; 0 where there are none."""
    if not stack.on_maps:
        return 0.0
    return 4.0 * stack.module.config.in_channels * stack.blocks[0].attn1.inner_dim * num_tokens  # type: ignore


def _linear_flops(parts: Iterable[nn.Module]) -> float:
    return _own_flops(module for part in parts for module in part.modules())


def _own_flops(modules: Iterable[nn.Module]) -> float:
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    return sum(2.0 * linear.in_features * linear.out_features for linear in linears)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    backend: Any = None,
) -> Tensor:
    """Attention on the backend that `set_attention_backend` or the `attention_backend` context chose.

    query, key, value: Tensor[B, heads, L, D]. mask: anything that SDPA takes. key_bias: Tensor[B, L_k], instead of a mask.
    """
    if backend is None:
        backend = _AttentionBackendRegistry.get_active_backend()[0]
    if AttentionBackendName(backend) == AttentionBackendName.NATIVE:
        if key_bias is not None:
            return biased_attention(query, key, value, key_bias)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    width = value.shape[-1]
    scale = width**-0.5
    if key_bias is not None:
        if "flash" in AttentionBackendName(backend).value:
            query, key, value = with_extra_channel(query, key, value, key_bias, scale)
        else:
            mask = key_bias[:, None, None, :].to(query.dtype)
    # diffusers' backends take [B, L, heads, D].
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    out = dispatch_attention_fn(query, key, value, attn_mask=mask, scale=scale, backend=backend)
    return out.transpose(1, 2)[..., :width]
