"""Frames of a clip, one after the other: of a video file, an animated picture, or a folder of pictures.

A clip is never read whole: frames come from ffmpeg, or from Pillow, as they are asked for.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageSequence

from ..errors import AiluRusError
from ..extras import require
from ..images import IMAGE_SUFFIXES, READING_ERRORS, by, read_image, to_rgb

ANIMATED_SUFFIXES = {".gif", ".webp", ".png", ".apng"}
# Frames of unequal pixel aspect are stretched to square pixels; rotation flags are followed by ffmpeg itself.
SQUARE_PIXELS = "scale=round(iw*sar):ih,setsar=1"
# How many of the frames that the header promises may be missing before the file is looked at for damage.
MISSING_SHARE = 0.1


@dataclass(frozen=True)
class Clip:
    """A clip that can be iterated, more than once, as RGB pictures of one size.

    Args:
        path: the file or folder.
        size: (width, height), in pixels.
        fps: frames per second of what is iterated, None where nothing tells (a folder).
        read: opens it and yields the pictures.

    Example:
        clip = open_clip("walk.mp4", max_frames=8)
        frames = list(clip)
    """

    path: Path
    size: tuple[int, int]
    fps: Fraction | None
    read: Callable[[], Generator[Image.Image, None, None]]

    def __iter__(self) -> Generator[Image.Image, None, None]:
        return self.read()


def open_clip(
    path: str | Path,
    *,
    every: int = 1,
    fps: float | Fraction | None = None,
    max_frames: int | None = None,
    min_frames: int = 1,
) -> Clip:
    """A clip of a video file (whatever ffmpeg reads), a GIF, WebP or PNG animation, or a folder of pictures by name.

    Only the header is read here.

    Args:
        path: the file or folder.
        every: takes each n-th frame, the first included; the frame rate falls with it.
        fps: takes frames at this rate instead, by their times; for a folder it is the rate its pictures have.
        max_frames: ends after that many.
        min_frames: raises at the clip's end if there were fewer.

    Returns:
        The clip, to be iterated.

    Raises:
        AiluRusError: for what is no clip; while iterating, for one that is broken, has pictures of several sizes or has
            too few frames.

    Example:
        frames = list(open_clip("walk.mp4", fps=8, max_frames=16))
    """
    path = Path(path)
    for name, value in (("every", every), ("max_frames", max_frames), ("min_frames", min_frames)):
        if value is not None and value < 1:
            raise AiluRusError(f"{name} must be at least 1, got {value}")
    if max_frames is not None and max_frames < min_frames:
        raise AiluRusError(f"max_frames must be at least min_frames {min_frames}, got {max_frames}")
    if fps is not None and not 0 < fps < math.inf:
        raise AiluRusError(f"fps must be above 0, got {fps}")
    if fps is not None and every != 1:
        raise AiluRusError(f"every and fps both choose frames: give one, got every={every} and fps={fps}")
    wanted = None if fps is None else exact_rate(fps)
    if path.is_dir():
        size, rate, read = _folder(path, wanted)
    elif not path.exists():
        raise AiluRusError(f"no such file or folder: {path}")
    elif path.suffix.lower() in ANIMATED_SUFFIXES:
        size, rate, read = _animation(path, wanted)
    else:
        size, rate, read = _video(path, wanted)

    def frames() -> Generator[Image.Image, None, None]:
        number = 0
        stop = None if max_frames is None else (max_frames - 1) * every + 1
        with closing(read()) as source:
            for frame in islice(source, 0, stop, every):
                if frame.size != size:
                    raise AiluRusError(
                        f"{path}: frame {number * every} is {by(frame.size)}, those before are {by(size)}"
                    )
                number += 1
                yield frame
        if number < min_frames:
            raise AiluRusError(f"{path} has too few frames: {number}, but {min_frames} are needed")

    return Clip(path, size, None if rate is None else rate / every, frames)


def exact_rate(fps: float | Fraction) -> Fraction:
    """The rate as a fraction; 23.98 and its like are the 24000/1001 that they stand for."""
    ntsc = Fraction(round(fps) * 1000, 1001)
    if isinstance(fps, float) and round(fps) in (24, 30, 48, 60, 120) and 0 < abs(fps - ntsc) < 0.006:
        return ntsc
    return Fraction(fps).limit_denominator(1001)


_Source = tuple[tuple[int, int], Fraction | None, Callable[[], Generator[Image.Image, None, None]]]


def _video(path: Path, fps: Fraction | None) -> _Source:
    ffmpeg = require("imageio_ffmpeg", "video")
    stream = _moving_stream(path)
    # Without a rate asked for, each frame of the file once, whatever their times: a file of 60 frames is 60 frames.
    # With one, what is shown at each of the times: the last frame that began before, which is fps's round=up.
    timing = "" if fps is None else f",fps={fps}:round=up"
    options = ["-map", stream.map, "-fps_mode", "passthrough", "-vf", SQUARE_PIXELS + timing]
    options += ["-sws_flags", "accurate_rnd+full_chroma_int+bicubic"]

    def start() -> Generator:
        return ffmpeg.read_frames(str(path.resolve()), input_params=["-xerror"], output_params=options)

    try:
        with closing(start()) as reader:
            header = next(reader)
    except Exception as error:  # ffmpeg's own words are in it, whatever class carries them
        raise AiluRusError(f"{path} is not a readable video: {_reason(error)}") from error
    size: tuple[int, int] = header["size"]
    own_rate = exact_rate(stream.fps) if stream.fps else None
    rate = fps or own_rate

    def frames() -> Generator[Image.Image, None, None]:
        number = 0
        with closing(start()) as reader:
            try:
                next(reader)  # the header again
                for pixels in reader:
                    number += 1
                    yield Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(size[1], size[0], 3))
            except (OSError, RuntimeError) as error:
                raise AiluRusError(f"{path} breaks off after {number} frames: {_reason(error)}") from error
        promised = round(header["duration"] * (rate or 0))
        if number == 0 or (number < (1 - MISSING_SHARE) * promised - 1 and _is_damaged(path, stream.map)):
            raise AiluRusError(f"{path} is damaged: it breaks off after {number} of about {promised} frames")

    return size, rate, frames


class _Stream(NamedTuple):
    """The moving pictures of a file: what ffmpeg's -map takes, and their rate (None: not told)."""

    map: str
    fps: float | None


