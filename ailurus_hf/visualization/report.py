"""A page that shows plain beside reduced: one HTML file, with a slider, pictures and numbers for each image."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

from .sheets import LegendEntry, Panel

# Pictures of the sliders, and those below them, are scaled down to this many pixels at their longer side.
LARGE, SMALL = 1024, 768
# A page of more images than these would be too large to open.
MOST_IMAGES = 50
# What a number is, and its values without and with reduction.
Row = tuple[str, str, str]


@dataclass(frozen=True)
class ComparedImage:
    """One image of a `comparison_page`.

    Args:
        name: of the image.
        plain, reduced: what the slider divides. The legend of the first is written below it; notes tell those who do
            not see the pictures what they are.
        panels: pictures below the slider, such as the clusters and the heat map of token counts.
        rows: numbers: what each is, without reduction, with it; "" for none.

    Example:
        >>> from PIL import Image
        >>> side = Panel("off: 732 ms", Image.new("RGB", (64, 48)))
        >>> ComparedImage("street.jpg", side, side, rows=[("milliseconds", "732", "282")]).name
        'street.jpg'
    """

    name: str
    plain: Panel
    reduced: Panel
    panels: Sequence[Panel] = ()
    rows: Sequence[Row] = ()


def comparison_page(
    images: Iterable[ComparedImage],
    *,
    title: str,
    setting: str = "",
    summary: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
    footer: str = "",
) -> str:
    """A page that shows plain beside reduced: one HTML file that needs no other and no network.

    A handle divides the two pictures of each image; it moves by mouse, touch and keyboard. Pictures are scaled down to
    1024 pixels, and of more than 50 images the first 50 are shown, which the page says.

    Args:
        images: the images; a generator is read one by one, so that not all pictures are in memory.
        title: of the page.
        setting: how the model is reduced, in words.
        summary: numbers of all images: what each is, and its value; the first one stands out.
        notes: lines under the setting, such as the model and the device.
        footer: the last line.

    Returns:
        The HTML text.

    Example:
        >>> from PIL import Image
        >>> side = Panel("off", Image.new("RGB", (64, 48)))
        >>> page = comparison_page([ComparedImage("street.jpg", side, side)], title="Segmenter: off and on")
        >>> page.count("<img ")
        2
    """
    page = Page()
    for image in images:
        page.add(image)
    return page.html(title=title, setting=setting, summary=summary, notes=notes, footer=footer)


class Page:
    """A `comparison_page` that grows image by image: it holds their HTML, not their pictures."""

    def __init__(self) -> None:
        self.sections: list[str] = []
        self.rows: list[tuple[str, Sequence[Row]]] = []
        self.num_images = 0

    @property
    def is_full(self) -> bool:
        return len(self.sections) >= MOST_IMAGES

    def add(self, image: ComparedImage | None) -> None:
        """Shows an image where there is room; None counts one that is not shown."""
        self.num_images += 1
        if image is not None and not self.is_full:
            self.sections.append(_section(image, len(self.sections) + 1))
            self.rows.append((image.name, image.rows))

    def html(
        self,
        *,
        title: str,
        setting: str = "",
        summary: Sequence[tuple[str, str]] = (),
        notes: Sequence[str] = (),
        footer: str = "",
    ) -> str:
        """As `comparison_page`."""
        notes = [*notes, *([self._left_out()] if self.num_images > len(self.sections) else [])]
        return Template(part("report.html")).substitute(
            style=part("compared.css"),
            script=part("compared.js"),
            title=escape(title),
            setting=escape(setting),
            notes="\n".join(f'<p class="soft">{escape(note)}</p>' for note in notes),
            tiles=tiles_html(summary),
            contents=self._contents() if len(self.sections) > 1 else "",
            sections="\n".join(self.sections),
            footer=escape(footer),
        )

    def _left_out(self) -> str:
        total = self.num_images
        return f"The first {len(self.sections)} of {total} images are shown; the numbers below are of all {total}."

    def _contents(self) -> str:
        """A table of the images shown, each with a link to its section and the numbers it has with reduction."""
        heads = [what for what, _, _ in self.rows[0][1]]
        body = []
        for number, (name, rows) in enumerate(self.rows, 1):
            cells = "".join(f"<td>{escape(reduced)}</td>" for _, _, reduced in rows)
            body.append(f'<tr><th scope="row"><a href="#image-{number}">{escape(name)}</a></th>{cells}</tr>')
        head = "".join(f'<th scope="col">{escape(what)}</th>' for what in ["with AiluRus", *heads])
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        return f'<nav aria-label="Images">{table}</nav>'


def _section(image: ComparedImage, number: int) -> str:
    name = escape(image.name)
    return (
        f'<section id="image-{number}" aria-labelledby="name-{number}"><h2 id="name-{number}">{name}</h2>\n'
        f"{compared_html(image)}</section>"
    )


def compared_html(image: ComparedImage) -> str:
    """An image's slider, legend, numbers and panels; compared.css is how it looks, and compared.js moves it."""
    sides = "".join(
        f'<div class="{kind}">{_picture(side, image.name, LARGE)}<span class="tag">{escape(side.title)}</span></div>'
        for kind, side in (("before", image.plain), ("after", image.reduced))
    )
    label = escape(f"Divide between off and on: {image.name}", quote=True)
    shape = image.plain.picture.width / image.plain.picture.height
    panels = "\n".join(_figure(panel, image.name) for panel in image.panels)
    return (
        f'<div class="compared"><div class="slider" style="--shape:{shape:.4f}">{sides}'
        f'<input type="range" min="0" max="100" value="50" aria-label="{label}" aria-valuetext="50 % off, 50 % on">'
        f'<div class="handle"></div></div>\n{_legend(image.plain.legend)}{_table(image.rows)}\n'
        f'<div class="panels">{panels}</div></div>'
    )


