"""CamVid for training: images held in memory, random windows of a random canvas, and the score on whole images.

A sample is a window of whole patches cut from a canvas as large as an enlarged image. The canvas is a random scale,
mirror image and shift of the photograph, so a window's position on the canvas means what it means at test time (sky is
up, road is down) and position embeddings are trained at the very positions where they will be used.
Used by pretrain_masked.py, train_segmenter.py and finetune_segmentation.py.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

CLASSES = [
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
]  # fmt: skip
UNLABELED = 11
RARE = (2, 6, 7, 8, 9, 10)  # pole, sign, fence, car, pedestrian, bicyclist: pasted from one image into another
HEIGHT, WIDTH, PATCH = 360, 480, 16


class CamVid:
    """The photographs and label maps (uint8 class ids, 11 unlabeled) of one split, in memory.

    enlarge: how many times larger than the photographs a model sees them; `canvas` and `grid` are that in pixels and
    patches (23 x 30 patches at 1, whose last row is half padding; 45 x 60 at 2).
    """

    def __init__(self, folder: Path, split: str, enlarge: int = 1):
        self.enlarge, self.canvas = enlarge, (enlarge * HEIGHT, enlarge * WIDTH)
        self.grid = (-(-self.canvas[0] // PATCH), self.canvas[1] // PATCH)
        names = sorted(path.stem for path in (folder / split / "images").glob("*.jpg"))
        self.images = [Image.open(folder / split / "images" / f"{n}.jpg").convert("RGB") for n in names]
        self.labels = [Image.open(folder / split / "labels" / f"{n}.png") for n in names]
        for picture in self.images + self.labels:
            picture.load()

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """Normalized photograph, Tensor[3, 360, 480] times `enlarge`."""
        picture = self.images[index].resize(self.canvas[::-1], Image.Resampling.BILINEAR)
        return normalize(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float())

    def label(self, index: int) -> Tensor:
        """Class ids, LongTensor[360, 480]."""
        return torch.from_numpy(np.array(self.labels[index])).long()


def normalize(image: Tensor) -> Tensor:
    """Bytes 0..255 to -1..1, the "vit" normalization of Segmenter."""
    return image / 127.5 - 1


def random_window(
    data: CamVid,
    index: int,
    top: int,
    left: int,
    grid: tuple[int, int],
    scales: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Patches (top, left) .. + grid of a random canvas of image `index`: Tensor[3, h, w] 0..255, LongTensor[h, w]."""
    height, width = grid[0] * PATCH, grid[1] * PATCH
    scale = float(np.exp(rng.uniform(*np.log(scales))))
    stretch = float(np.exp(rng.uniform(-0.12, 0.12)))
    scale_y, scale_x = data.enlarge * scale, data.enlarge * scale * stretch
    # Where the canvas begins in the scaled photograph: anywhere that lets the larger hold the smaller, and where
    # possible so that the window holds no padding.
    y = _canvas_start(scale_y * HEIGHT, data.canvas[0], top * PATCH, height, rng) + top * PATCH
    x = _canvas_start(scale_x * WIDTH, data.canvas[1], left * PATCH, width, rng) + left * PATCH
    # The part of the window that lies on the photograph; below the canvas' last row there is padding, as at test.
    bottom = min(height, data.canvas[0] - top * PATCH)
    y0, y1 = max(0, round(-y)), min(bottom, round(scale_y * HEIGHT - y))
    x0, x1 = max(0, round(-x)), min(width, round(scale_x * WIDTH - x))
    box = ((x + x0) / scale_x, (y + y0) / scale_y, (x + x1) / scale_x, (y + y1) / scale_y)
    box = (max(0, box[0]), max(0, box[1]), min(WIDTH, box[2]), min(HEIGHT, box[3]))

    image, label = data.images[index], data.labels[index]
    if rng.random() < 0.5:
        image, label = ImageOps.mirror(image), ImageOps.mirror(label)
    pixels = torch.full((3, height, width), 127.5)
    classes = torch.full((height, width), UNLABELED)
    size = (x1 - x0, y1 - y0)
    part = np.array(image.resize(size, Image.Resampling.BILINEAR, box=box))
    pixels[:, y0:y1, x0:x1] = jitter(torch.from_numpy(part).permute(2, 0, 1).float(), rng)
    part = np.array(label.resize(size, Image.Resampling.NEAREST, box=box))
    classes[y0:y1, x0:x1] = torch.from_numpy(part).long()
    return pixels, classes