def _moving_stream(path: Path) -> _Stream:
    """The stream that players show, which a cover picture is not. Raises AiluRusError for sound alone."""
    command = [require("imageio_ffmpeg", "video").get_ffmpeg_exe(), "-hide_banner", "-i", str(path.resolve())]
    told = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).stderr.decode(errors="replace")
    streams = [line for line in told.splitlines() if line.lstrip().startswith("Stream #0:")]
    moving = [line for line in streams if " Video: " in line and "(attached pic)" not in line]
    if streams and not moving:
        raise AiluRusError(f"{path} is not a readable video: it holds sound and no moving pictures")
    if not moving:  # ffmpeg's own words follow when it is read
        return _Stream("0:V:0", None)
    # Some writers leave a cover as a second track, and mark the film.
    chosen = next((line for line in moving if "(default)" in line), moving[0])
    index = re.search(r"#0:(\d+)", chosen)
    fps = re.search(r" (\d+\.?\d*) fps", chosen)
    return _Stream(f"0:{index[1]}" if index else "0:V:0", float(fps[1]) if fps else None)


def read_comment(path: str | Path) -> str | None:
    """The text that an mp4 or mov carries, as `write_video` puts it there.

    Args:
        path: the file.

    Returns:
        The text; None where there is none, or the file is no video.

    Raises:
        AiluRusError: imageio-ffmpeg is not there.

    Example:
        write_video("ocean.mp4", frames, comment="keep ratio 0.5")
        print(read_comment("ocean.mp4"))
    """
    ffmpeg = require("imageio_ffmpeg", "video").get_ffmpeg_exe()
    command = [ffmpeg, "-v", "quiet", "-i", str(Path(path).resolve()), "-f", "ffmetadata", "-"]
    told = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).stdout.decode(errors="replace")
    # ffmpeg puts a backslash before line ends and its own signs.
    found = re.search(r"^comment=((?:\\.|[^\\\n])*)", told, re.MULTILINE | re.DOTALL)
    return re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else None


def _is_damaged(path: Path, stream: str) -> bool:
    """Whether ffmpeg finds damage in a stream. Pictures that end before their sound have none."""
    command = [require("imageio_ffmpeg", "video").get_ffmpeg_exe(), "-v", "error", "-xerror", "-i", str(path.resolve())]
    done = subprocess.run([*command, "-map", stream, "-f", "null", "-"], capture_output=True, stdin=subprocess.DEVNULL)
    return done.returncode != 0


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rpartition(": ")[2].rstrip(".") if lines else type(error).__name__


def _animation(path: Path, fps: Fraction | None) -> _Source:
    try:
        with Image.open(path) as file:
            size = file.size
            # A GIF that tells no times, or one of 10 ms and less, is shown at 100 ms a frame by every viewer.
            times = [frame.info.get("duration", 0) for frame in islice(ImageSequence.Iterator(file), 1000)]
    except READING_ERRORS as error:
        raise AiluRusError(f"{path} is not a readable animation: {error}") from error
    shown = [time if time > 10 else 100 for time in times]
    own_rate = Fraction(1000 * len(shown)) / Fraction(sum(shown))
    rate = fps or own_rate.limit_denominator(1001)

    def frames() -> Generator[Image.Image, None, None]:
        time = Fraction(0)  # of the frame that comes next, in ms
        taken = 0
        try:
            with Image.open(path) as file:
                for number, frame in enumerate(ImageSequence.Iterator(file)):
                    picture = to_rgb(frame)
                    if fps is None:
                        yield picture
                        continue
                    time += Fraction(shown[number % len(shown)])
                    while taken * 1000 < time * fps:
                        taken += 1
                        yield picture
        except READING_ERRORS as error:
            raise AiluRusError(f"{path} is damaged: {error}") from error

    return size, rate, frames


def _folder(path: Path, fps: Fraction | None) -> _Source:
    # macOS puts a hidden ._frame.png with its own notes beside each frame.png on foreign disks.
    named = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    files = sorted(named, key=_natural)
    if not files:
        raise AiluRusError(f"no picture in folder {path}")

    def frames() -> Generator[Image.Image, None, None]:
        for file in files:
            yield read_image(file)

    return read_image(files[0]).size, fps, frames


def _natural(file: Path) -> list[tuple[int, str]]:
    """frame_2 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]
