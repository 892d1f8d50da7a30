"""The data sets of segmentation, classification and detection: where their images and labels lie, what they mean.

A folder is given on the command line or is DATASET in the folder named by AILURUS_DATA. Nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ailurus_hf import AiluRusError
from ailurus_hf.evaluation.boxes import Truth

Item = TypeVar("Item")
IGNORED = 255
# Cityscapes' 19 classes that are scored, as ids of its labelIds files, in the order of their train ids.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class Layout:
    """layout: what the folder holds, for the message where it does not. pairs: images and label maps of a split.

    to_classes: what a label map holds to class ids, IGNORED where there is none.
    """

    num_classes: int
    layout: str
    pairs: Callable[[Path, str], list[tuple[Path, Path]]]
    to_classes: Callable[[np.ndarray], np.ndarray]


def _camvid(folder: Path, split: str) -> list[tuple[Path, Path]]:
    images = sorted((folder / split / "images").glob("*.jpg"))
    return [(image, folder / split / "labels" / f"{image.stem}.png") for image in images]


def _ade20k(folder: Path, split: str) -> list[tuple[Path, Path]]:
    part = {"train": "training", "val": "validation"}.get(split, split)
    images = sorted((folder / "images" / part).glob("*.jpg"))
    return [(image, folder / "annotations" / part / f"{image.stem}.png") for image in images]


def _cityscapes(folder: Path, split: str) -> list[tuple[Path, Path]]:
    images = sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    labels = folder / "gtFine" / split
    return [(i, labels / i.parent.name / i.name.replace("leftImg8bit", "gtFine_labelIds")) for i in images]


def _pascal_context(folder: Path, split: str) -> list[tuple[Path, Path]]:
    listed = folder / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    names = listed.read_text().split() if listed.is_file() else []
    labels = folder / "SegmentationClassContext"
    return [(folder / "JPEGImages" / f"{name}.jpg", labels / f"{name}.png") for name in names]


def _below(num_classes: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda labels: np.where(labels < num_classes, labels, IGNORED)


def _ade20k_classes(labels: np.ndarray) -> np.ndarray:
    """0 is everything else there; the classes count from 1."""
    return np.where((labels >= 1) & (labels <= 150), labels.astype(np.int64) - 1, IGNORED)


def _cityscapes_classes(labels: np.ndarray) -> np.ndarray:
    table = np.full(256, IGNORED)
    table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    return table[labels]


DATASETS = {
    "camvid": Layout(11, "val/images/*.jpg and val/labels/*.png", _camvid, _below(11)),
    "ade20k": Layout(
        150, "images/validation/*.jpg and annotations/validation/*.png (ADEChallengeData2016)", _ade20k, _ade20k_classes
    ),
    "cityscapes": Layout(
        19,
        "leftImg8bit/val/*/*_leftImg8bit.png and gtFine/val/*/*_gtFine_labelIds.png",
        _cityscapes,
        _cityscapes_classes,
    ),
    "pascal_context": Layout(
        60,
        "JPEGImages/*.jpg, SegmentationClassContext/*.png and ImageSets/SegmentationContext/val.txt (VOC2010)",
        _pascal_context,
        _below(60),
    ),
}


class SegmentationData:
    """One split of a data set; files are read when asked for. limit: only so many, evenly from the whole split."""

    def __init__(self, name: str, folder: str | Path | None = None, split: str = "val", limit: int | None = None):
        if name not in DATASETS:
            raise AiluRusError(f"no data set {name!r}: there are {', '.join(DATASETS)}")
        self.layout = DATASETS[name]
        self.folder = data_folder(name, folder)
        self.pairs = evenly(self.layout.pairs(self.folder, split), limit)
        missing = next((path for pair in self.pairs for path in pair if not path.is_file()), None)
        if missing is not None:
            raise AiluRusError(f"{missing} is missing: {name} holds {self.layout.layout}")
        if not self.pairs:
            raise AiluRusError(f"{self.folder} holds no {split} images of {name}: it should hold {self.layout.layout}")

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def num_classes(self) -> int:
        return self.layout.num_classes

    def image(self, index: int) -> Image.Image:
        """The photograph, RGB."""
        return Image.open(self.pairs[index][0]).convert("RGB")

    def label(self, index: int) -> Tensor:
        """Class ids, LongTensor[H, W], IGNORED where nothing is scored."""
        return torch.from_numpy(self.layout.to_classes(np.array(Image.open(self.pairs[index][1])))).long()


def _parquet(folder: Path, split: str) -> tuple[list[Any], list[int]]:
    path = folder / f"{split}.parquet"
    if not path.is_file():
        return [], []
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return [row["bytes"] for row in table["image"].to_pylist()], table["label"].to_pylist()


def _folder_a_class(folder: Path, split: str) -> tuple[list[Any], list[int]]:
    """The classes count in the order of their folders' names."""
    part = folder / {"validation": "val"}.get(split, split)
    classes = sorted(path for path in part.iterdir() if path.is_dir()) if part.is_dir() else []
    found = [(image, label) for label, path in enumerate(classes) for image in sorted(path.iterdir())]
    return [image for image, _ in found], [label for _, label in found]