def _canvas_start(scaled: float, canvas: int, window_start: int, window: int, rng: np.random.Generator) -> float:
    low, high = sorted((0.0, scaled - canvas))
    fit_low, fit_high = max(low, -window_start), min(high, scaled - window - window_start)
    if fit_low <= fit_high:
        low, high = fit_low, fit_high
    return rng.uniform(low, high)


def jitter(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Random brightness, contrast, saturation and tint of Tensor[3, h, w] in 0..255."""
    if rng.random() < 0.2:
        return image
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3)
    tint = torch.tensor(rng.uniform(0.92, 1.08, 3), dtype=torch.float32)[:, None, None]
    gray = image.mean(0, keepdim=True)
    mean = float(gray.mean())
    image = torch.lerp(gray, image, saturation)
    image = (image - mean) * (contrast * tint) + mean * brightness * tint
    return image.clamp_(0, 255)


def training_batch(
    data: CamVid,
    indices: list[int],
    grid: tuple[int, int],
    scales: tuple[float, float],
    paste: float,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of `grid` patches: normalized Tensor[B, 3, h, w], LongTensor[B, h, w], (top, left) LongTensor[B, 2].

    Photographs are enlarged as the data says, and then by a factor between the two `scales`. With probability `paste`
    the objects of some rare classes are copied over from the same position in another image.
    """
    pixels, classes, corners = [], [], []
    for index in indices:
        top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(data.grid, grid))
        image, label = random_window(data, index, top, left, grid, scales, rng)
        if rng.random() < paste:
            other, other_label = random_window(data, int(rng.integers(len(data))), top, left, grid, scales, rng)
            chosen = torch.tensor(rng.choice(RARE, size=3, replace=False))
            mask = torch.isin(other_label, chosen)
            image = torch.where(mask, other, image)
            label = torch.where(mask, other_label, label)
        pixels.append(image)
        classes.append(label)
        corners.append((top, left))
    return normalize(torch.stack(pixels)), torch.stack(classes), torch.tensor(corners)


def window_positions(
    position_embeddings: Tensor, corners: Tensor, grid: tuple[int, int], whole: tuple[int, int]
) -> Tensor:
    """Rows of the whole grid's embeddings [1, 1 + N, C] under each window: Tensor[B, 1 + h*w, C], class token first."""
    rows = (corners[:, :1] + torch.arange(grid[0]))[:, :, None]
    columns = (corners[:, 1:] + torch.arange(grid[1]))[:, None, :]
    index = (1 + rows * whole[1] + columns).flatten(1)
    index = torch.cat((index.new_zeros(len(index), 1), index), dim=1)
    return position_embeddings[0][index]


@torch.no_grad()
def confusion_on_images(model, data: CamVid, indices: Sequence[int], batch_size: int = 4) -> Tensor:
    """LongTensor[11, 11], rows the truth: every labeled pixel of the whole images, at native resolution."""
    n = len(CLASSES)
    counts = torch.zeros(n * n, dtype=torch.long)
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        logits = model(torch.stack([data.image(i) for i in batch])).logits.float()
        predicted = F.interpolate(logits, size=(HEIGHT, WIDTH), mode="bilinear", align_corners=False).argmax(1)
        truth = torch.stack([data.label(i) for i in batch])
        seen = truth != UNLABELED
        counts += torch.bincount(truth[seen] * n + predicted[seen], minlength=n * n)
    return counts.view(n, n)


def scores(confusion: Tensor) -> dict:
    """{"miou", "pixel_accuracy", "iou": {class: IoU}}, in percent, of a whole data set's confusion matrix."""
    hit = confusion.diag().double()
    iou = 100 * hit / (confusion.sum(0) + confusion.sum(1) - hit)
    return {
        "miou": round(iou.nanmean().item(), 2),
        "pixel_accuracy": round(100 * hit.sum().item() / confusion.sum().item(), 2),
        "iou": {name: round(value, 2) for name, value in zip(CLASSES, iou.tolist())},
    }
