"""What AiluRus takes from diffusers' attention: its backends, and the processors whose behavior it knows."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from ..attention import biased_attention, with_extra_channel
from ..errors import UnsupportedModelError

# Processors of self-attention that run the whole batch and take a bias on the keys as the attention mask.
PLAIN_PROCESSORS = (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    FusedAttnProcessor2_0,
    XFormersAttnProcessor,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    CustomDiffusionXFormersAttnProcessor,
)
# Processors of cross-attention that give each query what it would get among any others. Unknown ones may keep where all
# tokens attend to, as those of LEDITS++ and Attend-and-Excite do.
CROSS_PROCESSORS = (
    *PLAIN_PROCESSORS,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)


def has_attention_of_its_own(block: object) -> bool:
    """Whether a block is of a transformer whose layers of attention may be of its own kind, as Sana's are."""
    of_transformers = type(block).__module__.startswith("diffusers.models.transformers.")
    return of_transformers and not isinstance(block, BasicTransformerBlock)


def is_attention(layer: Any) -> bool:
    """Whether a layer is diffusers' `Attention`, whose parts AiluRusProcessor knows."""
    return isinstance(layer, Attention)


def modules_of(target: Any) -> list[tuple[str, nn.Module]]:
    """The modules of a pipeline with their names, or the module itself, without one."""
    if isinstance(target, DiffusionPipeline):
        pipeline: Any = target
        return [(name, part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
    if not isinstance(target, nn.Module):
        instead = "a diffusers pipeline or network"
        if isinstance(target, ModularPipeline):
            instead = "its transformer or unet, and call it in a block with denoising(pipe.transformer, pipe.scheduler)"
        raise UnsupportedModelError(f"{type(target).__name__} is no network: give {instead}")
    return [("", target)]


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

    Args:
        query, key, value: Tensor[B, heads, L, D].
        mask: anything that SDPA takes.
        key_bias: Tensor[B, L_k], instead of a mask.
        backend: one of diffusers' attention backends; None: the active one.
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
