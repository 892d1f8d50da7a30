"""Predictions against ground truth: mIoU of label maps, accuracy of classes, AP of boxes; one scorer for a task."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..images import Image, ImageError
from .bad_input import BadInputError
from .boxes import Boxes, Truth, find_boxes
from .comparison import confusion, label_map, mean_iou
from .folders import read_labels

if TYPE_CHECKING:
    from .loading import LoadedModel

FOLDERS = "folders"  # the --labels of a classifier whose images lie in folders named as their classes


class Scorer(ABC):
    """What is predicted by several contenders, such as "plain" and "reduced", against the truth.

    metric: the score's name; higher is better, 0 to 1.
    """

    metric: ClassVar[str]

    def __init__(self, loaded: LoadedModel, labels: str) -> None:
        self.loaded, self.labels = loaded, labels
        self.found: dict[Any, list[Any]] = defaultdict(list)

    def add(self, contender: Any, path: Path, image: Image.Image, outputs: Any) -> float | None:
        """Takes one image; returns its own score. Raises ImageError where the image has no truth."""
        self.found[contender].append(self.compared(path, image, outputs))
        return self.score_of(self.found[contender][-1:])

    def score(self, contender: Any) -> float | None:
        """Of all images; None where nothing could be scored."""
        return self.score_of(self.found[contender]) if self.found[contender] else None

    @abstractmethod
    def compared(self, path: Path, image: Image.Image, outputs: Any) -> Any:
        """What `score_of` needs of one image."""

    @abstractmethod
    def score_of(self, found: Sequence[Any]) -> float | None:
        """The score of several images."""


class SegmentationScorer(Scorer):
    """labels: a PNG of class ids, or a folder of PNGs named as the images."""

    metric = "mIoU"

    def compared(self, path: Path, image: Image.Image, outputs: Any) -> np.ndarray:
        count = len(self.loaded.class_names())
        truth = read_labels(path, self.labels, image.size, count)
        return confusion(label_map(self.loaded, outputs, image), truth, count)

    def score_of(self, found: Sequence[np.ndarray]) -> float | None:
        matrix = np.sum(found, axis=0)
        return mean_iou(matrix) if matrix.any() else None


class ClassificationScorer(Scorer):
    """labels: a CSV file of names of images and classes (ids or names), or "folders": each image lies in a folder named
    as its class.

    Raises:
        BadInputError: a file that cannot be read, or a class that the model does not have.
    """

    metric = "accuracy"

    def __init__(self, loaded: LoadedModel, labels: str) -> None:
        super().__init__(loaded, labels)
        self.ids = {name.lower(): number for number, name in enumerate(loaded.class_names())}
        self.classes: dict[str, str] = {}
        if labels == FOLDERS:
            return
        try:
            with open(labels, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if row]
        except (OSError, ValueError, csv.Error) as error:
            raise BadInputError(
                f"cannot read --labels {labels}: {getattr(error, 'strerror', None) or error}"
            ) from error
        if wrong := [row for row in rows if len(row) < 2]:
            raise BadInputError(f"a line of {labels} must be an image's name, a comma, its class; got {wrong[0]}")
        # A first line may name the columns.
        start = 1 if rows and self.class_id(rows[0][1]) is None and len(rows) > 1 else 0
        self.classes = {Path(row[0].strip()).name: row[1] for row in rows[start:]}

    def class_id(self, text: str) -> int | None:
        """A class's number, of its number or name; None for none of the model's."""
        text = text.strip()
        if text.isdecimal() and int(text) < len(self.ids):
            return int(text)
        return self.ids.get(text.lower())

    def compared(self, path: Path, image: Image.Image, outputs: Any) -> bool:
        text = path.parent.resolve().name if self.labels == FOLDERS else self.classes.get(path.name)
        if text is None:
            raise ImageError(f"no label for {path.name} in {self.labels}")
        truth = self.class_id(text)
        if truth is None:
            raise ImageError(f"the label of {path}, {text!r}, is no class of the model: it has {len(self.ids)}")
        return int(outputs.logits[0].argmax()) == truth

    def score_of(self, found: Sequence[bool]) -> float:
        return float(np.mean(found))


class DetectionScorer(Scorer):
    """labels: annotations in COCO's format; classes are matched by name, and where no name is equal by number.

    Raises:
        BadInputError: no such file, or another format.
    """

    metric = "AP"

    def __init__(self, loaded: LoadedModel, labels: str) -> None:
        super().__init__(loaded, labels)
        try:
            data = json.loads(Path(labels).read_text(encoding="utf-8"))
            categories = {each["id"]: str(each["name"]).lower() for each in data["categories"]}
            self.image_ids = {Path(each["file_name"]).name: each["id"] for each in data["images"]}
            self.boxes: dict[Any, list[Any]] = defaultdict(list)
            for each in data["annotations"]:
                self.boxes[each["image_id"]].append((each["bbox"], each["category_id"], each.get("iscrowd", 0)))
        except OSError as error:
            raise BadInputError(f"cannot read --labels {labels}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(f"{labels} holds no annotations in COCO's format: {error!r}") from error
        own = {str(name).lower(): int(number) for number, name in loaded.model.config.id2label.items()}
        by_name = any(name in own for name in categories.values())
        self.own_id = {number: own.get(name, -1) if by_name else number for number, name in categories.items()}

    def compared(self, path: Path, image: Image.Image, outputs: Any) -> tuple[Boxes, Truth]:
        if path.name not in self.image_ids:
            raise ImageError(f"no image {path.name} in {self.labels}")
        rows = self.boxes[self.image_ids[path.name]]
        corners = np.array([[x, y, x + w, y + h] for (x, y, w, h), *_ in rows], dtype=float).reshape(-1, 4)
        labels = np.array([self.own_id.get(number, -1) for _, number, _ in rows], dtype=int)
        truth = Truth(corners, labels, np.array([bool(crowd) for *_, crowd in rows], dtype=bool))
        return find_boxes(self.loaded, outputs, image), truth

    def score_of(self, found: Sequence[tuple[Boxes, Truth]]) -> float | None:
        from .average_precision import average_precision

        return average_precision([boxes for boxes, _ in found], [truth for _, truth in found])


SCORERS: dict[str, type[Scorer]] = {
    "segment": SegmentationScorer,
    "classify": ClassificationScorer,
    "detect": DetectionScorer,
}


def scorer_for(loaded: LoadedModel, labels: str) -> Scorer:
    """The scorer of the model's task. Raises BadInputError for a model of no task, or one that has no labels here."""
    if loaded.task not in SCORERS:
        raise BadInputError(f"--labels scores models that {', '.join(SCORERS)}; {loaded.name} is none of them")
    return SCORERS[loaded.task](loaded, labels)
