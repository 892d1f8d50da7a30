"""Label maps in color, laid over the image, and the pixels where two of them differ."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .arrays import ImageLike, LabelMap, check_size, label_array, pixel_array
from .palettes import Color

UNLABELED: Color = (0, 0, 0)
RED: Color = (230, 30, 30)
GREEN: Color = (30, 200, 60)
YELLOW: Color = (250, 200, 0)


def colorize_labels(label_map: LabelMap, palette: np.ndarray) -> Image.Image:
    """A label map [H, W] in the palette's colors [classes, 3]; labels outside the palette are black."""
    labels = label_array(label_map)
    picture = np.full((*labels.shape, 3), UNLABELED, dtype=np.uint8)
    known = (labels >= 0) & (labels < len(palette))
    picture[known] = np.asarray(palette, dtype=np.uint8)[labels[known]]
    return Image.fromarray(picture)


def overlay_labels(image: ImageLike, label_map: LabelMap, palette: np.ndarray, opacity: float = 0.6) -> Image.Image:
    """The image [H, W, 3] with its label map [H, W] laid over it."""
    photo = Image.fromarray(pixel_array(image))
    check_size(photo, label_array(label_map), "label map")
    return Image.blend(photo, colorize_labels(label_map, palette), opacity)


def draw_difference(
    image: ImageLike, plain: LabelMap, reduced: LabelMap, labels: LabelMap | None = None, num_classes: int | None = None
) -> Image.Image:
    """The image in pale gray, and in color the pixels where two label maps [H, W] differ.

    Without labels they are red. With them: red where reduction made it wrong, green where it made it right, yellow
    where both are wrong or the pixel is unlabeled (a label below 0 or, if given, from `num_classes` on).
    """
    photo, first, second = pixel_array(image), label_array(plain), label_array(reduced)
    check_size(Image.fromarray(photo), first, "plain prediction")
    check_size(Image.fromarray(photo), second, "reduced prediction")
    gray = photo @ np.array([0.299, 0.587, 0.114])
    picture = np.repeat((255 - (255 - gray) * 0.4)[..., None], 3, axis=2).astype(np.uint8)
    differs = first != second
    if labels is None:
        picture[differs] = RED
        return Image.fromarray(picture)
    truth = label_array(labels)
    check_size(Image.fromarray(photo), truth, "ground truth")
    labeled = (truth >= 0) & (truth < (np.inf if num_classes is None else num_classes))
    picture[differs] = YELLOW
    picture[differs & labeled & (first == truth)] = RED
    picture[differs & labeled & (second == truth)] = GREEN
    return Image.fromarray(picture)
