"""One sheet that shows what reduction changed: the image, both predictions, where they differ, legends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .arrays import ImageLike, LabelMap, label_array, pixel_array
from .differences import UNLABELED, colorize_labels, difference_legend, draw_difference
from .palettes import class_palette
from .sheets import LegendEntry, Panel, draw_sheet


def compare_predictions(
    image: ImageLike,
    plain: LabelMap,
    reduced: LabelMap,
    assignment: Image.Image | None = None,
    labels: LabelMap | None = None,
    *,
    class_names: Sequence[str],
    palette: np.ndarray | None = None,
    plain_title: str = "AiluRus off",
    plain_note: str = "",
    reduced_title: str = "AiluRus on",
    reduced_note: str = "",
    assignment_title: str = "token assignment",
    heading: str = "",
    panel_width: int = 480,
) -> Image.Image:
    """One sheet: above without reduction, below with it; where they differ and the ground truth on the right.

    Args:
        image: [H, W, 3] uint8 or PIL.
        plain, reduced: label maps [H, W] without and with reduction.
        assignment: a picture from `draw_assignment`, or None for no such panel.
        labels: ground truth [H, W], or None for no such panel.
        class_names: names in id order; the legend shows those that occur.
        palette: [classes, 3]; default `class_palette(class_names)`.
        plain_title, reduced_title, assignment_title: above the panels.
        plain_note, reduced_note: numbers, under the titles.
        heading: above all, such as the setting.
        panel_width: pixels a panel; the height follows the image.

    Returns:
        The sheet.

    Raises:
        AiluRusError: a label map that is not of the image's size.

    Example:
        >>> import numpy as np
        >>> photo, labels = np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), int)
        >>> compare_predictions(photo, labels, labels, class_names=["road", "sky"], panel_width=64).width
        176
    """
    palette = class_palette(class_names) if palette is None else palette
    photo = Image.fromarray(pixel_array(image))
    share = float((label_array(plain) != label_array(reduced)).mean())
    difference = Panel(
        f"they differ on {share:.1%} of the pixels",
        draw_difference(photo, plain, reduced, labels, len(class_names)),
        legend=difference_legend(labels is not None),
    )
    above = [Panel("image", photo), Panel(plain_title, colorize_labels(plain, palette), plain_note)]
    below = [] if assignment is None else [Panel(assignment_title, assignment)]
    below.append(Panel(reduced_title, colorize_labels(reduced, palette), reduced_note))
    truth = [] if labels is None else [Panel("ground truth", colorize_labels(labels, palette))]
    if assignment is None:
        panels = [*above, *truth, difference, *below]
    else:
        panels = [*above, *(truth or [difference]), *below, *([difference] if truth else [])]
    maps = [label_map for label_map in (plain, reduced, labels) if label_map is not None]
    return draw_sheet(
        panels,
        columns=2 if len(panels) == 4 else 3,
        heading=heading,
        legend=class_legend(maps, class_names, palette),
        panel_width=panel_width,
    )


def class_legend(
    maps: Sequence[LabelMap], class_names: Sequence[str], palette: np.ndarray | None = None
) -> tuple[LegendEntry, ...]:
    """The classes that occur in label maps, each with its color.

    Args:
        maps: label maps [H, W].
        class_names: names in id order; other labels are "unlabeled", which is black.
        palette: [classes, 3]; default `class_palette(class_names)`.

    Returns:
        Entries for `draw_sheet`.

    Example:
        >>> import numpy as np
        >>> [entry.text for entry in class_legend([np.array([[1, 255]])], ["road", "sky"])]
        ['sky', 'unlabeled']
    """
    palette = class_palette(class_names) if palette is None else palette
    seen = np.unique(np.concatenate([np.unique(label_array(label_map)) for label_map in maps]))
    known = [int(label) for label in seen if 0 <= label < len(class_names)]
    entries = []
    for label in known:
        red, green, blue = (int(channel) for channel in palette[label])
        entries.append(LegendEntry((red, green, blue), class_names[label]))
    return (*entries, *([LegendEntry(UNLABELED, "unlabeled")] if len(known) < len(seen) else []))
