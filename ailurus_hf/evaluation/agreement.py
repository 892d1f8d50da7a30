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
    "objects": "share of objects lost or moved",
    "depth": "mean difference of depth as a share of its mean",
    "features": "one minus the cosine of features",
    "pictures": "RMS difference of pictures, of 1",
}
# Where features are, those that a model is for before what they are made of.
FEATURES = ("image_embeds", "feature_maps", "last_hidden_state")


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
    if _given(output, "pred_boxes") is not None:
        return "objects"
    if _given(output, "logits") is not None or _given(output, "masks_queries_logits") is not None:
        return "labels"
    if any(_given(output, name) is not None for name in FEATURES):
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
        return relative_error(plain.predicted_depth.float(), reduced.predicted_depth.float())
    if kind == "objects":
        return _objects_lost(plain, reduced)
    if kind == "labels":
        want, got = _labels(plain), _labels(reduced)
        return float((want != got).float().mean())
    pairs = zip(_features(plain), _features(reduced), strict=True)
    cosines = [float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]
    return max(1 - sum(cosines) / len(cosines), 0.0)


def relative_error(plain: Tensor, reduced: Tensor) -> float:
    """Mean difference of depths as a share of the mean of the plain depths' absolute values; 0: equal."""
    mean = float(plain.abs().mean())
    return float((plain - reduced).abs().mean()) / mean if mean else 0.0


def _given(output: Any, name: str) -> Any:
    return getattr(output, name, None)


def _labels(output: Any) -> Tensor:
    """Of pixels from Tensor[B, classes, H, W] or from masks of queries, else of images from Tensor[..., classes]."""
    if _given(output, "masks_queries_logits") is not None:
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]  # the last is no class
        return torch.einsum("bqc,bqhw->bchw", classes, output.masks_queries_logits.float().sigmoid()).max(1).indices
    logits: Tensor = output.logits
    axis = 1 if logits.ndim == 4 else -1
    # By max: on a CPU argmax takes several times as long over an axis that is not the last.
    return logits.max(axis).indices if logits.shape[axis] > 1 else logits > 0


def _objects_lost(plain: Any, reduced: Any) -> float:
    """1 - the mean over the plain model's objects of the overlap with the same query's, 0 under another label.

    Where the plain model finds nothing, the share of queries that find something.
    """
    labels, none = plain.logits.argmax(-1), plain.logits.shape[-1] - 1
    same, objects = labels == reduced.logits.argmax(-1), labels != none
    if not objects.any():
        return float((~same).float().mean())
    overlap = _overlap(plain.pred_boxes.float(), reduced.pred_boxes.float()) * same
    return max(1 - float(overlap[objects].mean()), 0.0)


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes (center, size), Tensor[..., 4], one by one."""
    low = torch.maximum(one[..., :2] - one[..., 2:] / 2, other[..., :2] - other[..., 2:] / 2)
    high = torch.minimum(one[..., :2] + one[..., 2:] / 2, other[..., :2] + other[..., 2:] / 2)
    inside = (high - low).clamp(min=0).prod(-1)
    return inside / (one[..., 2:].prod(-1) + other[..., 2:].prod(-1) - inside).clamp(min=1e-9)


def _features(output: Any) -> list[Tensor]:
    """Tensor[..., C] each."""
    found = next(value for name in FEATURES if (value := _given(output, name)) is not None)
    if isinstance(found, Tensor):
        return [found.float()]
    return [each.float().movedim(1, -1) if each.ndim == 4 else each.float() for each in found]
