"""Tiny SegFormers made from configs, and inputs for them."""

import torch
from torch import nn
from transformers import (
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
)

SIZES = {
    "depths": [1, 2, 3, 2],
    "hidden_sizes": [16, 32, 32, 64],
    "num_attention_heads": [1, 2, 2, 4],
    "sr_ratios": [8, 4, 2, 1],
    "decoder_hidden_size": 32,
    "num_labels": 5,
    "drop_path_rate": 0.0,
    "hidden_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.0,
}
CLASSES = {
    "model": (SegformerModel, lambda out: out.last_hidden_state),
    "segmentation": (SegformerForSemanticSegmentation, lambda out: out.logits),
    "classification": (SegformerForImageClassification, lambda out: out.logits),
}


def make(kind="segmentation", **fields):
    torch.manual_seed(0)
    model = CLASSES[kind][0](SegformerConfig(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(3)
    return model


def images(batch=2, size=(96, 160), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.interpolate(torch.randn(batch, 3, 12, 20, generator=generator), size=size, mode="bilinear")


def predict(model, pixels, kind="segmentation"):
    with torch.no_grad():
        return CLASSES[kind][1](model(pixels))
