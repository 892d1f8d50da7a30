"""One picture that shows what reduction changed: the image, both predictions, where they differ, a legend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .arrays import ImageLike, LabelMap, label_array, pixel_array
from .differences import GREEN, RED, UNLABELED, YELLOW, colorize_labels, draw_difference
from .palettes import Color, class_palette

INK: Color = (20, 20, 20)


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
    reduced_title: str = "AiluRus on",
    assignment_title: str = "token assignment",
    panel_width: int = 480,
) -> Image.Image:
    """One labeled picture: photo, both label maps, where they differ, the assignment, the ground truth, a legend.

    Args:
        image: [H, W, 3] uint8 or PIL.
        plain, reduced: label maps [H, W] without and with reduction.
        assignment: a picture from `draw_assignment`, or None for no such panel.
        labels: ground truth [H, W], or None for no such panel.
        class_names: names in id order; the legend shows those that occur.
        palette: [classes, 3]; default `class_palette(class_names)`.
        plain_title, reduced_title, assignment_title: above the panels.
        panel_width: pixels a panel; the height follows the image.

    Returns:
        The sheet.

    Raises:
        AiluRusError: a label map that is not of the image's size.

    Example:
        >>> import numpy as np
        >>> photo, labels = np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), int)
        >>> compare_predictions(photo, labels, labels, class_names=["road", "sky"], panel_width=64).width
        164
    """
    palette = class_palette(class_names) if palette is None else palette
    photo = Image.fromarray(pixel_array(image))
    share = float((label_array(plain) != label_array(reduced)).mean())
    legend = {RED: "only off is right", GREEN: "only on is right", YELLOW: "both wrong, or unlabeled"}
    difference = draw_difference(photo, plain, reduced, labels, len(class_names))
    panels = [
        ("image", photo),
        (plain_title, colorize_labels(plain, palette)),
        (reduced_title, colorize_labels(reduced, palette)),
        (f"they differ on {share:.1%} of the pixels", difference),
    ]
    if assignment is not None:
        panels.append((assignment_title, assignment))
    if labels is not None:
        panels.append(("ground truth", colorize_labels(labels, palette)))

    seen = np.unique(np.concatenate([label_array(m).ravel() for m in (plain, reduced, labels) if m is not None]))
    entries = [(tuple(int(c) for c in palette[i]), class_names[i]) for i in seen if 0 <= i < len(class_names)]
    if labels is not None:
        if len(entries) < len(seen):
            entries.append((UNLABELED, "unlabeled"))
        entries.extend((color, f"differ: {text}") for color, text in legend.items())
    return _sheet(panels, entries, panel_width)


def _sheet(
    panels: Sequence[tuple[str, Image.Image]], legend: Sequence[tuple[tuple[int, ...], str]], width: int
) -> Image.Image:
    """Titled panels of one width in rows of three (two where there are four), the legend below."""
    height = round(width * panels[0][1].height / panels[0][1].width)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    gap, font = 12, ImageFont.load_default(size=18)
    title, line = 30, 28
    sheet_width = columns * (width + gap) + gap

    entries, x, y = [], gap, 0
    for color, text in legend:  # laid out first: how many lines it takes decides the height
        taken = 22 + int(font.getlength(text)) + 22
        if x > gap and x + taken > sheet_width:
            x, y = gap, y + line
        entries.append((x, y, color, text))
        x += taken
    legend_top = rows * (height + title + gap) + gap
    sheet = Image.new("RGB", (sheet_width, legend_top + y + line + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, picture) in enumerate(panels):
        left, top = gap + i % columns * (width + gap), i // columns * (height + title + gap)
        draw.text((left, top + title / 2 + 3), name, fill=INK, font=font, anchor="lm")
        # Label maps hold few colors and must not be blurred; a photograph must not be made blocky.
        few_colors = picture.getcolors(maxcolors=64) is not None
        resample = Image.Resampling.NEAREST if few_colors else Image.Resampling.BICUBIC
        sheet.paste(picture.resize((width, height), resample), (left, top + title))
    for left, top, color, text in entries:
        top += legend_top
        draw.rectangle((left, top + 4, left + 16, top + 20), fill=color, outline=INK)
        draw.text((left + 22, top + 12), text, fill=INK, font=font, anchor="lm")
    return sheet
