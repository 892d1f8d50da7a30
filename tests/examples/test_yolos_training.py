"""The training of YOLOS on made-up images of squares: its start, its matches, its folder, going on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from ailurus_hf import SegmenterConfig, SegmenterForSemanticSegmentation
from ailurus_hf.evaluation.boxes import Boxes

pytest.importorskip("accelerate")
pytest.importorskip("scipy")
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_yolos  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        images, boxes = [], []
        for number in range(3):
            pixels = np.zeros((64, 96, 3), np.uint8)
            pixels[8:24, 10 + 20 * number : 30 + 20 * number] = 255
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 64})
            box = {"bbox": [10 + 20 * number, 8, 20, 16], "category_id": 2}
            boxes.append({"id": number + 1, "image_id": number, "iscrowd": 0, **box})
        listed = {"images": images, "annotations": boxes, "categories": [{"id": 2, "name": "square"}]}
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(listed))
    return tmp_path


@pytest.fixture
def segmenter(tmp_path):
    torch.manual_seed(0)
    encoder = hf.ViTConfig(**SIZES, image_size=[64, 64], patch_size=16)
    decoder = hf.ViTConfig(**{**SIZES, "num_hidden_layers": 1})
    config = SegmenterConfig(encoder_config=encoder, decoder_config=decoder, num_labels=3)
    SegmenterForSemanticSegmentation(config).save_pretrained(tmp_path / "segmenter")
    return tmp_path / "segmenter"


def test_it_starts_as_the_segmenters_encoder(coco, segmenter):
    data = train_yolos.Coco(coco, "train", 64)
    detector = train_yolos.new_detector(segmenter, data, (2, 3)).eval()
    encoder = SegmenterForSemanticSegmentation.from_pretrained(segmenter, dtype=torch.float32).encoder.eval()
    assert detector.config.id2label[2] == "square" and detector.config.num_labels == 3
    tokens = torch.randn(1, 7, 32)
    for own, given in zip(detector.vit.encoder.layer, encoder.layers):
        # Same weights in the same places.
        out = given(tokens)
        torch.testing.assert_close(own(tokens), out[0] if isinstance(out, tuple) else out, atol=1e-5, rtol=1e-4)


def test_every_box_goes_to_a_token_of_its_own_near_by():
    matcher = train_yolos.CellMatcher((2, 3))
    boxes = torch.tensor([[0.9, 0.2, 0.1, 0.1], [0.1, 0.8, 0.5, 0.5], [0.88, 0.3, 0.1, 0.1]])
    ((tokens, order),) = matcher({}, [{"boxes": boxes}])
    matched = dict(zip(order.tolist(), tokens.tolist()))
    # Both of the first and the last lie in the cell 2; one goes to a cell beside it.
    assert matched[1] == 3 and 2 in matched.values() and len(set(matched.values())) == 3
    assert {matched[0], matched[2]} in ({2, 5}, {1, 2})


def test_boxes_follow_a_flip_and_come_back_as_corners(coco):
    data = train_yolos.Coco(coco, "train", 64)
    image, target = data.example(1)
    turned, at = train_yolos.flipped(image, target, across=True, down=True)
    torch.testing.assert_close(turned, image.flip(1, 2))
    torch.testing.assert_close(at["boxes"], torch.tensor([[1 - 40 / 96, 1 - 16 / 64, 20 / 96, 16 / 64]]))
    assert data.truth(1).corners.tolist() == [[30, 8, 50, 24]]

    class Says(torch.nn.Module):
        """The truth, in its second token; the rest is nothing."""

        def forward(self, images):
            logits = torch.full((1, 3, 4), -9.0)
            logits[0, 1, 2] = logits[0, ::2, 3] = 9.0
            boxes = torch.cat([torch.full((1, 1, 4), 0.5), target["boxes"][None], torch.full((1, 1, 4), 0.5)], 1)
            return hf.models.yolos.modeling_yolos.YolosObjectDetectionOutput(logits=logits, pred_boxes=boxes)

    found = train_yolos.found_boxes(Says(), image, (96, 64))
    assert isinstance(found, Boxes) and found.labels[0] == 2 and found.scores[0] > 0.99 > found.scores[1]
    np.testing.assert_allclose(found.corners[0], [30, 8, 50, 24], atol=1e-3)


def test_train_go_on_and_load(coco, segmenter):
    command = [
        sys.executable,
        EXAMPLES / "train_yolos.py",
        "--data",
        coco,
        "--output",
        coco / "run",
        "--init",
        segmenter,
    ]
    command += ["--rows", 64, "--cells", 2, 2, "--batch-size", 3, "--max-minutes", 1e9, "--flip-vertically"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    for more in (["--epochs", 2], ["--epochs", 4, "--resume"]):
        done = subprocess.run(map(str, command + more), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((coco / "run/metrics.json").read_text())["history"]
    assert [each["step"] for each in history] == [2, 4]
    detector = hf.YolosForObjectDetection.from_pretrained(coco / "run/best")
    processor = hf.YolosImageProcessorPil.from_pretrained(coco / "run/best")
    inputs = processor(Image.open(coco / "val/0.png"), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 96) and inputs["pixel_values"].max() == 1
    assert detector(pixel_values=inputs["pixel_values"]).logits.shape == (1, 4, 4)
