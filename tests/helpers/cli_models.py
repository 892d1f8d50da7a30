"""Tiny model folders for the command line: "vit" classifies, "segmenter" segments, both with random weights."""

import json
from pathlib import Path

import torch
from model_parts import PATCH, SQUARE
from models import CASES
from transformers import (
    DPTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    YolosImageProcessor,
)

from ailurus_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from ailurus_hf.cli import main

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
CLASSES = {0: "sky", 1: "road", 2: "car"}


def save_models(folder: Path) -> Path:
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY, image_size=64, id2label=CLASSES)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "vit")
    encoder = {"model_type": "vit", **TINY, "image_size": 64}
    segmenter = SegmenterForSemanticSegmentation(SegmenterConfig(encoder_config=encoder, id2label=CLASSES))
    segmenter.save_pretrained(folder / "segmenter")
    SegmenterImageProcessor().save_pretrained(folder / "segmenter")
    return folder


def save_task_models(folder: Path) -> None:
    """A model for "depth" and one to "detect", of random weights."""
    torch.manual_seed(0)
    side = SQUARE[0] * PATCH
    CASES["DepthAnything"].make().save_pretrained(folder / "depth")
    DPTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder / "depth")
    CASES["YOLOS"].make().save_pretrained(folder / "detect")
    YolosImageProcessor(size={"height": 32, "width": 48}).save_pretrained(folder / "detect")


def run_json(capsys, *arguments: str) -> dict:
    """What a command prints with --json; it has to succeed."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)
