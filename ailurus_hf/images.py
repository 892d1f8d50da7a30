"""Pictures as this package sees them: RGB, 8 bits a channel, upright; what cannot be brought to that is refused.

Pillow's own conversion cuts 16-bit and float pictures off at 255: they become white or black without a word.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .errors import AiluRusError
from .extras import needs_extra

with needs_extra("vision", "Reading images"):
    from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# What Pillow raises for text, truncated, broken and huge files.
READING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
# Pixels that a picture may have after it was enlarged: a 5000×7 strip, enlarged to 512 rows, would have 187 million.
MAX_ENLARGED_PIXELS = 2**24
# A 16-bit picture that stays below this share of its range would be nearly black: most likely it holds 12 bits or
# fewer.
LEAST_SHARE = 1 / 16


class ImageError(AiluRusError):
    """A picture cannot be read, or cannot be used; the message names the file and the cause."""


def read_image(path: str | Path) -> Image.Image:
    """A file as an RGB picture of 8 bits a channel, upright as its EXIF data say, on white where it is transparent.

    Raises:
        ImageError: no picture, a truncated one, or values whose range is not known.
    """
    try:
        with Image.open(path) as file:
            file.load()
            return to_rgb(ImageOps.exif_transpose(file))
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except READING_ERRORS as error:
        raise ImageError(f"{path} is not a readable image: {why(error, path)}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture as RGB, 8 bits a channel, on white where it is transparent. Raises ImageError as `to_8_bits`."""
    picture = to_8_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def to_8_bits(picture: Image.Image) -> Image.Image:
    """A picture of 16 bits or of floats scaled to 8 bits; any other as it is.

    16 bits are scaled by 65535. Floats are scaled by 1 where they are from 0 to 1, and taken as they are where they
    are whole numbers from 0 to 255.

    Raises:
        ImageError: other floats and integers, and 16-bit values that all lie in the lowest sixteenth of the range.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError("some of its values are not finite")
    low, high = values.min(), values.max()
    if picture.mode == "F":
        if low >= 0 and high <= 1:
            scale = 1.0
        elif low >= 0 and high <= 255 and (values == values.round()).all():
            scale = 255.0
        else:
            raise ImageError(
                f"its floats go from {low:g} to {high:g}: they must be from 0 to 1, or whole numbers from 0 to 255"
            )
    else:
        scale = 65535.0
        if low < 0 or high > scale:
            raise ImageError(f"its integers go from {low:.0f} to {high:.0f}: only 0 to 65535 is understood")
        if 0 < high < scale * LEAST_SHARE:
            raise ImageError(
                f"its 16-bit values go up to {high:.0f} of 65535 and would be nearly black: "
                "save it with values up to 65535, or with 8 bits"
            )
    return Image.fromarray((values * (255 / scale)).round().astype(np.uint8))


def check_enlarged(source: tuple[int, int], enlarged: tuple[int, int], cause: str) -> None:
    """Raises ImageError where enlarging a picture makes more than MAX_ENLARGED_PIXELS of it.

    Args:
        source, enlarged: (width, height) before and after.
        cause: what enlarges it, for the message.
    """
    limit = max(MAX_ENLARGED_PIXELS, source[0] * source[1])
    if enlarged[0] * enlarged[1] > limit:
        raise ImageError(
            f"{by(source)} pixels would become {by(enlarged)} ({cause}), more than {limit / 1e6:.1f} million: "
            "crop the image, or cut it into tiles"
        )


def by(size: tuple[int, int]) -> str:
    """(width, height) for a message."""
    return f"{size[0]}×{size[1]}"


def why(error: Exception, path: str | Path) -> str:
    """The cause in a few words: a file of no picture is told from a truncated one."""
    path = Path(path)
    if path.is_symlink() and not path.exists():
        return "it links to a file that does not exist"
    if path.is_dir():
        return "it is a folder"
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty"
    if path.name.startswith("._"):
        return "it holds macOS's notes about a file, no image"
    text = str(error).strip().partition("\n")[0]
    return text or type(error).__name__
