"""The measures, on cases worked by hand."""

import math
from itertools import pairwise

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from ailurus_hf import AiluRusError
from ailurus_hf.video import edge_agreement, psnr, ssim, warping_error


def gray(value: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, (value,) * 3)


def shifted(count: int, step: int, seed: int = 0) -> list[Image.Image]:
    """A smooth texture that goes left by `step` pixels a frame."""
    pixels = np.random.default_rng(seed).random((64, 96 + count * step, 3)).astype(np.float32)
    pixels = cv2.GaussianBlur(pixels, (0, 0), 3)
    pixels = (255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())).astype(np.uint8)
    return [Image.fromarray(pixels[:, i * step : i * step + 96]) for i in range(count)]


def lit(frames: list[Image.Image]) -> list[Image.Image]:
    """Every second frame 51 levels, a fifth, darker: the others have no more than 204."""
    half = [frame.point(lambda v: v * 153 // 255 + 51) for frame in frames]
    return [frame.point(lambda v: v - 51) if number % 2 else frame for number, frame in enumerate(half)]


def test_psnr() -> None:
    assert psnr([gray(9)], [gray(9)]) == math.inf
    assert psnr([gray(0)], [gray(255)]) == pytest.approx(0, abs=1e-6)
    assert psnr([gray(100)], [gray(125)]) == pytest.approx(20 * math.log10(255 / 25), abs=1e-3)
    # Errors are averaged over frames before the logarithm: half of 25² here.
    assert psnr([gray(100), gray(7)], [gray(125), gray(7)]) == pytest.approx(
        20 * math.log10(255 / 25) + 10 * math.log10(2), abs=1e-3
    )


def test_ssim() -> None:
    frames = shifted(2, 4)
    assert ssim(frames, frames) == pytest.approx(1)
    # Flat pictures have no variance: (2ab + c) / (a² + b² + c) with c = 0.01².
    a, b, c = 100 / 255, 150 / 255, 1e-4
    assert ssim([gray(100)], [gray(150)]) == pytest.approx((2 * a * b + c) / (a * a + b * b + c), abs=1e-5)
    assert ssim(frames, frames[::-1]) < 0.6


def test_warping_error_follows_motion() -> None:
    frames = shifted(4, 3)
    still = np.mean([np.square(np.asarray(a) / 255.0 - np.asarray(b) / 255.0).mean() for a, b in pairwise(frames)])
    assert warping_error(frames) < still / 50
    assert warping_error([gray(80)] * 3) == 0
    # Along the motion of a clip that stands still, it is the frames' plain difference.
    assert warping_error(frames, frames[:1] * 4) == pytest.approx(still, rel=1e-3)


def test_warping_error_of_flicker_is_its_square() -> None:
    frames = shifted(4, 3)
    # The flicker is 51 of 255 in every pixel whatever the motion, if the motion is another clip's.
    assert warping_error(lit(frames), frames) == pytest.approx(0.2**2, rel=0.05)


def test_warping_error_leaves_out_what_is_hidden() -> None:
    background, square = shifted(1, 0)[0], shifted(1, 0, seed=1)[0].crop((0, 0, 28, 28))
    frames = []
    for x in (20, 26):
        frame = background.copy()
        frame.paste(square, (x, 18))
        frames.append(frame)
    assert warping_error(frames) < 0.8 * warping_error(frames, threshold=math.inf)


def outline(left: int, side: int = 20) -> Image.Image:
    picture = gray(0, (64, 48))
    ImageDraw.Draw(picture).rectangle((left, 10, left + side, 10 + side), fill="white")
    return picture


def edges(picture: Image.Image) -> Image.Image:
    return Image.fromarray(cv2.Canny(np.asarray(picture), 100, 200))


def test_edges_where_they_are_wanted() -> None:
    square = outline(12)
    assert edge_agreement([square], [edges(square)], tolerance=0) == 1
    assert edge_agreement([square], [edges(outline(14))], tolerance=2) == 1
    near = edge_agreement([square], [edges(outline(14))], tolerance=1)
    assert 0.4 < near < 0.75  # the two long sides that lie over each other are met, the others are not
    assert edge_agreement([gray(0)], [gray(0)]) == 1
    assert edge_agreement([gray(0, (64, 48))], [edges(square)]) == 0
    assert edge_agreement([square], [gray(0, (64, 48))]) == 0


def test_edges_too_many_cost_precision_alone() -> None:
    square, two = outline(2), outline(2)
    ImageDraw.Draw(two).rectangle((40, 10, 60, 30), fill="white")
    drawn, wanted = (np.asarray(edges(picture)) > 0 for picture in (two, square))
    precision = wanted.sum() / drawn.sum()
    assert precision == pytest.approx(0.5, abs=0.02)
    assert edge_agreement([two], [edges(square)], 0) == pytest.approx(2 * precision / (1 + precision))
    # All frames together, not the mean of the frames' scores.
    both = edge_agreement([two, square], [edges(square)] * 2, 0)
    assert both == pytest.approx(2 * (2 / 3) / (1 + 2 / 3), abs=0.02)


def test_clips_that_do_not_fit_are_refused() -> None:
    for measure in (psnr, ssim):
        with pytest.raises(AiluRusError, match="got 1 and 2"):
            measure([gray(0)], [gray(0)] * 2)
        with pytest.raises(AiluRusError, match="frame 1 is 16×16, the other 16×17"):
            measure([gray(0)] * 2, [gray(0), gray(0, (16, 17))])
        with pytest.raises(AiluRusError, match="got 0 and 0"):
            measure([], [])
    with pytest.raises(AiluRusError, match="at least 2 frames, got 1"):
        warping_error([gray(0)])
    with pytest.raises(AiluRusError, match="frame 0 is 16×16"):
        edge_agreement([gray(0)], [gray(0, (16, 17))])
    with pytest.raises(AiluRusError, match="got 1 and 2"):
        edge_agreement([gray(0)], [gray(0)] * 2)
