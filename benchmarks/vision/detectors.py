"""Trained detectors for the benchmarks: what the training scripts left, how an image enters, their encoder alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

from .compiled_speed import sharing_weights


class Yolos(nn.Module):
    """A YOLOS of transformers that takes images and tells boxes as torchvision's detectors do."""

    def __init__(self, model: YolosForObjectDetection, processor: YolosImageProcessorPil) -> None:
        super().__init__()
        self.model, self.processor = model, processor

    def seen(self, image: Tensor) -> Tensor:
        """Tensor[3, H, W] of 0 to 1 as the model takes it: Tensor[1, 3, h, w]."""
        size = (self.processor.size["height"], self.processor.size["width"])
        resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)
        mean, std = (
            image.new_tensor(each)[:, None, None] for each in (self.processor.image_mean, self.processor.image_std)
        )
        return (resized - mean) / std

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            outputs = self.model(self.seen(image))
            (boxes,) = self.processor.post_process_object_detection(outputs, 0.0, [tuple(image.shape[1:])])
            order = boxes["scores"].argsort(descending=True)
            found.append({name: values[order] for name, values in boxes.items()})
        return found


def load_detector(folder: Path) -> nn.Module:
    """What examples/train_detector.py wrote: a Mask R-CNN, or a Faster R-CNN where the data had no masks. Or a YOLOS,
    from the folder `best` in what examples/train_yolos.py wrote."""
    if not (folder / "detector.json").is_file():
        model = YolosForObjectDetection.from_pretrained(folder, dtype=torch.float32)
        return Yolos(model, YolosImageProcessorPil.from_pretrained(folder)).eval().requires_grad_(False)
    from ailurus_hf.detection.detector import faster_rcnn, mask_rcnn  # the report needs no torchvision

    about = json.loads((folder / "detector.json").read_text())
    encoder = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    make = mask_rcnn if about["masks"] else faster_rcnn
    detector = make(encoder, about["num_classes"], about["taps"], about["out_channels"], **about["fields"])
    load_model(detector, folder / "state" / "model.safetensors")
    return detector.eval().requires_grad_(False)


def how_trained(folder: Path) -> dict[str, Any]:
    """What the training script wrote of the training's length and end."""
    progress = folder / "progress.json"
    return json.loads((progress if progress.is_file() else folder / "metrics.json").read_text())


def pixels(image: Image.Image) -> Tensor:
    """Tensor[3, H, W], 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def depth_and_taps(detector: nn.Module) -> tuple[int, list[int]]:
    """Layers of the encoder, and those that the detector reads."""
    if isinstance(detector, Yolos):
        depth = detector.model.config.num_hidden_layers
        return depth, [depth]
    pyramid = detector.backbone.pyramid
    return pyramid.config.num_hidden_layers, list(pyramid.taps)


def seen(detector: nn.Module, image: Tensor) -> Tensor:
    """The image as the encoder takes it: Tensor[1, 3, h, w]."""
    return detector.seen(image) if isinstance(detector, Yolos) else detector.transform([image])[0].tensors


def encoder_alone(detector: nn.Module) -> nn.Module:
    """The layers that the detector reads, and nothing of what it makes of them, on the same weights."""
    if isinstance(detector, Yolos):
        return sharing_weights(detector.model.vit)
    pyramid = sharing_weights(detector.backbone.pyramid)
    pyramid.scales = nn.ModuleList(nn.Identity() for _ in pyramid.scales)
    return pyramid


def with_encoder(detector: nn.Module, encoder: nn.Module) -> nn.Module:
    """The detector around another encoder, as `encoder_alone` gives it, on the same weights."""
    if isinstance(detector, Yolos):
        return sharing_weights(detector, {detector.model.vit: encoder})
    return sharing_weights(detector, {detector.backbone.pyramid.encoder: encoder.encoder})


def tiny_detector() -> Yolos:
    """Random, of three layers, for a dry run on images of any size."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = YolosConfig(**sizes, image_size=[64, 96], num_detection_tokens=4, num_labels=4)
    half, size = [0.5] * 3, {"height": 64, "width": 96}
    processor = YolosImageProcessorPil(size=size, image_mean=half, image_std=half)
    return Yolos(YolosForObjectDetection(config), processor).eval().requires_grad_(False)


def made_up_data(folder: Path) -> Path:
    """Three images of noise with a box each, in COCO's format, for the same."""
    noise = np.random.default_rng(0)
    (folder / "val").mkdir()
    (folder / "annotations").mkdir()
    for number in range(3):
        Image.fromarray(noise.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(folder / f"val/{number}.png")
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(3)]
    box = {"bbox": [8, 8, 40, 30], "category_id": 1, "iscrowd": 0}
    boxes = [{"id": number + 1, "image_id": number, **box} for number in range(3)]
    listed = json.dumps({"images": images, "annotations": boxes})
    (folder / "annotations/instances_val.json").write_text(listed)
    return folder
