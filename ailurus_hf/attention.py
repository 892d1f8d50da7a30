"""Count-weighted attention (AiluRus, Eq. 5): a representative of m tokens weighs as much as m equal tokens.

Two forms of one function: "mask" adds log m to the logits as a broadcast bias; "channel" writes it into one extra
channel of the keys, for kernels that take no bias (flash): q' = [q, 1], k' = [k, log m / scale].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AiluRusError


def count_weighted_attention(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, *, scale: float | None = None, form: str = "auto"
) -> Tensor:
    """softmax(q k · scale + log counts) · v, on top of torch's scaled_dot_product_attention (Eq. 5).

    Args:
        query: Tensor[B, heads, L, D].
        key, value: Tensor[B, heads, L_k, D] each.
        counts: Tensor[B, L_k], the tokens that each key stands for; a key of count 0 gets no weight.
        scale: factor of the logits, D ** -0.5 by default.
        form: "mask", "channel" or "auto" (see `preferred_form`).

    Returns:
        Tensor[B, heads, L, D].

    Raises:
        AiluRusError: counts do not match the keys, or the form is none of these.

    Example:
        >>> query, key = torch.randn(1, 2, 7, 8), torch.randn(1, 2, 3, 8)
        >>> count_weighted_attention(query, key, key, counts=torch.tensor([[4.0, 1.0, 2.0]])).shape
        torch.Size([1, 2, 7, 8])
    """
    if counts.shape != (key.shape[0], key.shape[2]):
        raise AiluRusError(f"counts must have shape {(key.shape[0], key.shape[2])}, got {tuple(counts.shape)}")
    return biased_attention(query, key, value, counts.float().log(), scale=scale, form=form)


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor,
    *,
    scale: float | None = None,
    form: str = "auto",
    dropout: float = 0.0,
) -> Tensor:
    """Attention with a bias for each key, added to the scaled logits.

    Args:
        query, key, value, scale, form: as in `count_weighted_attention`.
        key_bias: Tensor[B, L_k].
        dropout: the probability that a weight is dropped.

    Returns:
        Tensor[B, heads, L, D].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    form = preferred_form(query) if form == "auto" else form
    if form == "mask":
        mask = key_bias[:, None, None, :].to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    if form == "channel":
        width = value.shape[-1]
        query, key, value = with_extra_channel(query, key, value, key_bias, scale)
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale)[..., :width]
    raise AiluRusError(f"form must be 'auto', 'mask' or 'channel', got {form!r}")


def preferred_form(query: Tensor) -> str:
    """The form that keeps the fast kernel: "channel" for half precision on CUDA, whose flash kernels take no bias, else
    "mask".

    On a CPU the mask's cost is too small to measure, and the channel is never faster. CUDA was not measured.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    return "channel" if query.device.type == "cuda" and half else "mask"


def with_extra_channel(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a wider head, whose attention includes the bias in the first channels of its output."""
    extra = 8 - query.shape[-1] % 8
    # Keys are multiplied, so a key without weight gets about the lowest number of its type, and not -inf.
    bias = (key_bias / scale).clamp(min=torch.finfo(key.dtype).min / 2).to(key.dtype)
    ones = query.new_ones(*query.shape[:-1], 1)
    query = torch.cat([query, F.pad(ones, (0, extra - 1))], -1)
    channel = bias[:, None, :, None].expand(-1, key.shape[1], -1, -1)
    key = torch.cat([key, F.pad(channel, (0, extra - 1))], -1)
    return query, key, F.pad(value, (0, extra))
