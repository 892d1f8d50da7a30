"""Several videos as one: their frames next to each other under titles."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def side_by_side(videos: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> list[Image.Image]:
    """Frames of several videos next to each other under their titles.

    Args:
        videos: each a sequence of frames, all of one size.
        titles: one for each video.

    Returns:
        A sheet for each frame of the shortest video.

    Raises:
        ValueError: fewer titles than videos, or more.

    Example:
        >>> from PIL import Image
        >>> frames = [Image.new("RGB", (64, 48))] * 3
        >>> len(side_by_side([frames, frames], ["off", "on"]))
        3
    """
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
