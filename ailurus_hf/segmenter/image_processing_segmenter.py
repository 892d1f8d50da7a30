"""Pictures to Segmenter's pixel values and its logits back to label maps; sliding-window inference.

PIL and numpy only: torchvision is not needed.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.modeling_outputs import SemanticSegmenterOutput

# Up to 5.17 transformers itself hides this class where torchvision is missing, which it does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor as AutoImageProcessor
from transformers.processing_utils import ImagesKwargs

from ..images import Image, by, check_enlarged, to_8_bits

# (mean, std) by the name that variant.yml gives them: AugReg ViTs were trained on -1..1, DeiTs on ImageNet statistics.
NORMALIZATION = {
    "vit": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "deit": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


class SegmenterImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Beyond transformers' own: the sliding window (see `sliding_window_logits`) and the label of padding.

    window_size (`int` or `list[int]`): side or [height, width] of a window, in pixels; not set: whole images.
    window_stride (`int` or `list[int]`): step between windows, in pixels; defaults to window_size.
    label_pad_value (`int`): label of the pixels added by padding; default 255.
    """

    window_size: int | list[int] | tuple[int, int] | None
    window_stride: int | list[int] | tuple[int, int] | None
    label_pad_value: int | None


class SegmenterImageProcessor(PilBackend):
    """Images (PIL, numpy or torch) -> pixel_values Tensor[B, 3, H, W], and with segmentation_maps labels [B, H, W].

    Defaults: no resizing (the model takes any size), RGB, scaled to 0..1, "vit" mean and std (for a DeiT pass
    `image_mean` and `image_std` of `NORMALIZATION["deit"]`), images of a batch padded right and bottom to the largest
    with 0 after normalizing, labels with 255. `do_resize=True` resizes to `size`, shortest edge 512 if not given.

    Example:
        processor = SegmenterImageProcessor.from_pretrained("examples/assets/segmenter-camvid")
        inputs = processor(images=photo, return_tensors="pt")
        outputs = model(**inputs)
        labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[photo.size[::-1]])[0]
    """

    valid_kwargs = SegmenterImageProcessorKwargs
    model_input_names = ["pixel_values"]
    do_convert_rgb = True
    do_resize = False
    size = {"shortest_edge": 512}
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean, image_std = map(list, NORMALIZATION["vit"])
    do_pad = True
    window_size = None
    window_stride = None
    label_pad_value = 255

    def preprocess(self, images: ImageInput, segmentation_maps: ImageInput | None = None, **kwargs) -> BatchFeature:
        """BatchFeature with pixel_values and, where segmentation_maps ([H, W] class ids) are given, labels.

        Raises ValueError where the number of maps or the size of one differs from the images'.
        """
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None,
        do_convert_rgb: bool | None = None,
        input_data_format: ChannelDimension | str | None = None,
        return_tensors: str | None = None,
        label_pad_value: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        images = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format
        )
        data = {"pixel_values": self._preprocess(images, return_tensors=None, **kwargs)["pixel_values"]}
        if segmentation_maps is not None:
            maps = self._prepare_image_like_inputs(
                segmentation_maps,
                expected_ndims=2,
                do_convert_rgb=False,
                input_data_format=ChannelDimension.FIRST,
            )
            _check_maps(images, maps)
            kwargs |= {"do_rescale": False, "do_normalize": False, "resample": PILImageResampling.NEAREST}
            do_pad, pad_size = kwargs.pop("do_pad"), kwargs.get("pad_size")
            maps = self._preprocess(maps, do_pad=False, return_tensors=None, **kwargs)["pixel_values"]
            if do_pad:
                # Signed and wide before padding: the pad value may not fit the map's own type.
                maps = [label.astype(np.int64) for label in maps]
                maps = self.pad(maps, pad_size=pad_size, fill_value=label_pad_value)
            data["labels"] = [label[0].astype(np.int64) for label in maps]
        return BatchFeature(data=data, tensor_type=return_tensors)

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[Tensor]:
        """Label maps, a LongTensor[h, w] per image, from a model's output (`.logits` Tensor[B, labels, H, W]).

        target_sizes: (height, width) of each original image; what batch padding added is cut off and what resizing
        changed is undone, bilinearly on the logits. Default: the logits' size. Raises ValueError where the number of
        sizes is not the number of images.
        """
        logits = outputs.logits
        # By max: on a CPU argmax takes several times as long over an axis that is not the last.
        if target_sizes is None:
            return list(logits.max(dim=1).indices)
        if len(target_sizes) != len(logits):
            raise ValueError(f"{len(target_sizes)} target_sizes for {len(logits)} images: give one for each")
        maps = []
        for scores, size in zip(logits, target_sizes):
            size = (int(size[0]), int(size[1]))
            height, width = self._processed_size(size)
            scores = scores[None, :, :height, :width]
            if scores.shape[-2:] != size:
                scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
            maps.append(scores[0].max(dim=0).indices)
        return maps

    def convert_to_rgb(self, image: ImageInput, *args, **kwargs) -> ImageInput:
        """As transformers' own, which would cut pictures of 16 bits or floats off at 255. Raises ImageError."""
        if isinstance(image, Image.Image):
            image = to_8_bits(image)
        return super().convert_to_rgb(image, *args, **kwargs)

    def resize(self, image: np.ndarray, size: SizeDict, *args, **kwargs) -> np.ndarray:
        """As transformers' own. Raises ImageError where a narrow strip would become too large, see `images`."""
        if size.shortest_edge and not size.longest_edge:
            height, width = image.shape[-2:]
            scale = size.shortest_edge / min(height, width)
            enlarged = round(width * scale), round(height * scale)
            check_enlarged((width, height), enlarged, f"the shorter side as {size.shortest_edge}")
        return super().resize(image, size, *args, **kwargs)

    def _processed_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of this size has after resizing, before padding."""
        if not self.do_resize:
            return size
        # Ask the very code that resizes, on an image of one channel.
        return self.resize(np.zeros((1, *size), dtype=np.uint8), self.size).shape[-2:]


def _check_maps(images: list[np.ndarray], maps: list[np.ndarray]) -> None:
    if len(images) != len(maps):
        raise ValueError(f"{len(maps)} segmentation maps for {len(images)} images: give one for each")
    for i, (image, label) in enumerate(zip(images, maps)):
        if image.shape[-2:] != label.shape[-2:]:
            raise ValueError(
                f"segmentation map {i} is {label.shape[-2]} x {label.shape[-1]} pixels, its image "
                f"{image.shape[-2]} x {image.shape[-1]}"
            )


def sliding_window_logits(
    model: torch.nn.Module,
    pixel_values: Tensor,
    window_size: int | tuple[int, int],
    window_stride: int | tuple[int, int] | None = None,
    batch_size: int = 8,
) -> Tensor:
    """Logits of overlapping windows, averaged, as the original Segmenter's inference does it.

    The last window of a row or column is flush with the border. An image smaller than the window is first enlarged
    bilinearly, aspect kept, and its logits brought back to H x W.

    Args:
        model: from images to an output with `logits`.
        pixel_values: Tensor[B, 3, H, W].
        window_size: pixels, one number or (height, width).
        window_stride: the same; defaults to the window.
        batch_size: windows a forward pass.

    Returns:
        Tensor[B, labels, H, W] in float32; take softmax or argmax of it.

    Raises:
        ValueError: a stride that is < 1 or leaves gaps, or an image that is so narrow that enlarging it would fill the
            memory.

    Example:
        logits = sliding_window_logits(model, inputs["pixel_values"], window_size=512, window_stride=256)
    """
    window = _pair(window_size, "window_size")
    stride = window if window_stride is None else _pair(window_stride, "window_stride")
    for axis, step, side in zip(("vertical", "horizontal"), stride, window):
        if step > side:
            raise ValueError(f"the {axis} window_stride {step} leaves gaps between windows of {side}: at most {side}")

    original_size = (pixel_values.shape[-2], pixel_values.shape[-1])
    size = _enlarged_size(original_size, window)
    check_enlarged(original_size[::-1], size[::-1], f"to fill windows of {by(window[::-1])}")
    if size != original_size:
        pixel_values = F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)
    corners = [
        (image, top, left)
        for image in range(len(pixel_values))
        for top in _window_starts(size[0], window[0], stride[0])
        for left in _window_starts(size[1], window[1], stride[1])
    ]
    count = pixel_values.new_zeros(len(pixel_values), 1, *size, dtype=torch.float32)
    total = count[:, :0]  # as many planes as there are labels, known once the first windows are through
    for start in range(0, len(corners), batch_size):
        batch = corners[start : start + batch_size]
        crops = [pixel_values[b, :, y : y + window[0], x : x + window[1]] for b, y, x in batch]
        logits = model(torch.stack(crops)).logits.float()
        if total.shape[1] == 0:
            total = count.new_zeros(len(pixel_values), logits.shape[1], *size)
        for scores, (b, y, x) in zip(logits, batch):
            total[b, :, y : y + window[0], x : x + window[1]] += scores
            count[b, :, y : y + window[0], x : x + window[1]] += 1
    logits = total / count
    if size != original_size:
        logits = F.interpolate(logits, size=original_size, mode="bilinear", align_corners=False)
    return logits


def first_window(processor: SegmenterImageProcessor, pixel_values: Tensor) -> Tensor:
    """What the encoder sees at once: of images that are seen in windows, the first window; else all.

    Args:
        processor: says whether there are windows.
        pixel_values: Tensor[B, 3, H, W].

    Returns:
        Tensor[B, 3, h, w].

    Example:
        seen = first_window(processor, inputs["pixel_values"])
    """
    if processor.window_size is None:
        return pixel_values
    height, width = _pair(processor.window_size, "window_size")
    return pixel_values[..., :height, :width]


def windowed_outputs(
    model: torch.nn.Module, processor: SegmenterImageProcessor, pixel_values: Tensor
) -> SemanticSegmenterOutput:
    """The model's output as its processor says: of whole images, or averaged over windows.

    Args:
        model: from images to an output with `logits`.
        processor: says whether there are windows.
        pixel_values: Tensor[B, 3, H, W].

    Returns:
        An output whose logits are Tensor[B, labels, H, W].

    Example:
        outputs = windowed_outputs(model, processor, inputs["pixel_values"])
    """
    if processor.window_size is None:
        return model(pixel_values)
    logits = sliding_window_logits(model, pixel_values, processor.window_size, processor.window_stride)
    return SemanticSegmenterOutput(logits=logits)


def _pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be one or two numbers of at least 1, not {value}")
    return pair


def _enlarged_size(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if height >= window[0] and width >= window[1]:
        return height, width
    # The axis that is short of the window by the larger factor sets the scale; the other follows, rounded down.
    if window[0] * width >= window[1] * height:
        return window[0], max(window[1], int(width / height * window[0]))
    return max(window[0], int(height / width * window[1])), window[1]


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    return [*range(0, length - window, stride), length - window]


__all__ = ["NORMALIZATION", "SegmenterImageProcessor", "first_window", "sliding_window_logits", "windowed_outputs"]
