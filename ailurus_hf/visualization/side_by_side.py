"""Several videos as one: their frames next to each other under titles."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def side_by_side(videos: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> list[Image.Image]:
    """Frames of several videos next to each other under their titles."""
    width, height = videos[0][0].size
    letters = max(8, min(18, width // 14))
    font, strip = ImageFont.load_default(size=letters), 2 * round(letters * 0.8)
    sheets = []
    for frames in zip(*videos, strict=True):
        sheet = Image.new("RGB", (width * len(frames), height + strip), "white")
        draw = ImageDraw.Draw(sheet)
        for column, (frame, title) in enumerate(zip(frames, titles, strict=True)):
            draw.text((column * width + 4, strip / 2), title, fill="black", font=font, anchor="lm")
            sheet.paste(frame, (column * width, strip))
        sheets.append(sheet)
    return sheets
