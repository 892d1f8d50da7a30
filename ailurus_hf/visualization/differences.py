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
    """A label map in the palette's colors; labels outside the palette are black.

    Args:
        label_map: [H, W], class ids.
        palette: [classes, 3].

    Returns:
        A picture of H rows and W columns.

    Example:
        >>> import numpy as np
        >>> colorize_labels(np.zeros((48, 64), int), class_palette(["road", "sky"])).size
        (64, 48)
    """
    labels = label_array(label_map)
    picture = np.full((*labels.shape, 3), UNLABELED, dtype=np.uint8)
    known = (labels >= 0) & (labels < len(palette))
    picture[known] = np.asarray(palette, dtype=np.uint8)[labels[known]]
    return Image.fromarray(picture)


def overlay_labels(image: ImageLike, label_map: LabelMap, palette: np.ndarray, opacity: float = 0.6) -> Image.Image:
    """The image with its label map laid over it.

    Args:
        image: [H, W, 3] uint8 or PIL.
        label_map: [H, W], class ids.
        palette: [classes, 3].
        opacity: of the label map, 0 to 1.

    Returns:
        A picture of the image's size.

    Raises:
        AiluRusError: a label map of another size.

    Example:
        >>> import numpy as np
        >>> photo, labels = np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), int)
        >>> overlay_labels(photo, labels, class_palette(["road", "sky"])).size
        (64, 48)
    """
    photo = Image.fromarray(pixel_array(image))
    check_size(photo, label_array(label_map), "label map")
    return Image.blend(photo, colorize_labels(label_map, palette), opacity)


def draw_difference(
    image: ImageLike, plain: LabelMap, reduced: LabelMap, labels: LabelMap | None = None, num_classes: int | None = None
) -> Image.Image:
    """The image in pale gray, and in color the pixels where two label maps differ.

    Without labels they are red. With them: red where reduction made it wrong, green where it made it right, yellow
    where both are wrong or the pixel is unlabeled.

    Args:
        image: [H, W, 3] uint8 or PIL.
        plain, reduced: label maps [H, W] without and with reduction.
        labels: ground truth [H, W].
        num_classes: labels below 0 or, if given, from this one on are no class: the pixel is unlabeled.

    Returns:
        A picture of the image's size.

    Raises:
        AiluRusError: a label map of another size.

    Example:
        >>> import numpy as np
        >>> photo, labels = np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), int)
        >>> draw_difference(photo, labels, labels + 1).getpixel((0, 0))
        (230, 30, 30)
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
