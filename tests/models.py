"""Tiny models made from configs, one for every supported architecture, and inputs for them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    IJepaConfig,
    IJepaModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from ailurus_hf import SegmenterConfig, SegmenterForSemanticSegmentation

PATCH, GRID, DEPTH = 4, (8, 12), 4


@dataclass(frozen=True)
class Case:
    """make: a new model. prediction: what the model is for, as a tensor of its output."""

    make: Callable[[], nn.Module]
    prediction: Callable[[object], torch.Tensor]


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": GRID[0] * PATCH,
    "patch_size": PATCH,
}
# DINOv2 counts its MLP in multiples of its width, and shrinks each layer's gain.
DINO = {**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, "mlp_ratio": 2, "layerscale_value": 1.0}


def segmenter(encoder, num_labels=5, **fields):
    return SegmenterForSemanticSegmentation(
        SegmenterConfig(encoder_config={"model_type": encoder, **SIZES}, num_labels=num_labels, **fields)
    )


DECODER = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


CASES = {
    "ViTModel": Case(lambda: ViTModel(ViTConfig(**SIZES)), lambda out: out.last_hidden_state),
    "ViTForImageClassification": Case(
        lambda: ViTForImageClassification(ViTConfig(**SIZES, num_labels=5)), lambda out: out.logits
    ),
    "DeiTModel": Case(lambda: DeiTModel(DeiTConfig(**SIZES)), lambda out: out.last_hidden_state),
    "DeiTWithTeacher": Case(
        lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, num_labels=5)), lambda out: out.logits
    ),
    "ViTMSNModel": Case(lambda: ViTMSNModel(ViTMSNConfig(**SIZES)), lambda out: out.last_hidden_state),
    "IJepaModel": Case(lambda: IJepaModel(IJepaConfig(**SIZES)), lambda out: out.last_hidden_state),
    "Dinov2Model": Case(lambda: Dinov2Model(Dinov2Config(**DINO)), lambda out: out.last_hidden_state),
    "Dinov2ForImageClassification": Case(
        lambda: Dinov2ForImageClassification(Dinov2Config(**DINO, num_labels=5)), lambda out: out.logits
    ),
    "Dinov2WithRegistersModel": Case(
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)),
        lambda out: out.last_hidden_state,
    ),
    "Segmenter(ViT, mask transformer)": Case(lambda: segmenter("vit", decoder_config=DECODER), lambda out: out.logits),
    "Segmenter(DeiT, linear)": Case(lambda: segmenter("deit", decoder_type="linear"), lambda out: out.logits),
}


def make_model(name: str) -> nn.Module:
    """The model with weights large enough that attention is far from uniform and tokens matter."""
    torch.manual_seed(0)
    model = CASES[name].make().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            if "q_proj.weight" in parameter_name or "k_proj.weight" in parameter_name:
                parameter.mul_(3)
    return model


def images(batch=2, grid=GRID, seed=0):
    """Random images, smooth enough to have clusters."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, grid[0], grid[1], generator=generator)
    fine = torch.randn(batch, 3, grid[0] * PATCH, grid[1] * PATCH, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=PATCH, mode="bilinear") + 0.3 * fine


def blocky_images(batch=2, grid=GRID, seed=0):
    """Images in which every 2 x 2 patches are equal; with `without_positions` their tokens stay equal."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(batch, 3, grid[0] // 2, grid[1] // 2, PATCH, PATCH, generator=generator)
    tiled = patches.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return tiled.permute(0, 1, 2, 4, 3, 5).reshape(batch, 3, grid[0] * PATCH, grid[1] * PATCH)


def without_positions(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("position_embeddings"):
                parameter.zero_()
    return model


def run(model, pixel_values, **kwargs):
    forward = getattr(model, "_orig_mod", model).forward
    if "interpolate_pos_encoding" in inspect.signature(forward).parameters:
        kwargs["interpolate_pos_encoding"] = True
    return model(pixel_values, **kwargs)


def predict(model, name, pixel_values, **kwargs):
    with torch.no_grad():
        return CASES[name].prediction(run(model, pixel_values, **kwargs))
