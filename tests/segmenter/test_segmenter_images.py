"""SegmenterImageProcessor and sliding-window inference, the latter against a slow plain loop."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor

from ailurus_hf.segmenter import SegmenterImageProcessor, sliding_window_logits
from ailurus_hf.segmenter.image_processing_segmenter import NORMALIZATION


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_default_is_the_pictures_own_size_scaled_to_minus_one_and_one():
    image = picture(37, 50)
    out = SegmenterImageProcessor()(Image.fromarray(image), return_tensors="pt")
    expected = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(out["pixel_values"][0].float(), expected, atol=1e-5, rtol=0)
    assert "labels" not in out


def test_deit_normalization():
    mean, std = NORMALIZATION["deit"]
    out = SegmenterImageProcessor(image_mean=list(mean), image_std=list(std))(picture(9, 8), return_tensors="pt")
    expected = (torch.from_numpy(picture(9, 8)).permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]) / (
        torch.tensor(std)[:, None, None]
    )
    torch.testing.assert_close(out["pixel_values"][0].float(), expected.float(), atol=1e-5, rtol=0)


def test_gray_and_transparent_pictures_become_rgb():
    for mode in ("L", "RGBA", "P"):
        image = Image.fromarray(picture(9, 8)).convert(mode)
        assert SegmenterImageProcessor()(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 9, 8)


def test_batch_is_padded_after_normalizing_labels_with_ignore():
    images = [picture(20, 31), picture(25, 10, 1)]
    labels = [np.full((20, 31), 3, np.uint8), np.full((25, 10), 4, np.uint8)]
    out = SegmenterImageProcessor()(images, labels, return_tensors="pt")
    assert out["pixel_values"].shape == (2, 3, 25, 31) and out["labels"].shape == (2, 25, 31)
    assert out["labels"].dtype == torch.int64
    assert (out["pixel_values"][0, :, 20:] == 0).all() and (out["pixel_values"][1, :, :, 10:] == 0).all()
    assert (out["labels"][0, :20] == 3).all() and (out["labels"][0, 20:] == 255).all()
    assert (out["labels"][1, :, :10] == 4).all() and (out["labels"][1, :, 10:] == 255).all()
    other = SegmenterImageProcessor(label_pad_value=-100)(images, labels, return_tensors="pt")
    assert (other["labels"][0, 20:] == -100).all()


def test_resizing_takes_labels_along_by_nearest():
    label = np.zeros((40, 80), np.uint8)
    label[:, 40:] = 9
    processor = SegmenterImageProcessor(do_resize=True, size={"shortest_edge": 20})
    out = processor(picture(40, 80), label, return_tensors="pt")
    assert out["pixel_values"].shape == (1, 3, 20, 40)
    assert out["labels"].unique().tolist() == [0, 9]
    assert (out["labels"][0, :, 20:] == 9).all()


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([np.zeros((20, 30), np.uint8)], "1 segmentation maps for 2 images"),
        ([np.zeros((20, 30), np.uint8)] * 2, "map 1 is 20 x 30 pixels, its image 24 x 30"),
    ],
)
def test_maps_that_do_not_fit(maps, message):
    with pytest.raises(ValueError, match=message):
        SegmenterImageProcessor()([picture(20, 30), picture(24, 30)], maps)


def test_round_trip_through_the_auto_class(tmp_path):
    mean, std = NORMALIZATION["deit"]
    processor = SegmenterImageProcessor(
        image_mean=list(mean), image_std=list(std), window_size=[32, 48], window_stride=16, do_resize=True, size=40
    )
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(again) is SegmenterImageProcessor
    assert again.to_dict() == processor.to_dict()
    assert (tuple(again.window_size), again.window_stride) == ((32, 48), 16)
    image = picture(50, 60)
    np.testing.assert_array_equal(again(image)["pixel_values"][0], processor(image)["pixel_values"][0])


def test_post_processing_cuts_padding_and_undoes_resizing():
    processor, sizes = SegmenterImageProcessor(), [(20, 31), (25, 10)]
    logits = torch.randn(2, 4, 25, 31)
    maps = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), sizes)
    for i, (height, width) in enumerate(sizes):
        assert torch.equal(maps[i], logits[i, :, :height, :width].argmax(0))
    assert [m.shape for m in processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits))] == [
        (25, 31)
    ] * 2

    processor = SegmenterImageProcessor(do_resize=True, size={"shortest_edge": 10})
    assert processor([picture(20, 31)])["pixel_values"][0].shape == (3, 10, 15)
    (label,) = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits[:1]), [(20, 31)])
    expected = F.interpolate(logits[:1, :, :10, :15], size=(20, 31), mode="bilinear").argmax(1)[0]
    assert torch.equal(label, expected)
    with pytest.raises(ValueError, match="1 target_sizes for 2 images"):
        processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), [(20, 31)])


# --------------------------------------------------------------------------------------------------- sliding window


class Model(torch.nn.Module):
    """Logits that depend on a pixel, on its position in the window and on the whole window."""

    def forward(self, x):
        rows, columns = torch.linspace(0, 1, x.shape[2])[:, None], torch.linspace(0, 1, x.shape[3])
        return SimpleNamespace(logits=torch.cat((x * rows, x * columns + x.mean((1, 2, 3), keepdim=True)), dim=1))


def plain_sliding_window(model, image, window, stride):
    """The original's inference, one window at a time; image [1, 3, H, W]."""
    original = image.shape[-2:]
    height, width = original
    if height < window[0] or width < window[1]:
        scale = max(window[0] / height, window[1] / width)
        height, width = max(window[0], int(height * scale + 1e-9)), max(window[1], int(width * scale + 1e-9))
        image = F.interpolate(image, size=(height, width), mode="bilinear")
    tops = [y for y in range(0, height, stride[0]) if y < height - window[0]] + [height - window[0]]
    lefts = [x for x in range(0, width, stride[1]) if x < width - window[1]] + [width - window[1]]
    total, count = torch.zeros(1, 6, height, width), torch.zeros(1, 1, height, width)
    for y in tops:
        for x in lefts:
            part = (..., slice(y, y + window[0]), slice(x, x + window[1]))
            total[part] += model(image[part]).logits
            count[part] += 1
    assert count.min() >= 1
    return F.interpolate(total / count, size=original, mode="bilinear")


