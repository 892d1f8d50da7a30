"""COCO's AP of detected boxes, by COCO's own code."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np

from ..extras import needs_extra
from .boxes import MOST_BOXES, Boxes, Truth

with needs_extra("vision", __name__):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval


def average_precision(found: Sequence[Boxes], truth: Sequence[Truth]) -> float | None:
    """COCO's AP: the mean over classes and over overlaps of 0.5 to 0.95 of the precision at 101 recalls.

    Args:
        found, truth: one entry an image.

    Returns:
        0 to 1; None where the truth has no box.
    """
    matched = matched_boxes(found, truth)
    return None if matched is None else precision_of(matched)[0]


def matched_boxes(found: Sequence[Boxes], truth: Sequence[Truth]) -> COCOeval | None:
    """Each image's boxes held against its true ones, which takes longer than what `precision_of` makes of them.

    Args:
        found, truth: one entry an image.

    Returns:
        COCO's evaluation, of boxes of all sizes and 100 an image; None where the truth has no box.
    """
    if not any((~image.crowd).any() for image in truth):
        return None
    # What it is about to do, it prints; and it asks numpy for what numpy will not do for long.
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        there, detected = _index(truth, len(truth)), _index(found, len(truth))
        matched = COCOeval(there, detected, "bbox")
        matched.params.catIds = sorted({label for image in truth for label in image.labels[~image.crowd].tolist()})
        matched.params.areaRng, matched.params.areaRngLbl = matched.params.areaRng[:1], ["all"]
        matched.params.maxDets = [MOST_BOXES]
        matched.evaluate()
    return matched


def precision_of(matched: COCOeval, images: Sequence[int] | np.ndarray | None = None) -> tuple[float, float]:
    """AP, and AP at an overlap of 0.5 alone, of some of the images.

    Args:
        matched: by `matched_boxes`.
        images: their numbers; one that is there twice counts twice, as in a resample. None: all of them.

    Returns:
        0 to 1 each, over the classes that are in these images; NaN where none is.
    """
    chosen = copy.copy(matched)
    chosen.params = copy.copy(matched.params)
    if images is not None:
        # By class, then by image.
        by_image = np.empty(len(matched.evalImgs), dtype=object)
        by_image[:] = matched.evalImgs
        chosen.evalImgs = list(by_image.reshape(len(matched.params.catIds), -1)[:, images].flat)
        chosen.params.imgIds = list(range(len(images)))
        chosen._paramsEval = chosen.params
    with redirect_stdout(StringIO()):
        chosen.accumulate()
    # [overlaps, recalls, classes, 1, 1]; -1 for a class without a true box.
    precision = chosen.eval["precision"][..., 0, 0]
    precision = precision[..., (precision > -1).all((0, 1))]
    return (float(precision.mean()), float(precision[0].mean())) if precision.size else (np.nan, np.nan)


def _index(images: Sequence[Boxes | Truth], count: int) -> COCO:
    """The boxes of all images, as COCO's code takes them."""
    index = COCO()
    entries = [entry for image_id, boxes in enumerate(images) for entry in _entries(image_id, boxes)]
    # Numbered from 1: 0 counts as none.
    annotations = [{**entry, "id": number + 1} for number, entry in enumerate(entries)]
    index.dataset = {"images": [{"id": image_id} for image_id in range(count)], "annotations": annotations}
    index.dataset["categories"] = [{"id": label} for label in {entry["category_id"] for entry in entries}]
    index.createIndex()
    return index


def _entries(image_id: int, boxes: Boxes | Truth) -> Iterator[dict[str, Any]]:
    crowd = boxes.crowd if isinstance(boxes, Truth) else np.zeros(len(boxes.labels), dtype=bool)
    scores = boxes.scores if isinstance(boxes, Boxes) else np.ones(len(boxes.labels))
    for (x0, y0, x1, y1), label, score, is_crowd in zip(boxes.corners, boxes.labels, scores, crowd, strict=True):
        width, height = x1 - x0, y1 - y0
        yield {
            "image_id": image_id,
            "category_id": int(label),
            "bbox": [x0, y0, width, height],
            "area": width * height,
            "score": float(score),
            "iscrowd": int(is_crowd),
        }
