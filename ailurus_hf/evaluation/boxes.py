"""Boxes of detected objects: read from a model's outputs, drawn, written as COCO has them, matched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import AiluRusError
from ..visualization import class_palette

if TYPE_CHECKING:
    from .loading import LoadedModel

MOST_BOXES = 100  # an image, as COCO counts them


class Boxes(NamedTuple):
    """Of one image, best first. corners: [K, 4] as x0, y0, x1, y1 in pixels; labels: [K] class ids; scores: [K]."""

    corners: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def above(self, threshold: float) -> Boxes:
        keep = self.scores >= threshold
        return Boxes(self.corners[keep], self.labels[keep], self.scores[keep])


def find_boxes(loaded: LoadedModel, outputs: Any, image: Image.Image) -> Boxes:
    """The `MOST_BOXES` best boxes of the model's outputs, inside the image. Raises AiluRusError where there are none to
    read: the image processor is none of a detector."""
    read = getattr(loaded.processor, "post_process_object_detection", None)
    if read is None:
        raise AiluRusError(f"{type(loaded.processor).__name__} does not tell boxes: save a detector's processor")
    found = read(outputs, threshold=0.0, target_sizes=[(image.height, image.width)])[0]
    scores = found["scores"].float().cpu().numpy()
    best = np.argsort(-scores, kind="stable")[:MOST_BOXES]
    corners = found["boxes"].float().cpu().numpy()[best]
    corners = np.clip(corners, 0, [image.width, image.height] * 2)
    return Boxes(corners, found["labels"].cpu().numpy()[best], scores[best])


def names_and_colors(loaded: LoadedModel) -> tuple[dict[int, str], np.ndarray]:
    """The classes' names by number, and a color for each number."""
    names = {int(number): str(name) for number, name in loaded.model.config.id2label.items()}
    return names, class_palette([names.get(number, "") for number in range(max(names) + 1)])


def draw_boxes(image: Image.Image, boxes: Boxes, names: Mapping[int, str], palette: np.ndarray) -> Image.Image:
    """The image with the boxes, each with its class and score."""
    picture = image.copy()
    draw = ImageDraw.Draw(picture)
    size = max(10, round(min(image.size) / 40))
    font, line = ImageFont.load_default(size=size), max(1, size // 6)
    for corners, label, score in reversed(list(zip(*boxes, strict=True))):  # the best on top
        color = tuple(int(channel) for channel in palette[int(label) % len(palette)])
        x0, y0, x1, y1 = (float(side) for side in corners)
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=color, width=line)
        text = f"{names.get(int(label), str(label))} {score:.0%}"
        top = y0 - size * 1.4 if y0 >= size * 1.4 else y0
        draw.rectangle((x0, top, x0 + font.getlength(text) + 4, top + size * 1.4), fill=color)
        ink = "black" if 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2] > 128 else "white"
        draw.text((x0 + 2, top), text, fill=ink, font=font)
    return picture


def to_coco(boxes: Boxes, image_id: int | str, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """COCO's result format: bbox is x, y, width, height in pixels; the class's name stands beside its id."""
    return [
        {
            "image_id": image_id,
            "category_id": int(label),
            "category": names.get(int(label), str(label)),
            "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "score": round(float(score), 5),
        }
        for (x0, y0, x1, y1), label, score in zip(*boxes, strict=True)
    ]


def to_one_coco(found: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The boxes of all images as COCO's evaluation reads them, with numbers for images.

    Args:
        found: by the name of each image's file, what `to_coco` gave; None where the image failed.

    Returns:
        The results, and which image and category each number is: {"images": [{"id", "file_name"}], "categories": …}. An
        image's number is its file's name, where all of them are numbers as in COCO; else its place in order, from 1 on.
    """
    stems = [PurePath(name).stem for name in found]
    numbered = all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems)
    ids = {name: int(stem) if numbered else i for i, (name, stem) in enumerate(zip(found, stems, strict=True), 1)}
    results = [
        {"image_id": ids[name], **{key: box[key] for key in ("category_id", "bbox", "score")}}
        for name, boxes in found.items()
        for box in boxes or ()
    ]
    categories = {box["category_id"]: box["category"] for boxes in found.values() for box in boxes or ()}
    return results, {
        "images": [{"id": ids[name], "file_name": name} for name, boxes in found.items() if boxes is not None],
        "categories": [{"id": number, "name": categories[number]} for number in sorted(categories)],
    }


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of corners [K, 4] and [L, 4]: [K, L]."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def box_agreement(plain: Boxes, reduced: Boxes, overlap: float = 0.5) -> float:
    """Share of boxes that are in both, of one class and overlapping: 2 · matched / (all of both); 1 where there are
    none."""
    total = len(plain.scores) + len(reduced.scores)
    if not total:
        return 1.0
    same = overlaps(reduced.corners, plain.corners) * (reduced.labels[:, None] == plain.labels[None])
    free = np.ones(len(plain.scores), dtype=bool)
    matched = 0
    for row in same:
        row = np.where(free, row, 0)
        if row.size and row.max() >= overlap:
            free[row.argmax()] = False
            matched += 1
    return 2 * matched / total


class Truth(NamedTuple):
    """Boxes that are there, of one image, as in `Boxes`. crowd: [K] bool, groups that count neither way."""

    corners: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
