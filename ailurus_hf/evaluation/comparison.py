"""What reduction costs and gains on one's own images: interleaved times, agreement, mIoU, and a picture of each.

Used by `ailurus-hf segment` and examples/segment_image.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..apply import ailurus_enabled
from ..visualization import class_palette, compare_predictions, overlay_labels
from .paired import run_pair
from .writing import save_picture

if TYPE_CHECKING:
    from .loading import LoadedModel

Save = Callable[[Image.Image, Path], None]
# Scores of classes, four bytes each, that a label map may take: half a GiB.
MAX_SCORES = 2**27


def confusion(prediction: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels by true and predicted class, [classes, classes]; pixels whose label is no class are left out."""
    labeled = (truth >= 0) & (truth < num_classes)
    pairs = truth[labeled] * num_classes + prediction[labeled]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(matrix: np.ndarray) -> float:
    """Mean over the classes that occur, in truth or prediction, of intersection over union: 0 to 1, NaN for none."""
    intersection = np.diag(matrix)
    union = matrix.sum(0) + matrix.sum(1) - intersection
    return float((intersection[union > 0] / union[union > 0]).mean()) if union.any() else float("nan")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def segment(loaded: LoadedModel, inputs: dict[str, Any], image: Image.Image) -> np.ndarray:
    """The model's label map of an image, [H, W]."""
    return label_map(loaded, loaded(inputs), image)


def label_map(loaded: LoadedModel, outputs: Any, image: Image.Image) -> np.ndarray:
    """The label map, [H, W], of the model's outputs for one image.

    Scores of all classes at a large photograph's size would fill the memory: above `MAX_SCORES` labels are found at a
    smaller size and enlarged.
    """
    size = (image.height, image.width)
    scores = len(loaded.class_names()) * size[0] * size[1]
    logits = getattr(outputs, "logits", None)
    there = logits is not None and logits.shape[-2] >= size[0] and logits.shape[-1] >= size[1]
    scale = 1.0 if there else min(1.0, (MAX_SCORES / scores) ** 0.5)
    small = (max(int(size[0] * scale), 1), max(int(size[1] * scale), 1))
    labels = loaded.processor.post_process_semantic_segmentation(outputs, target_sizes=[small])[0]
    if small != size:
        rows = torch.arange(size[0], device=labels.device) * small[0] // size[0]
        columns = torch.arange(size[1], device=labels.device) * small[1] // size[1]
        labels = labels[rows][:, columns]
    return labels.cpu().numpy()


def save_segmentation(
    image: Image.Image, labels: np.ndarray, names: Sequence[str], files: Sequence[Path], save: Save = save_picture
) -> dict[str, float]:
    """Writes a label map and its overlay to the two files; returns each class's share of the image, largest first."""
    save(Image.fromarray(labels.astype(np.uint8 if len(names) <= 256 else np.int32)), files[0])
    save(overlay_labels(image, labels, class_palette(names)), files[1])
    shares = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
    return {names[i]: round(float(shares[i]), 4) for i in np.argsort(-shares, kind="stable") if shares[i] > 0}


@dataclass
class Comparison:
    """One image, plain beside reduced: median milliseconds, share of equal pixels (0 to 1), tokens, confusions."""

    image: str
    file: str
    plain_ms: float
    reduced_ms: float
    agreement: float
    num_tokens: int
    num_clusters: int
    plain_confusion: np.ndarray | None
    reduced_confusion: np.ndarray | None

    def to_dict(self) -> dict[str, Any]:
        """The numbers for JSON; mIoU is None without ground truth."""
        return {
            "image": self.image,
            "file": self.file,
            "tokens": [self.num_tokens, self.num_clusters],
            "plain_ms": round(self.plain_ms, 3),
            "reduced_ms": round(self.reduced_ms, 3),
            "speedup": round(self.plain_ms / self.reduced_ms, 3),
            "agreement": round(self.agreement, 5),
            "plain_miou": _rounded_miou(self.plain_confusion),
            "reduced_miou": _rounded_miou(self.reduced_confusion),
        }


def compare_image(
    loaded: LoadedModel,
    path: Path,
    image: Image.Image,
    truth: np.ndarray | None,
    repeats: int,
    file: Path,
    save: Save = save_picture,
) -> Comparison:
    """Times plain and reduced forwards in turn on one image and writes the comparison picture.

    Args:
        file: where the picture goes.
    """
    inputs = loaded.prepare(image)
    pair = run_pair(loaded, inputs, repeats)
    plain_ms, reduced_ms = pair.plain_ms, pair.reduced_ms
    plain, reduced = label_map(loaded, pair.plain, image), label_map(loaded, pair.reduced, image)
    with ailurus_enabled(loaded.model, loaded.ailurus):
        pictures = loaded.draw_clusters(inputs)
    names = loaded.class_names()
    matrices = [None if truth is None else confusion(labels, truth, len(names)) for labels in (plain, reduced)]
    scores = ["" if matrix is None else f", mIoU {mean_iou(matrix):.1%}" for matrix in matrices]
    picture = compare_predictions(
        image,
        plain,
        reduced,
        pictures.assignment,
        truth,
        class_names=names,
        plain_title=f"AiluRus off: {plain_ms:.0f} ms{scores[0]}",
        reduced_title=f"AiluRus on: {reduced_ms:.0f} ms ({plain_ms / reduced_ms:.2f}x){scores[1]}",
        assignment_title=f"{pictures.num_tokens} tokens in {pictures.num_clusters} clusters",
    )
    save(picture, file)
    agreement = float((plain == reduced).mean())
    return Comparison(
        str(path), str(file), plain_ms, reduced_ms, agreement, pictures.num_tokens, pictures.num_clusters, *matrices
    )


def summarize(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """All images as one: medians of the times, mean agreement, mIoU over all pixels."""
    plain = statistics.median(c.plain_ms for c in comparisons)
    reduced = statistics.median(c.reduced_ms for c in comparisons)
    return {
        "plain_ms": round(plain, 3),
        "reduced_ms": round(reduced, 3),
        "speedup": round(plain / reduced, 3),
        "agreement": round(statistics.fmean(c.agreement for c in comparisons), 5),
        "plain_miou": _rounded_miou(_total(c.plain_confusion for c in comparisons)),
        "reduced_miou": _rounded_miou(_total(c.reduced_confusion for c in comparisons)),
    }


def _total(matrices: Iterable[np.ndarray | None]) -> np.ndarray | None:
    known = [matrix for matrix in matrices if matrix is not None]
    return np.sum(known, axis=0) if known else None


def _rounded_miou(matrix: np.ndarray | None) -> float | None:
    return None if matrix is None or not matrix.any() else round(mean_iou(matrix), 5)
