"""Sheets: titled pictures in rows, each with its own legend, under a heading and above a legend of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import AiluRusError
from .palettes import Color

INK: Color = (20, 20, 20)
GRAY: Color = (95, 95, 95)
GAP = 16


@dataclass(frozen=True)
class LegendEntry:
    """A color and what it means.

    Args:
        color: red, green and blue, 0 to 255.
        text: what it means.
        striped: whether it is drawn in stripes on white.

    Example:
        >>> LegendEntry((128, 64, 128), "road").text
        'road'
    """

    color: Color
    text: str
    striped: bool = False


@dataclass(frozen=True)
class Panel:
    """A picture with its title, for `draw_sheet` and for a report.

    Args:
        title: above the picture, in a few words.
        picture: of any size.
        note: numbers, under the title.
        legend: of this picture alone, below it.

    Example:
        >>> from PIL import Image
        >>> Panel("photograph", Image.new("RGB", (64, 48))).note
        ''
    """

    title: str
    picture: Image.Image
    note: str = ""
    legend: tuple[LegendEntry, ...] = ()


def draw_sheet(
    panels: Sequence[Panel],
    *,
    columns: int = 2,
    heading: str = "",
    legend: Sequence[LegendEntry] = (),
    panel_width: int = 480,
) -> Image.Image:
    """Titled pictures of one width in rows, each above its own legend.

    Args:
        panels: row by row; all are drawn in the shape of the first.
        columns: panels a row, at most.
        heading: above all, such as the setting; "" for none.
        legend: of all panels, at the bottom.
        panel_width: pixels a panel; the height follows the first picture.

    Returns:
        The sheet.

    Raises:
        AiluRusError: no panels, or fewer columns than 1.

    Example:
        >>> from PIL import Image
        >>> photo = Image.new("RGB", (64, 48))
        >>> draw_sheet([Panel("off", photo), Panel("on", photo, "2.6x")], panel_width=64).width
        176
    """
    if not panels or columns < 1:
        raise AiluRusError(f"a sheet needs panels and at least 1 column, not {len(panels)} panels in {columns}")
    columns = min(columns, len(panels))
    size = panel_width, round(panel_width * panels[0].picture.height / panels[0].picture.width)
    type_ = _Type(panel_width)
    width = columns * (panel_width + GAP) + GAP
    top = GAP // 2 + (type_.line(type_.large) + GAP // 2 if heading else 0)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [_row_height(row, size, type_) for row in rows]
    height = top + sum(heights) + type_.legend_height(legend, width - 2 * GAP)
    sheet = Image.new("RGB", (width, height + GAP // 2), "white")
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text((GAP, GAP // 2), heading, fill=GRAY, font=type_.fit(heading, type_.large, width - 2 * GAP))
    for row, taken in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            _draw_panel(sheet, panel, (GAP + column * (panel_width + GAP), top), size, type_, _has_notes(row))
        top += taken
    type_.draw_legend(sheet, legend, (GAP, top), width - 2 * GAP)
    return sheet


def striped(shape: tuple[int, int], color: Color) -> np.ndarray:
    """Diagonal stripes of a color and white, uint8 [H, W, 3]."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    lines = (rows + columns) % 4 < 2
    return np.where(lines[..., None], np.array(color, dtype=np.uint8), np.uint8(255))


def scaled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at (width, height): a label map, which holds few colors, unblurred, and a photograph not blocky."""
    few_colors = picture.getcolors(maxcolors=64) is not None
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if few_colors else Image.Resampling.LANCZOS)


def _font(size: float) -> ImageFont.FreeTypeFont:
    """The letters that Pillow brings: Latin alone, without × and →. With a size it is never a bitmap font."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))


class _Type:
    """The letters of a sheet, by the width of its panels, and legends set in them."""

    def __init__(self, panel_width: int) -> None:
        small = max(11, round(panel_width / 28))
        self.small, self.large = _font(small), _font(round(small * 1.3))
        self.swatch = small

    @staticmethod
    def line(font: ImageFont.FreeTypeFont) -> int:
        """Height of a line."""
        return round(font.size * 1.45)

    @staticmethod
    def fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> ImageFont.FreeTypeFont:
        """The font, or a smaller one in which the text has room."""
        taken = font.getlength(text)
        return font if taken <= width else _font(max(6, font.size * width / taken))

    def places(self, legend: Sequence[LegendEntry], width: int) -> list[tuple[int, int]]:
        """Where each entry begins: from left to right, in as many lines as it takes."""
        found, x, y = [], 0, 0
        for entry in legend:
            taken = round(self.swatch * 1.4 + self.small.getlength(entry.text))
            if x and x + taken > width:
                x, y = 0, y + self.line(self.small)
            found.append((x, y))
            x += taken + self.swatch
        return found

    def legend_height(self, legend: Sequence[LegendEntry], width: int) -> int:
        return self.places(legend, width)[-1][1] + self.line(self.small) + GAP // 2 if legend else 0

    def draw_legend(
        self, sheet: Image.Image, legend: Sequence[LegendEntry], corner: tuple[int, int], width: int
    ) -> None:
        draw, side = ImageDraw.Draw(sheet), self.swatch
        for entry, (x, y) in zip(legend, self.places(legend, width), strict=True):
            left, top = corner[0] + x, corner[1] + y + GAP // 4
            fill = striped((side, side), entry.color) if entry.striped else np.full((side, side, 3), entry.color)
            sheet.paste(Image.fromarray(fill.astype(np.uint8)), (left, top))
            draw.rectangle((left, top, left + side - 1, top + side - 1), outline=INK)
            draw.text((left + side * 1.4, top + side / 2), entry.text, fill=INK, font=self.small, anchor="lm")


def _has_notes(row: Sequence[Panel]) -> bool:
    return any(panel.note for panel in row)


def _row_height(row: Sequence[Panel], size: tuple[int, int], type_: _Type) -> int:
    titles = type_.line(type_.large) + (type_.line(type_.small) if _has_notes(row) else 0)
    return titles + size[1] + max(type_.legend_height(panel.legend, size[0]) for panel in row) + GAP


def _draw_panel(
    sheet: Image.Image, panel: Panel, corner: tuple[int, int], size: tuple[int, int], type_: _Type, noted: bool
) -> None:
    draw, (left, top) = ImageDraw.Draw(sheet), corner
    draw.text((left, top), panel.title, fill=INK, font=type_.fit(panel.title, type_.large, size[0]))
    top += type_.line(type_.large)
    if noted:
        draw.text((left, top), panel.note, fill=GRAY, font=type_.fit(panel.note, type_.small, size[0]))
        top += type_.line(type_.small)
    sheet.paste(scaled(panel.picture, size), (left, top))
    type_.draw_legend(sheet, panel.legend, (left, top + size[1] + GAP // 4), size[0])
