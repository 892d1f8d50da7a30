"""Frames to a file: mp4 or mov (H.264), GIF, or a folder of PNGs; whole under its name, or not there at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import AiluRusError
from ..extras import require
from ..images import by, to_rgb
from .reading import exact_rate

VIDEO_SUFFIXES = (".mp4", ".mov")
# How the folders begin in which output is written before it takes its name.
PART = ".ailurus-"
# Players take untagged colors for one standard or another, by their size: so the file says which it is.
COLORS = [
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+bicubic"),
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"),
    *("-movflags", "+faststart"),
]


def write_video(
    path: str | Path, frames: Iterable[Image.Image], fps: float | Fraction = 8, comment: str | None = None
) -> int:
    """Writes the frames as they come.

    They are written under a temporary name beside the output, which is renamed at the end: work that is interrupted or
    fails leaves nothing, and an older file as it was.

    Args:
        path: `.mp4` and `.mov` are H.264 in yuv420p, whose sides are even: an odd side gets its last row or column
            twice. `.gif` is a GIF that repeats, its times in whole hundredths of a second, equal frames in a row as one
            that is shown longer. No suffix: a folder of PNGs, 00000.png and on, which must be new or empty.
        frames: RGB pictures of one size.
        fps: frames per second.
        comment: a text that an mp4 or mov carries, for `read_comment`.

    Returns:
        How many frames there were.

    Raises:
        AiluRusError: a path that cannot be written, no frames, or frames of several sizes.

    Example:
        write_video("ocean.mp4", frames, fps=8)
    """
    path = check_output(path)
    if not 0 < fps < float("inf"):
        raise AiluRusError(f"fps must be above 0, got {fps}")
    sized = _of_one_size(frames)
    first = next(sized, None)
    if first is None:
        raise AiluRusError(f"no frames to write to {path}")
    sized = chain([first], sized)
    with _whole_or_not_at_all(path) as part:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return _write_h264(part, sized, first.size, exact_rate(fps), comment)
        if path.suffix.lower() == ".gif":
            return _write_gif(part, sized, fps)
        return _write_pictures(part, sized)


def check_output(
    path: str | Path, *, source: str | Path | None = None, frames: tuple[int, tuple[int, int]] | None = None
) -> Path:
    """Finds out before any frame is made whether they can be written; makes the parent folder.

    Args:
        path: as for `write_video`.
        source: the clip that they are made of: it must not be overwritten.
        frames: how many, and their (width, height), to ask for room.

    Returns:
        The path.

    Raises:
        AiluRusError: another suffix, the source itself, a folder that is not empty or cannot be written to, a name that
            is too long, too little room.

    Example:
        check_output("ocean.mp4", source="walk.mp4", frames=(16, (512, 512)))
    """
    path = Path(path)
    suffixes = (*VIDEO_SUFFIXES, ".gif", "")
    if path.suffix.lower() not in suffixes:
        raise AiluRusError(f"cannot write {path}: its suffix must be .mp4, .mov, .gif, or none for a folder of PNGs")
    if path.suffix.lower() in VIDEO_SUFFIXES:
        require("imageio_ffmpeg", "video")
    try:
        if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
            raise AiluRusError(
                f"cannot write {path}: it is the clip that the frames are made of; choose another --output"
            )
        if path.suffix and path.is_dir():
            raise AiluRusError(f"cannot write {path}: it is a folder")
        if not path.suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise AiluRusError(f"cannot write the frames to {path}: it must be a new or an empty folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PART, dir=path.parent) as folder:
            (Path(folder) / (path.name or "frames")).touch()  # under its own name, which may be too long
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise AiluRusError(f"cannot write {path}: {error.strerror} ({path.parent})") from error
    needed = 0 if frames is None else _least_bytes(path, *frames)
    if free < needed:
        raise AiluRusError(
            f"cannot write {path}: {free / 1e6:.1f} MB are free in {path.parent}, and the frames take at least about "
            f"{needed / 1e6:.1f} MB"
        )
    return path


def _least_bytes(path: Path, count: int, size: tuple[int, int]) -> int:
    """A low guess at what the frames take: it finds a full disk and refuses none that has room."""
    bytes_a_pixel = {".gif": 0.5, "": 1.0}.get(path.suffix.lower(), 0.1)
    return round(count * size[0] * size[1] * bytes_a_pixel)


@contextmanager
def _whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """A name in a new folder beside the output; what lies there replaces the output if nothing was raised."""
    folder = Path(tempfile.mkdtemp(prefix=PART, dir=path.parent))
    try:
        part = folder / (path.name or "frames")
        yield part
        if path.is_dir():
            path.rmdir()  # empty: os.replace does not put a folder over one on every system
        os.replace(part, path)
    except OSError as error:
        raise AiluRusError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _of_one_size(frames: Iterable[Image.Image]) -> Iterator[Image.Image]:
    size = None
    for number, frame in enumerate(frames):
        size = size or frame.size
        if frame.size != size:
            raise AiluRusError(f"frame {number} is {by(frame.size)}, the first is {by(size)}")
        yield to_rgb(frame)


def _write_h264(
    path: Path, frames: Iterable[Image.Image], size: tuple[int, int], fps: Fraction, comment: str | None
) -> int:
    ffmpeg = require("imageio_ffmpeg", "video")
    width, height = (side + side % 2 for side in size)
    target, number = str(path.resolve()), 0
    about = [] if comment is None else ["-metadata", f"comment={comment}"]
    options = {"fps": fps, "quality": 8, "codec": "libx264", "macro_block_size": 1, "output_params": [*COLORS, *about]}
    with ExitStack() as stack:
        with _told(path, number):
            writer = ffmpeg.write_frames(target, (width, height), ffmpeg_log_level="quiet", **options)
            stack.enter_context(closing(writer))
            writer.send(None)
        # What making a frame raises is not ffmpeg's.
        for frame in frames:
            number += 1
            pixels = np.asarray(frame)
            pixels = np.pad(pixels, ((0, height - size[1]), (0, width - size[0]), (0, 0)), mode="edge")
            with _told(path, number):
                writer.send(np.ascontiguousarray(pixels))
    # ffmpeg's exit is not reported: what it wrote is counted.
    with _told(path, number):
        written = ffmpeg.count_frames_and_secs(target)[0] if path.is_file() else 0
    if written != number:
        raise AiluRusError(f"cannot write {path.name}: ffmpeg wrote {written} of {number} frames{_full(path)}")
    return number


@contextmanager
def _told(path: Path, number: int) -> Iterator[None]:
    """ffmpeg stopped taking frames, or left what is no video: one error that says at which frame."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise AiluRusError(f"cannot write {path.name}: ffmpeg failed at frame {number}{_full(path)}") from error


def _full(path: Path) -> str:
    free = shutil.disk_usage(path.parent).free
    return f", and {free // 1024} KiB are free on the disk" if free < 2**20 else ""


def _write_gif(path: Path, frames: Iterator[Image.Image], fps: float | Fraction) -> int:
    number = 1

    def others() -> Iterator[Image.Image]:
        nonlocal number
        for frame in frames:
            number += 1
            yield frame.quantize()

    next(frames).quantize().save(
        path,
        save_all=True,
        append_images=others(),
        duration=max(20, round(100 / fps) * 10),  # in ms; viewers do not believe less than 20
        loop=0,
    )
    return number


def _write_pictures(folder: Path, frames: Iterable[Image.Image]) -> int:
    folder.mkdir()
    number = 0
    for frame in frames:
        frame.save(folder / f"{number:05d}.png")
        number += 1
    return number
