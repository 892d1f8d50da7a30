"""Every model that can be reduced, in any of the ways: those of `models.py`, SegFormer, VitDet and SAM."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import models
import segformer
import torch
import windowed
from torch import nn


@dataclass(frozen=True)
class Every:
    """make: a new model. images: its input. forward: (model, images) -> what the model is for. settings: that reduce
    it.

    layer: of a reduced model, a module in the middle of what runs on representatives.
    """

    make: Callable[[], nn.Module]
    images: Callable[[], torch.Tensor]
    forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    settings: dict
    layer: Callable[[nn.Module], nn.Module]

    def predict(self, model, x):
        with torch.no_grad():
            return self.forward(model, x)


REDUCED = {"cluster_location": 1, "keep_ratio": 0.25}


def _third_layer(model):
    from ailurus_hf.vision.discovery import find_encoders

    return find_encoders(model)[0].layers[2]


def _of_models(name):
    return Every(
        partial(models.make_model, name),
        partial(models.images_for, name),
        lambda model, x: models.CASES[name].prediction(models.run(model, x)),
        REDUCED,
        _third_layer,
    )


def _of_windows(name):
    return Every(
        partial(windowed.make, name),
        windowed.images,
        lambda model, x: model(x).last_hidden_state,
        REDUCED,
        lambda model: [m for m in model.modules() if hasattr(m, "qkv")][-1],
    )


EVERY = {name: _of_models(name) for name in models.CASES}
EVERY |= {name: _of_windows(name) for name in ("VitDet", "SAM")}
EVERY["SegFormer"] = Every(
    segformer.make,
    segformer.images,
    lambda model, x: model(x).logits,
    REDUCED,
    lambda model: [m for m in model.modules() if type(m).__name__ == "SegformerStage"][2].blocks[2].mlp,
)
# One of each way to be reduced.
SOME = (
    "ViTForImageClassification",
    "BeitModel",
    "Data2VecVisionModel",
    "BlipVisionModel",
    "Blip2VisionModel",
    "DINOv3ViTModel",
    "DPTForDepthEstimation",
    "YOLOS(positions between layers)",
    "EoMT(predicting masks)",
    "Segmenter(ViT, mask transformer)",
    "SegFormer",
    "VitDet",
    "SAM",
)
