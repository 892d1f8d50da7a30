"""A classifier from a model that compares images with texts (CLIP, SigLIP): its classes are given as words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

TEMPLATE = "This is a photo of {}."  # as in the models' own zero-shot pipelines


class Logits(NamedTuple):
    """logits: [B, classes], each image's likeness to each text."""

    logits: Tensor


class ZeroShotClassifier(nn.Module):
    """Images to likeness with texts. The texts go through their tower once, here.

    Args:
        model: a CLIPModel, SiglipModel or their like, in eval mode.
        tokenizer: of its texts.
        labels: the classes in words; put into TEMPLATE.
    """

    def __init__(self, model: Any, tokenizer: Any, labels: Sequence[str]) -> None:
        super().__init__()
        self.model: Any = model
        self.labels = list(labels)
        config = model.config
        # SigLIP saw its texts padded to full length, and attends to the padding.
        padding = "max_length" if config.model_type.startswith("siglip") else True
        length = getattr(config.text_config, "max_position_embeddings", None)
        texts = tokenizer(
            [TEMPLATE.format(label) for label in labels],
            padding=padding,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        with torch.no_grad():
            found = model.get_text_features(**texts.to(next(model.parameters()).device))
            self.text_features = normalize(_features(found), dim=-1)

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, pixel_values: Tensor, **inputs: Any) -> Logits:
        """From [B, 3, H, W] to `Logits`."""
        images = normalize(_features(self.model.get_image_features(pixel_values=pixel_values, **inputs)), dim=-1)
        logits = images @ self.text_features.T * self.model.logit_scale.exp()
        bias = getattr(self.model, "logit_bias", None)
        return Logits(logits if bias is None else logits + bias)


def _features(found: Any) -> Tensor:
    """Older versions of transformers gave the tensor itself."""
    return found if isinstance(found, Tensor) else found.pooler_output