def tiles_html(numbers: Sequence[tuple[str, str]]) -> str:
    """Numbers as tiles, the first of which stands out: what each is, and its value."""
    tiles = "\n".join(f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for what, value in numbers)
    return f'<dl class="tiles">\n{tiles}\n</dl>'


def part(name: str) -> str:
    """The text of a file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _figure(panel: Panel, name: str) -> str:
    note = f"<small>{escape(panel.note)}</small>" if panel.note else ""
    picture = _picture(panel, name, SMALL)
    return f"<figure><figcaption>{escape(panel.title)}{note}</figcaption>{picture}{_legend(panel.legend)}</figure>"


def _table(rows: Sequence[Row]) -> str:
    """Numbers, off and on; "" for none."""
    if not rows:
        return ""
    body = "".join(
        f'<tr><th scope="row">{escape(what)}</th><td>{escape(plain)}</td><td>{escape(reduced)}</td></tr>'
        for what, plain, reduced in rows
    )
    head = '<tr><td></td><th scope="col">off</th><th scope="col">on</th></tr>'
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _legend(legend: Sequence[LegendEntry]) -> str:
    """Colors and what they mean, as a list of class "legend"; "" for none."""
    if not legend:
        return ""
    return f'<ul class="legend">{"".join(_entry(entry) for entry in legend)}</ul>'


def _entry(entry: LegendEntry) -> str:
    color = "#{:02x}{:02x}{:02x}".format(*entry.color)
    fill = f"repeating-linear-gradient(135deg,{color} 0 2px,#fff 2px 4px)" if entry.striped else color
    return f'<li><i style="background:{fill}"></i>{escape(entry.text)}</li>'


def _picture(panel: Panel, name: str, longest: int) -> str:
    """The picture inside the page: what has few colors without loss, photographs as JPEG."""
    picture = panel.picture.convert("RGB")
    few_colors = picture.getcolors(maxcolors=256) is not None
    scale = min(1.0, longest / max(picture.size))
    if scale < 1:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.NEAREST if few_colors else Image.Resampling.LANCZOS)
    kind = "png" if few_colors else "jpeg"
    written = io.BytesIO()
    if few_colors:
        picture.save(written, "PNG", optimize=True)
    else:
        picture.save(written, "JPEG", quality=85, subsampling=0)
    data = base64.b64encode(written.getvalue()).decode()
    told = f"{panel.title}, {panel.note}" if panel.note else panel.title
    alt = escape(f"{told}: {name}", quote=True)
    size_of = f'width="{picture.width}" height="{picture.height}"'
    return f'<img alt="{alt}" {size_of} decoding="async" draggable="false" src="data:image/{kind};base64,{data}">'
