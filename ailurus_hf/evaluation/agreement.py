"""How far a reduced model's output is from the plain model's, as one number, by what the output is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AiluRusError

# What a loss means, by the kind of output.
MEANING = {
    "labels": "share of labels that differ",
    "depth": "mean relative difference of depth",
    "features": "one minus the cosine of features",
    "pictures": "RMS difference of pictures, of 1",
}


def kind_of(output: Any) -> str:
    """Which kind of output this is, a key of MEANING.

    Args:
        output: of a transformers model; or pictures, Tensor[B, 3, H, W] in [0, 1].

    Raises:
        AiluRusError: it holds nothing that can be compared.
    """
    if isinstance(output, Tensor):
        return "pictures"
    if _given(output, "predicted_depth") is not None:
        return "depth"
    if _given(output, "logits") is not None:
        return "labels"
    if _given(output, "last_hidden_state") is not None or _given(output, "feature_maps") is not None:
        return "features"
    raise AiluRusError(
        f"{type(output).__name__} holds no logits, depth or hidden states to compare: give metric=, a function of the "
        "outputs"
    )


def loss(plain: Any, reduced: Any) -> float:
    """The loss of a reduced output, 0 where it is the same; what it means says MEANING.

    Args:
        plain, reduced: outputs of one model on one input.

    Example:
        >>> loss(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5))
        0.5
    """
    kind = kind_of(plain)
    if kind == "pictures":
        return float((plain.float() - reduced.float()).square().mean().sqrt())
    if kind == "depth":
        want, got = plain.predicted_depth.float(), reduced.predicted_depth.float()
        # Relative to no less than a hundredth of the mean, so that the far end of inverse depth does not decide alone.
        floor = want.abs().mean() / 100
        return float(((got - want).abs() / want.abs().clamp_min(floor)).mean())
    if kind == "labels":
        want, got = _labels(plain), _labels(reduced)
        return float((want != got).float().mean())
    pairs = zip(_features(plain), _features(reduced), strict=True)
    return 1 - sum(float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs) / len(_features(plain))


def _given(output: Any, name: str) -> Any:
    return getattr(output, name, None)


def _labels(output: Any) -> Tensor:
    """Of pixels from Tensor[B, classes, H, W], else of images or boxes from Tensor[..., classes]."""
    logits: Tensor = output.logits
    return logits.argmax(1 if logits.ndim == 4 else -1)


def _features(output: Any) -> list[Tensor]:
    """Tensor[..., C] each."""
    if (maps := _given(output, "feature_maps")) is not None:
        return [each.float().movedim(1, -1) if each.ndim == 4 else each.float() for each in maps]
    return [torch.as_tensor(output.last_hidden_state).float()]
