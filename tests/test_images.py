"""Pictures of every kind are read as what they show, or refused with the reason."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ailurus_hf import SegmenterImageProcessor
from ailurus_hf.evaluation.image_size import check_processed_size
from ailurus_hf.images import MAX_ENLARGED_PIXELS, ImageError, check_enlarged, read_image, to_rgb
from ailurus_hf.segmenter import sliding_window_logits
from ailurus_hf.visualization import overlay_labels

RAMP = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))


def pictures() -> dict[str, Image.Image]:
    transparent = Image.new("RGBA", (96, 64), (10, 20, 30, 0))
    transparent.paste(Image.fromarray(RAMP).convert("RGBA").crop((0, 0, 96, 32)), (0, 0))
    return {
        "gray.png": Image.fromarray(RAMP),
        "16_bits.png": Image.fromarray(RAMP.astype(np.uint16) * 257),
        "16_bits.tif": Image.fromarray(RAMP.astype(np.uint16) * 257),
        "32_bits.tif": Image.fromarray(RAMP.astype(np.int32) * 257),
        "floats.tif": Image.fromarray(RAMP.astype(np.float32) / 255),
        "floats_of_bytes.tif": Image.fromarray(RAMP.astype(np.float32)),
        "palette.png": Image.fromarray(RAMP).convert("P"),
        "cmyk.tif": Image.fromarray(RAMP).convert("RGB").convert("CMYK"),
        "rgba.png": transparent,
    }


@pytest.mark.parametrize("name", pictures())
def test_every_kind_is_read_as_what_it_shows(tmp_path: Path, name: str) -> None:
    pictures()[name].save(tmp_path / name)
    read = read_image(tmp_path / name)
    assert (read.mode, read.size) == ("RGB", (96, 64))
    pixels = np.asarray(read).astype(int)
    shown = RAMP[..., None].astype(int).repeat(3, -1)
    if name == "rgba.png":
        shown[32:] = 255  # white where it is transparent
    assert np.abs(pixels - shown).max() <= 1


@pytest.mark.parametrize("kind", ["visualization", "processor"])
def test_pictures_of_16_bits_in_memory(kind: str) -> None:
    picture = pictures()["16_bits.png"]
    if kind == "visualization":
        seen = np.asarray(overlay_labels(picture, np.zeros((64, 96), int), np.zeros((1, 3)), opacity=0.0))
    else:
        processor = SegmenterImageProcessor(do_normalize=False, do_rescale=False)
        seen = processor(images=picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.abs(seen.astype(int) - RAMP[..., None]).max() <= 1


def test_a_truncated_notes_and_an_empty_file_say_what_they_are(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_text("")
    (tmp_path / "._whole.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    causes = {
        "cut.png": "truncated",
        "text.png": "cannot identify image file",
        "empty.png": "the file is empty",
        "._whole.png": "macOS",
        "folder.png": "it is a folder",
        "link.png": "links to a file that does not exist",
    }
    for name, cause in causes.items():
        with pytest.raises(ImageError, match=cause) as raised:
            read_image(tmp_path / name)
        assert name in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (RAMP.astype(np.uint16) * 16, "go up to 4080 of 65535 and would be nearly black"),  # 12 bits
        (RAMP.astype(np.float32) * 20, "its floats go from 0 to 5100"),
        (RAMP.astype(np.float32) / 100, "its floats go from 0 to 2.55"),
        (RAMP.astype(np.float32) / 255 - 0.5, "its floats go from -0.5 to 0.5"),
        (RAMP.astype(np.int32) * 1000, "its integers go from 0 to 255000"),
        (np.full((4, 4), np.nan, np.float32), "not finite"),
    ],
)
def test_values_of_an_unknown_range_are_refused(tmp_path: Path, values: np.ndarray, told: str) -> None:
    picture = Image.fromarray(values)
    with pytest.raises(ImageError, match=told):
        to_rgb(picture)
    picture.save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=f"x.tif: .*{told}"):
        read_image(tmp_path / "x.tif")


def test_black_is_black() -> None:
    assert not np.asarray(to_rgb(Image.fromarray(np.zeros((4, 4), np.uint16)))).any()


def test_a_strip_that_would_fill_the_memory_is_refused_with_its_size() -> None:
    strip = Image.new("RGB", (5000, 7))
    told = r"5000×7 pixels would become 365714×512 .* more than 16.8 million"
    with pytest.raises(ImageError, match=told):
        SegmenterImageProcessor(do_resize=True)(images=strip)
    with pytest.raises(ImageError, match=told):
        check_processed_size(SegmenterImageProcessor(do_resize=True), strip.size)
    windowed = SegmenterImageProcessor(window_size=512)
    with pytest.raises(ImageError, match=r"5000×7 .* windows of 512×512"):
        check_processed_size(windowed, strip.size)
    with pytest.raises(ImageError, match=r"5000×7 .* windows of 512×512"):
        sliding_window_logits(torch.nn.Identity(), torch.zeros(1, 3, 7, 5000), 512)


def test_what_fits_is_not_refused() -> None:
    for size in ((5000, 400), (7, 9), (20_000, 20_000)):
        check_processed_size(SegmenterImageProcessor(do_resize=True), size)
        check_processed_size(SegmenterImageProcessor(window_size=(512, 256)), size)
    check_processed_size(SegmenterImageProcessor(), (5000, 7))  # not resized
    check_enlarged((1, 1), (4096, 4096), "to the limit")
    assert MAX_ENLARGED_PIXELS == 4096 * 4096
    check_enlarged((9000, 9000), (9000, 9000), "as it is")  # large already
