"""What reduction costs and gains on one's own images: interleaved times, agreement, mIoU, and a picture of each.

Used by `ailurus-hf segment` and examples/segment_image.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..apply import ailurus_enabled
from ..visualization import (
    Panel,
    class_legend,
    class_palette,
    compare_predictions,
    difference_legend,
    draw_difference,
    overlay_labels,
)
from .folders import read_labels
from .paired import Pair, run_pair
from .report import Shown
from .writing import save_picture

if TYPE_CHECKING:
    from .loading import LoadedModel

Save = Callable[[Image.Image, Path], None]
Add = Callable[[Image.Image, Pair, dict[str, Any], Shown], None]
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


class SegmentationPairs:
    """Images of which each is segmented plain and reduced, in turn.

    Args:
        loaded: the model, with settings to reduce it.
        labels: ground truth, as in `read_labels`; None: nothing is scored.
        repeats: timed runs of each.
    """

    def __init__(self, loaded: LoadedModel, labels: str | None, repeats: int) -> None:
        self.loaded, self.labels, self.repeats = loaded, labels, repeats
        self.names = loaded.class_names()
        # By "plain" and "reduced", pixels of all images by true and predicted class.
        self.confusions: dict[str, np.ndarray] = {}

    def compare(self, path: Path, image: Image.Image, report: Add | None) -> tuple[dict[str, Any], Image.Image]:
        """The numbers of one image, of `Pair.to_dict`, and a picture of both label maps; both go into the report.

        Args:
            path, image: of the image.
            report: `Report.add` with the image's name; None: there is no report.
        """
        loaded = self.loaded
        truth = read_labels(path, self.labels, image.size, len(self.names)) if self.labels else None
        inputs = loaded.prepare(image)
        pair = run_pair(loaded, inputs, self.repeats)
        with ailurus_enabled(loaded.model, loaded.ailurus):
            pictures = loaded.draw_clusters(inputs)
        maps = {"plain": label_map(loaded, pair.plain, image), "reduced": label_map(loaded, pair.reduced, image)}
        scores: dict[str, float | None] = dict.fromkeys(maps)
        if truth is not None:
            for kind, labels in maps.items():
                matrix = confusion(labels, truth, len(self.names))
                self.confusions[kind] = self.confusions.get(kind, 0) + matrix
                scores[kind] = mean_iou(matrix) if matrix.any() else None
        agreement = float((maps["plain"] == maps["reduced"]).mean())
        told = ["" if score is None else f"mIoU {score:.1%}" for score in scores.values()]
        titles = pair.titles()
        picture = compare_predictions(
            image,
            maps["plain"],
            maps["reduced"],
            pictures.assignment,
            truth,
            class_names=self.names,
            plain_title=titles[0],
            plain_note=told[0],
            reduced_title=titles[1],
            reduced_note=", ".join(filter(None, [told[1], f"{agreement:.1%} of the pixels agree"])),
            assignment_title=f"{pictures.num_tokens} tokens in {pictures.num_clusters} clusters",
            heading=f"{path.name}: {loaded.setting()}",
        )
        result = pair.to_dict(agreement, **_named(scores))
        if report is not None:
            report(image, pair, result, show_label_maps(image, maps["plain"], maps["reduced"], truth, self.names))
        return result, picture

    def scores(self) -> dict[str, float | None]:
        """mIoU over all pixels, of plain and reduced; None without ground truth."""
        matrices = {kind: self.confusions.get(kind) for kind in ("plain", "reduced")}
        return _named({k: None if m is None or not m.any() else mean_iou(m) for k, m in matrices.items()})


def show_label_maps(
    image: Image.Image, plain: np.ndarray, reduced: np.ndarray, truth: np.ndarray | None, names: Sequence[str]
) -> Shown:
    """Both label maps laid over the image, where they differ, and the ground truth where there is one."""
    palette, maps = class_palette(names), [plain, reduced, *([] if truth is None else [truth])]
    legend = class_legend(maps, names, palette)
    sides = [Panel("labels", overlay_labels(image, labels, palette), legend=legend) for labels in (plain, reduced)]
    difference = draw_difference(image, plain, reduced, truth, len(names))
    panels = [Panel("where they differ", difference, legend=difference_legend(truth is not None))]
    if truth is not None:
        panels.append(Panel("ground truth", overlay_labels(image, truth, palette)))
    return Shown(sides, panels)


def _named(scores: dict[str, float | None]) -> dict[str, float | None]:
    return {f"{kind}_miou": score for kind, score in scores.items()}
