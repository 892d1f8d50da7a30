"""CIFAR-10 for training: pictures held in memory as 32 x 32 pixels, made larger in the same step that changes them.

The folder holds train.parquet and validation.parquet (or test.parquet) with columns image {bytes, path} and label, as
the Hub has it. Used by train_classifier.py.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SIZE = 224  # pixels a model sees: 14 x 14 patches of 16


class Cifar10:
    """One split in memory: images ByteTensor[n, 3, 32, 32] and labels LongTensor[n]. limit: only so many."""

    def __init__(self, folder: Path, split: str, limit: int | None = None):
        table = pyarrow.parquet.read_table(folder / f"{split}.parquet").slice(0, limit)
        pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table["image"].to_pylist()]
        self.images = torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor(table["label"].to_pylist())

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Pictures as a model sees them: enlarged and normalized, Tensor[B, 3, 224, 224]."""
        return enlarge(normalize(self.images[indices]))


def normalize(images: Tensor) -> Tensor:
    """Bytes 0..255 to -1..1."""
    return images.float() / 127.5 - 1


def enlarge(images: Tensor, zoom: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
    """Tensor[B, 3, 32, 32] to [B, 3, 224, 224], bilinear; what lies outside is the picture mirrored.

    zoom: source pixels for one seen before, negative to mirror left and right, and shift, as a share of the side: each
    Tensor[B, 2], of rows and columns.
    """
    side = images.shape[-1]
    middle = (torch.arange(SIZE) + 0.5) / SIZE - 0.5
    weights = []
    for axis in range(2):
        zoom_here, shift_here = (x[:, axis, None] if isinstance(x, Tensor) else x for x in (zoom, shift))
        source = ((middle * zoom_here + shift_here + 0.5) * side).abs()
        source = (side - (side - source).abs() - 0.5).clamp(0, side - 1)
        weights.append((1 - (source[..., None] - torch.arange(side)).abs()).clamp_min(0))
    rows, columns = (w[:, None] if w.ndim == 3 else w for w in weights)
    return rows @ (images @ columns.mT)


def training_batch(
    data: Cifar10, indices: Sequence[int], mix: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Changed and normalized pictures, Tensor[B, 3, 224, 224], and their share of each class, Tensor[B, 10].

    Shift, zoom, mirror and color; with probability `mix` also CutMix or Mixup, half and half, with the same batch in
    another order.
    """
    count = len(indices)
    random = lambda low, high, *shape: torch.tensor(rng.uniform(low, high, (count, *shape)), dtype=torch.float32)  # noqa: E731
    pixels, shares = normalize(data.images[indices]), F.one_hot(data.labels[indices], len(CLASSES)).float()
    if rng.random() < mix:
        pixels, shares = (cutmix if rng.random() < 0.5 else mixup)(pixels, shares, rng)
    pixels = pixels * (1 + random(-0.2, 0.2, 1, 1, 1)) + random(-0.2, 0.2, 1, 1, 1) + random(-0.06, 0.06, 3, 1, 1)
    zoom = (random(-0.2, 0.12, 1) + random(-0.1, 0.1, 2)).exp()
    zoom[:, 1] *= random(-1, 1).sign()
    return enlarge(pixels, zoom, random(-0.12, 0.12, 2)), shares


def cutmix(pixels: Tensor, shares: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A square of each picture comes from another one (Yun et al. 2019)."""
    size = pixels.shape[-1]
    side = round(size * np.sqrt(rng.uniform()))
    top, left = rng.integers(size - side + 1, size=2)
    box = (..., slice(top, top + side), slice(left, left + side))
    other, mixed = torch.from_numpy(rng.permutation(len(pixels))), pixels.clone()
    mixed[box] = pixels[other][box]
    return mixed, torch.lerp(shares, shares[other], side**2 / size**2)


def mixup(pixels: Tensor, shares: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The weighted mean of each picture and another one (Zhang et al. 2018)."""
    other, share = torch.from_numpy(rng.permutation(len(pixels))), rng.beta(0.8, 0.8)
    return torch.lerp(pixels, pixels[other], share), torch.lerp(shares, shares[other], share)


@torch.no_grad()
def correct_images(model, data: Cifar10, indices: Sequence[int], batch_size: int = 50) -> Tensor:
    """How many of the images the model names rightly, LongTensor[]."""
    right = torch.zeros((), dtype=torch.long)
    for start in range(0, len(indices), batch_size):
        batch = list(indices[start : start + batch_size])
        right += (model(data.batch(batch)).logits.argmax(-1) == data.labels[batch]).sum()
    return right