# What a folder holds, and how its images (files, or files' bytes) and labels are found.
CLASSIFICATION = {
    "cifar10": ("validation.parquet with columns image {bytes, path} and label", _parquet),
    "imagenet": ("val/CLASS/*.JPEG, a folder a class", _folder_a_class),
}


class ClassificationData:
    """One split of a data set of images with one label each. limit: only so many, evenly from the whole split."""

    def __init__(
        self, name: str, folder: str | Path | None = None, split: str = "validation", limit: int | None = None
    ):
        if name not in CLASSIFICATION:
            raise AiluRusError(f"no data set {name!r}: there are {', '.join(CLASSIFICATION)}")
        layout, find = CLASSIFICATION[name]
        self.folder = data_folder(name, folder)
        files, labels = find(self.folder, split)
        if not files:
            raise AiluRusError(f"{self.folder} holds no {split} images of {name}: it should hold {layout}")
        chosen = evenly(range(len(files)), limit)
        self.files, self.labels = [files[i] for i in chosen], [labels[i] for i in chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The photograph, RGB."""
        file = self.files[index]
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file).convert("RGB")


class DetectionData:
    """One split in COCO's format: images in SPLIT/, boxes in annotations/instances_SPLIT.json.

    limit: only so many images, evenly from the whole split.
    """

    def __init__(self, name: str, folder: str | Path | None = None, split: str = "val", limit: int | None = None):
        self.folder = data_folder(name, folder)
        listed = self.folder / "annotations" / f"instances_{split}.json"
        if not listed.is_file():
            raise AiluRusError(f"{listed} is missing: data in COCO's format hold it, and {split}/ with the images")
        annotated = json.loads(listed.read_text())
        self.images = evenly(annotated["images"], limit)
        self.split = split
        self.boxes: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in annotated["images"]}
        for each in annotated["annotations"]:
            self.boxes[each["image_id"]].append(each)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        """The photograph, RGB."""
        return Image.open(self.folder / self.split / self.images[index]["file_name"]).convert("RGB")

    def truth(self, index: int) -> Truth:
        """Its boxes, with the numbers of their categories."""
        rows = self.boxes[self.images[index]["id"]]
        corners = np.array([each["bbox"] for each in rows], dtype=float).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        labels = np.array([each["category_id"] for each in rows], dtype=int)
        return Truth(corners, labels, np.array([bool(each.get("iscrowd")) for each in rows], dtype=bool))


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """So many of them, or all; in a video's frames, the first ones would be one scene."""
    count = min(limit or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def data_folder(name: str, given: str | Path | None) -> Path:
    """The folder given, or the data set's in AILURUS_DATA."""
    if given is not None:
        return Path(given)
    if "AILURUS_DATA" not in os.environ:
        raise AiluRusError(f"say where {name} is: --data FOLDER, or AILURUS_DATA=FOLDER holding {name}/")
    return Path(os.environ["AILURUS_DATA"]) / name