@pytest.mark.parametrize("window", [(16, 16), (16, 24), (20, 12)])
@pytest.mark.parametrize("stride", [(16, 16), (10, 7), (1, 12)])
@pytest.mark.parametrize("size", [(16, 24), (40, 50), (33, 17), (9, 30), (12, 8), (50, 10)])
def test_sliding_window_equals_the_plain_loop(size, window, stride):
    stride = tuple(min(s, w) for s, w in zip(stride, window, strict=True))
    images = torch.randn(2, 3, *size)
    ours = sliding_window_logits(Model(), images, window, stride, batch_size=3)
    theirs = torch.cat([plain_sliding_window(Model(), image[None], window, stride) for image in images])
    assert ours.shape == (2, 6, *size)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_windows_of_all_images_run_in_batches():
    model, batches = Model(), []
    model.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    sliding_window_logits(model, torch.randn(2, 3, 16, 48), 16, batch_size=4)
    assert batches == [4, 2]


def test_one_window_is_the_plain_forward_and_one_number_is_a_square():
    images = torch.randn(1, 3, 20, 20)
    torch.testing.assert_close(sliding_window_logits(Model(), images, 20), Model()(images).logits)
    images = torch.randn(1, 3, 30, 45)
    square = sliding_window_logits(Model(), images, (20, 20), (9, 9))
    torch.testing.assert_close(sliding_window_logits(Model(), images, 20, 9), square)


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (16, 17, "vertical window_stride 17 leaves gaps between windows of 16"),
        ((16, 8), (8, 9), "horizontal window_stride 9 leaves gaps between windows of 8"),
        (0, None, "window_size must be .* at least 1, not 0"),
        (16, (4, 0), "window_stride must be"),
        ((1, 2, 3), None, "window_size must be one or two numbers"),
    ],
)
def test_windows_that_cannot_be(window, stride, message):
    with pytest.raises(ValueError, match=message):
        sliding_window_logits(Model(), torch.randn(1, 3, 20, 20), window, stride)
