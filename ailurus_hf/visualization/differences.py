"""Label maps in color, laid over the image, and the pixels where two of them differ."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .arrays import ImageLike, LabelMap, check_size, label_array, pixel_array
from .palettes import BETTER, NEITHER, WORSE, Color
from .sheets import LegendEntry, striped

UNLABELED: Color = (0, 0, 0)
# Of the photograph's contrast, what is left under the differences.
FAINT = 0.16


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

    Without labels they are orange. With them: orange where reduction made it wrong, blue where it made it right,
    striped where both are wrong or the pixel is unlabeled. `difference_legend` says so beside the picture.

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
        (190, 75, 0)
    """
    photo, first, second = pixel_array(image), label_array(plain), label_array(reduced)
    check_size(Image.fromarray(photo), first, "plain prediction")
    check_size(Image.fromarray(photo), second, "reduced prediction")
    picture = faint(photo)
    differs = first != second
    if labels is None:
        picture[differs] = WORSE
        return Image.fromarray(picture)
    truth = label_array(labels)
    check_size(Image.fromarray(photo), truth, "ground truth")
    labeled = (truth >= 0) & (truth < (np.inf if num_classes is None else num_classes))
    neither = differs & ~(labeled & ((first == truth) | (second == truth)))
    picture[neither] = striped(picture.shape[:2], NEITHER)[neither]
    picture[differs & labeled & (first == truth)] = WORSE
    picture[differs & labeled & (second == truth)] = BETTER
    return Image.fromarray(picture)


def faint(photo: np.ndarray) -> np.ndarray:
    """A photograph, uint8 [H, W, 3], in pale gray, for colors to stand out from."""
    gray = photo @ np.array([0.299, 0.587, 0.114])
    return np.repeat((255 - (255 - gray) * FAINT)[..., None], 3, axis=2).astype(np.uint8)


def difference_legend(labeled: bool) -> tuple[LegendEntry, ...]:
    """What the colors of `draw_difference` mean.

    Args:
        labeled: whether ground truth was given.

    Returns:
        Entries for a `Panel`.

    Example:
        >>> [entry.text for entry in difference_legend(labeled=False)]
        ['differs']
    """
    if not labeled:
        return (LegendEntry(WORSE, "differs"),)
    return (
        LegendEntry(WORSE, "only off is right"),
        LegendEntry(BETTER, "only on is right"),
        LegendEntry(NEITHER, "neither, or unlabeled", striped=True),
    )
