"""Pictures of what token reduction does: which tokens were merged, what is left of the image, where predictions change.

Everything here takes a PIL image or an array and returns a PIL image; nothing is shown or written.

    clusters, grid = status.last_clusters, status.last_grid          # after a forward of a reduced model
    draw_assignment(image, clusters, grid).save("assignment.png")    # the paper's Fig. 2
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..errors import AiluRusError

if TYPE_CHECKING:
    from ..clusters import TokenClusters

ImageLike: TypeAlias = "Image.Image | np.ndarray"
LabelMap: TypeAlias = "torch.Tensor | np.ndarray | Image.Image"
Color: TypeAlias = tuple[int, int, int]

# Street scenes are drawn in the colors of the Cityscapes benchmark, which readers of segmentation papers know.
_CUSTOMARY_COLORS: dict[str, Color] = {
    "sky": (70, 130, 180),
    "building": (70, 70, 70),
    "pole": (153, 153, 153),
    "road": (128, 64, 128),
    "pavement": (244, 35, 232),
    "sidewalk": (244, 35, 232),
    "tree": (107, 142, 35),
    "vegetation": (107, 142, 35),
    "sign": (220, 220, 0),
    "fence": (190, 153, 153),
    "car": (0, 0, 142),
    "pedestrian": (220, 20, 60),
    "person": (220, 20, 60),
    "bicyclist": (119, 11, 32),
}
_UNLABELED: Color = (0, 0, 0)
_RED, _GREEN, _YELLOW = (230, 30, 30), (30, 200, 60), (250, 200, 0)
_INK: Color = (20, 20, 20)


def distinct_colors(count: int) -> np.ndarray:
    """`count` colors, neighbors in the list far apart in hue: uint8 array [count, 3]."""
    colors = []
    for i in range(count):
        hue = (i * 0.61803398875) % 1.0  # the golden ratio never repeats a hue nor comes close soon
        colors.append(colorsys.hsv_to_rgb(hue, (0.85, 0.55, 0.7)[i % 3], (0.95, 0.8, 0.6)[i // 3 % 3]))
    return (np.array(colors).reshape(-1, 3) * 255).round().astype(np.uint8)


def class_palette(class_names: Sequence[str]) -> np.ndarray:
    """A color for each class, the customary one where the name has one: uint8 array [classes, 3]."""
    palette = distinct_colors(len(class_names))
    for i, name in enumerate(class_names):
        palette[i] = _CUSTOMARY_COLORS.get(name.lower(), palette[i])
    return palette


def draw_assignment(
    image: ImageLike,
    clusters: TokenClusters | torch.Tensor,
    grid: Sequence[int],
    *,
    index: int = 0,
    fill: str = "mean",
    border: Color | None = (255, 255, 255),
    patch_size: int | None = None,
) -> Image.Image:
    """The image with every cluster of tokens filled with one color and outlined (the paper's Fig. 2).

    Args:
        image: the image the model saw, [H, W, 3] uint8 or PIL.
        clusters: TokenClusters, or its assignment LongTensor[B, N].
        grid: (rows, columns) of tokens, N in all.
        index: which image of the batch.
        fill: "mean", the cluster's mean color, or "distinct", a color of its own.
        border: color of the outlines, None for none.
        patch_size: side of a token in pixels where the image was padded on the right and at the bottom to make
            whole tokens; None where the tokens span the image.

    Raises:
        AiluRusError: a grid that does not match the tokens or the image, an index past the batch, an unknown fill.
    """
    assignment = _assignment(clusters, grid, index)
    pixels, side, crop = _tile(image, grid, patch_size)
    cluster_of_pixel = assignment.repeat(side, axis=0).repeat(side, axis=1)
    num_clusters = int(assignment.max()) + 1
    if fill == "mean":
        colors = _cluster_means(pixels.reshape(-1, 3), cluster_of_pixel.reshape(-1), num_clusters)
    elif fill == "distinct":
        colors = distinct_colors(num_clusters)
    else:
        raise AiluRusError(f'fill is "mean" or "distinct", not {fill!r}')
    picture = colors.round().astype(np.uint8)[cluster_of_pixel]
    if border is not None:
        picture[_edges(cluster_of_pixel)] = border
    return _untile(picture, crop)


def reconstruct_image(
    image: ImageLike,
    clusters: TokenClusters | torch.Tensor,
    grid: Sequence[int],
    *,
    index: int = 0,
    patch: str = "mean",
    patch_size: int | None = None,
) -> Image.Image:
    """The image rebuilt from one patch a cluster: what the layers behind the merge still see (the paper's Fig. 2).

    Args:
        image, clusters, grid, index, patch_size: as in `draw_assignment`.
        patch: "mean", the mean of the cluster's patches, or "center", the patch of its center (the paper).

    Raises:
        AiluRusError: as in `draw_assignment`; "center" for clusters whose centers are no tokens.
    """
    assignment = _assignment(clusters, grid, index).reshape(-1)
    pixels, side, crop = _tile(image, grid, patch_size)
    rows, columns = grid
    patches = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
    if patch == "mean":
        patches = _cluster_means(patches, assignment, int(assignment.max()) + 1)[assignment]
    elif patch == "center":
        centers = getattr(clusters, "centers", None)
        if centers is None:
            raise AiluRusError('patch="center" needs centers that are tokens, and these clusters have none: use "mean"')
        patches = patches[centers[index].cpu().numpy()[assignment]]
    else:
        raise AiluRusError(f'patch is "mean" or "center", not {patch!r}')
    picture = patches.reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
    return _untile(picture.reshape(pixels.shape).round().astype(np.uint8), crop)


def colorize_labels(label_map: LabelMap, palette: np.ndarray) -> Image.Image:
    """A label map [H, W] in the palette's colors [classes, 3]; labels outside the palette are black."""
    labels = _labels(label_map)
    picture = np.full((*labels.shape, 3), _UNLABELED, dtype=np.uint8)
    known = (labels >= 0) & (labels < len(palette))
    picture[known] = np.asarray(palette, dtype=np.uint8)[labels[known]]
    return Image.fromarray(picture)


def overlay_labels(image: ImageLike, label_map: LabelMap, palette: np.ndarray, opacity: float = 0.6) -> Image.Image:
    """The image [H, W, 3] with its label map [H, W] laid over it."""
    photo = Image.fromarray(_pixels(image))
    _same_size(photo, _labels(label_map), "label map")
    return Image.blend(photo, colorize_labels(label_map, palette), opacity)


def draw_difference(
    image: ImageLike, plain: LabelMap, reduced: LabelMap, labels: LabelMap | None = None, num_classes: int | None = None
) -> Image.Image:
    """The image in pale gray, and in color the pixels where two label maps [H, W] differ.

    Without labels they are red. With them: red where reduction made it wrong, green where it made it right, yellow
    where both are wrong or the pixel is unlabeled (a label below 0 or, if given, from `num_classes` on).
    """
    photo, first, second = _pixels(image), _labels(plain), _labels(reduced)
    _same_size(Image.fromarray(photo), first, "plain prediction")
    _same_size(Image.fromarray(photo), second, "reduced prediction")
    gray = photo @ np.array([0.299, 0.587, 0.114])
    picture = np.repeat((255 - (255 - gray) * 0.4)[..., None], 3, axis=2).astype(np.uint8)
    differs = first != second
    if labels is None:
        picture[differs] = _RED
        return Image.fromarray(picture)
    truth = _labels(labels)
    _same_size(Image.fromarray(photo), truth, "ground truth")
    labeled = (truth >= 0) & (truth < (np.inf if num_classes is None else num_classes))
    picture[differs] = _YELLOW
    picture[differs & labeled & (first == truth)] = _RED
    picture[differs & labeled & (second == truth)] = _GREEN
    return Image.fromarray(picture)


def compare_predictions(
    image: ImageLike,
    plain: LabelMap,
    reduced: LabelMap,
    assignment: Image.Image | None = None,
    labels: LabelMap | None = None,
    *,
    class_names: Sequence[str],
    palette: np.ndarray | None = None,
    plain_title: str = "AiluRus off",
    reduced_title: str = "AiluRus on",
    assignment_title: str = "token assignment",
    panel_width: int = 480,
) -> Image.Image:
    """One labeled picture: photo, both label maps, where they differ, the assignment, the ground truth, a legend.

    Args:
        image: [H, W, 3] uint8 or PIL.
        plain, reduced: label maps [H, W] without and with reduction.
        assignment: a picture from `draw_assignment`, or None for no such panel.
        labels: ground truth [H, W], or None for no such panel.
        class_names: names in id order; the legend shows those that occur.
        palette: [classes, 3]; default `class_palette(class_names)`.
        panel_width: pixels a panel; the height follows the image.

    Raises:
        AiluRusError: a label map that is not of the image's size.
    """
    palette = class_palette(class_names) if palette is None else palette
    photo = Image.fromarray(_pixels(image))
    share = float((_labels(plain) != _labels(reduced)).mean())
    legend = {_RED: "only off is right", _GREEN: "only on is right", _YELLOW: "both wrong, or unlabeled"}
    difference = draw_difference(photo, plain, reduced, labels, len(class_names))
    panels = [
        ("image", photo),
        (plain_title, colorize_labels(plain, palette)),
        (reduced_title, colorize_labels(reduced, palette)),
        (f"they differ on {share:.1%} of the pixels", difference),
    ]
    if assignment is not None:
        panels.append((assignment_title, assignment))
    if labels is not None:
        panels.append(("ground truth", colorize_labels(labels, palette)))

    seen = np.unique(np.concatenate([_labels(m).ravel() for m in (plain, reduced, labels) if m is not None]))
    entries = [(tuple(int(c) for c in palette[i]), class_names[i]) for i in seen if 0 <= i < len(class_names)]
    if labels is not None:
        if len(entries) < len(seen):
            entries.append((_UNLABELED, "unlabeled"))
        entries.extend((color, f"differ: {text}") for color, text in legend.items())
    return _sheet(panels, entries, panel_width)


def _sheet(
    panels: Sequence[tuple[str, Image.Image]], legend: Sequence[tuple[tuple[int, ...], str]], width: int
) -> Image.Image:
    """Titled panels of one width in rows of three (two where there are four), the legend below."""
    height = round(width * panels[0][1].height / panels[0][1].width)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    gap, font = 12, ImageFont.load_default(size=18)
    title, line = 30, 28
    sheet_width = columns * (width + gap) + gap

    places, x, y = [], gap, 0
    for color, text in legend:  # laid out first: how many lines it takes decides the height
        taken = 22 + int(font.getlength(text)) + 22
        if x > gap and x + taken > sheet_width:
            x, y = gap, y + line
        places.append((x, y, color, text))
        x += taken
    legend_top = rows * (height + title + gap) + gap
    sheet = Image.new("RGB", (sheet_width, legend_top + y + line + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, picture) in enumerate(panels):
        left, top = gap + i % columns * (width + gap), i // columns * (height + title + gap)
        draw.text((left, top + title / 2 + 3), name, fill=_INK, font=font, anchor="lm")
        # Label maps hold few colors and must not be blurred; a photograph must not be made blocky.
        few_colors = picture.getcolors(maxcolors=64) is not None
        resample = Image.Resampling.NEAREST if few_colors else Image.Resampling.BICUBIC
        sheet.paste(picture.resize((width, height), resample), (left, top + title))
    for left, top, color, text in places:
        top += legend_top
        draw.rectangle((left, top + 4, left + 16, top + 20), fill=color, outline=_INK)
        draw.text((left + 22, top + 12), text, fill=_INK, font=font, anchor="lm")
    return sheet


def _pixels(image: ImageLike) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise AiluRusError(f"an image is PIL or a uint8 array [H, W, 3], not {image.dtype} {list(image.shape)}")
    return image


def _labels(label_map: LabelMap) -> np.ndarray:
    labels = label_map.cpu().numpy() if isinstance(label_map, torch.Tensor) else np.asarray(label_map)
    if labels.ndim != 2:
        raise AiluRusError(f"a label map is [H, W], not {list(labels.shape)}")
    return labels.astype(np.int64)


def _same_size(photo: Image.Image, labels: np.ndarray, what: str) -> None:
    if labels.shape != (photo.height, photo.width):
        raise AiluRusError(f"the {what} is {list(labels.shape)}, the image {[photo.height, photo.width]}")


def _assignment(clusters: TokenClusters | torch.Tensor, grid: Sequence[int], index: int) -> np.ndarray:
    """The cluster of each token of one image, [rows, columns]."""
    assignment = clusters if isinstance(clusters, torch.Tensor) else clusters.assignment
    batch, tokens = assignment.shape
    if len(grid) != 2 or grid[0] * grid[1] != tokens:
        raise AiluRusError(
            f"a picture of {tokens} tokens needs a grid of two sides with that product, not {tuple(grid)}"
        )
    if not 0 <= index < batch:
        raise AiluRusError(f"index {index} is outside the batch of {batch}")
    return assignment[index].cpu().numpy().reshape(grid[0], grid[1])


def _tile(
    image: ImageLike, grid: Sequence[int], patch_size: int | None
) -> tuple[np.ndarray, int, tuple[int, int, bool]]:
    """The image brought to a whole number of pixels a token, that number, and what `_untile` needs to go back."""
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    rows, columns = grid
    if patch_size is None:
        side = max(1, round(max(height / rows, width / columns)))
        resized = Image.fromarray(pixels).resize((columns * side, rows * side), Image.Resampling.BICUBIC)
        return np.asarray(resized), side, (height, width, True)
    below, right = rows * patch_size - height, columns * patch_size - width
    if below < 0 or right < 0:
        raise AiluRusError(
            f"{rows}×{columns} tokens of {patch_size} pixels cover {rows * patch_size}×{columns * patch_size}, "
            f"less than the image's {height}×{width}"
        )
    return np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge"), patch_size, (height, width, False)


def _untile(picture: np.ndarray, original: tuple[int, int, bool]) -> Image.Image:
    height, width, resized = original
    result = Image.fromarray(picture)
    if not resized:
        return result.crop((0, 0, width, height))
    return result.resize((width, height), Image.Resampling.NEAREST)


def _cluster_means(values: np.ndarray, cluster: np.ndarray, num_clusters: int) -> np.ndarray:
    """Means of values [N, D] over the clusters [N]: [M, D]; an empty cluster's is 0."""
    counts = np.bincount(cluster, minlength=num_clusters).clip(min=1)
    sums = [np.bincount(cluster, weights=column, minlength=num_clusters) for column in values.T]
    return np.stack(sums, axis=1) / counts[:, None]


def _edges(regions: np.ndarray) -> np.ndarray:
    """True where a pixel's right or lower neighbor belongs to another region."""
    edges = np.zeros(regions.shape, dtype=bool)
    edges[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    edges[:-1, :] |= regions[:-1, :] != regions[1:, :]
    return edges
