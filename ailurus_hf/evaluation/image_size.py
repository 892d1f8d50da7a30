"""How large an image processor makes an image: a narrow strip is refused before it fills the memory."""

from __future__ import annotations

from typing import Any

from ..images import check_enlarged


def check_processed_size(processor: Any, size: tuple[int, int]) -> None:
    """Checks what the processor makes of an image of this size, (width, height), without running it.

    Raises:
        ImageError: it would have more than `MAX_ENLARGED_PIXELS` pixels, and more than the image itself.
    """
    processed = resized_size(processor, size)
    check_enlarged(size, processed, "the model's image processor scales the shorter side")
    window = getattr(processor, "window_size", None)
    if window is not None:
        height, width = (window, window) if isinstance(window, int) else window
        scale = max(1.0, width / processed[0], height / processed[1])
        enlarged = round(processed[0] * scale), round(processed[1] * scale)
        check_enlarged(size, enlarged, f"the model sees windows of {width}×{height}")


def resized_size(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """The size after resizing, (width, height), where the shorter side alone decides it; else the size as it is."""
    wanted = getattr(processor, "size", None)
    shortest = _entry(wanted, "shortest_edge")
    if not getattr(processor, "do_resize", False) or not shortest or _entry(wanted, "longest_edge"):
        return size
    # Some crop what they resized (ConvNeXT), and resize to a little more than they keep.
    scale = shortest / (getattr(processor, "crop_pct", None) or 1) / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def _entry(sizes: Any, name: str) -> int | None:
    """Sizes are mappings or, in newer versions of transformers, objects."""
    value: int | None = sizes.get(name) if hasattr(sizes, "get") else getattr(sizes, name, None)
    return value
