"""The pictures: exact colors on small inputs, odd sizes, and one clear error for what does not fit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ailurus_hf.visualization import (
    LegendEntry,
    Panel,
    class_legend,
    class_palette,
    colorize_labels,
    compare_predictions,
    difference_legend,
    distinct_colors,
    draw_assignment,
    draw_difference,
    draw_sheet,
    draw_token_counts,
    overlay_labels,
    reconstruct_image,
    token_count_legend,
)
from ailurus_hf.visualization.palettes import BETTER, NEITHER, WORSE


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_mean_fill_is_the_mean_color_of_each_cluster() -> None:
    image = np.zeros((4, 6, 3), dtype=np.uint8)
    image[:2, :2], image[2:, 4:] = 100, 200
    assignment = torch.tensor([[0, 1, 1, 1, 1, 0]])  # the first and the last of 2×3 tokens share a cluster
    picture = np.asarray(draw_assignment(image, assignment, (2, 3), border=None))
    assert (picture[:2, :2] == 150).all() and (picture[2:, 4:] == 150).all()
    assert (picture[:2, 2:] == 0).all()


def test_borders_are_drawn_between_clusters_and_nowhere_else() -> None:
    image = np.full((8, 8, 3), 50, dtype=np.uint8)
    picture = np.asarray(draw_assignment(image, torch.tensor([[0, 1, 0, 1]]), (2, 2), border=(255, 0, 0)))
    red = (picture == (255, 0, 0)).all(axis=2)
    assert red[:, 3].all() and red.sum() == 8


def test_distinct_fill_gives_every_cluster_its_own_color() -> None:
    picture = draw_assignment(noise(48, 80), torch.arange(15)[None], (3, 5), fill="distinct", border=None)
    assert picture.size == (80, 48)
    assert len(picture.getcolors()) == 15
    assert len(np.unique(distinct_colors(400), axis=0)) > 300
    assert distinct_colors(0).shape == (0, 3)


@pytest.mark.parametrize("size", [(37, 53), (48, 80), (3, 5), (1, 1)])
def test_any_image_size_is_kept(size: tuple[int, int]) -> None:
    image = noise(*size)
    for picture in (
        draw_assignment(image, torch.arange(15)[None] // 2, (3, 5)),
        reconstruct_image(image, torch.arange(15)[None] // 2, (3, 5)),
        draw_assignment(image, torch.zeros(1, 12, dtype=torch.long), (3, 4), patch_size=32),
    ):
        assert (picture.height, picture.width) == size


def test_an_image_of_as_many_clusters_as_tokens_is_rebuilt_exactly() -> None:
    image = noise(12, 20)
    assert np.array_equal(np.asarray(reconstruct_image(image, torch.arange(15)[None], (3, 5))), image)
    padded = reconstruct_image(image, torch.arange(8)[None], (2, 4), patch_size=7)
    assert np.array_equal(np.asarray(padded), image)


def test_rebuilding_uses_the_mean_patch_or_the_patch_of_the_center() -> None:
    image = np.zeros((2, 8, 3), dtype=np.uint8)
    image[:, 0], image[:, 2] = 100, 50  # tokens of 2×2 pixels: only their left column is set
    clusters = SimpleNamespace(assignment=torch.tensor([[0, 0, 1, 1]]), centers=torch.tensor([[1, 3]]))
    mean = np.asarray(reconstruct_image(image, clusters, (1, 4)))[0, :, 0]
    center = np.asarray(reconstruct_image(image, clusters, (1, 4), patch="center"))[0, :, 0]
    assert mean.tolist() == [75, 0, 75, 0, 0, 0, 0, 0]
    assert center.tolist() == [50, 0, 50, 0, 0, 0, 0, 0]
    clusters.centers = None
    with pytest.raises(ValueError, match="mean"):
        reconstruct_image(image, clusters, (1, 4), patch="center")


def test_the_index_picks_the_image_of_the_batch() -> None:
    image = noise(4, 4)
    assignment = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]])
    assert np.array_equal(np.asarray(reconstruct_image(image, assignment, (2, 2), index=1)), image)
    with pytest.raises(ValueError, match=r"index 2 .* batch of 2"):
        draw_assignment(image, assignment, (2, 2), index=2)


def test_what_does_not_fit_is_named() -> None:
    image, assignment = noise(8, 8), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"4 tokens .* \(3, 2\)"):
        draw_assignment(image, assignment, (3, 2))
    with pytest.raises(ValueError, match=r"\(1, 2, 2\)"):
        draw_assignment(image, assignment, (1, 2, 2))
    with pytest.raises(ValueError, match="6×6, less than the image's 8×8"):
        draw_assignment(image, assignment, (2, 2), patch_size=3)
    with pytest.raises(ValueError, match="rainbow"):
        draw_assignment(image, assignment, (2, 2), fill="rainbow")
    with pytest.raises(ValueError, match="float64"):
        draw_assignment(image / 255, assignment, (2, 2))
    with pytest.raises(ValueError, match=r"\[8, 9\], the image \[8, 8\]"):
        overlay_labels(image, np.zeros((8, 9)), class_palette(["a"]))


def test_labels_outside_the_palette_are_black() -> None:
    palette = class_palette(["road", "sky"])
    picture = np.asarray(colorize_labels(torch.tensor([[0, 1, 2, 255]]), palette))
    assert picture[0].tolist() == [[128, 64, 128], [70, 130, 180], [0, 0, 0], [0, 0, 0]]


def test_the_difference_tells_who_was_right() -> None:
    image = np.full((1, 5, 3), 255, dtype=np.uint8)
    plain, reduced = np.array([[0, 0, 0, 0, 0]]), np.array([[0, 1, 1, 1, 1]])
    labels = np.array([[0, 0, 1, 2, 11]])
    white, worse, better, neither = [255, 255, 255], list(WORSE), list(BETTER), list(NEITHER)
    told = np.asarray(draw_difference(image, plain, reduced, labels, num_classes=11))[0].tolist()
    assert told == [white, worse, better, white, neither]  # the last two are neither, and striped
    assert np.asarray(draw_difference(image, plain, reduced))[0].tolist() == [white, *[worse] * 4]


def test_a_difference_has_a_legend_of_its_own() -> None:
    classes = class_legend([np.array([[0, 1, 255]])], ["road", "sky"])
    assert [entry.text for entry in classes] == ["road", "sky", "unlabeled"]
    assert [entry.color for entry in difference_legend(labeled=True)] == [WORSE, BETTER, NEITHER]
    assert [entry.striped for entry in difference_legend(labeled=True)] == [False, False, True]
    assert difference_legend(labeled=False)[0].color == WORSE


def test_borders_are_white_on_dark_clusters_and_black_on_bright_ones() -> None:
    image = np.zeros((8, 16, 3), dtype=np.uint8)
    image[:, 8:] = 255
    picture = np.asarray(draw_assignment(image, torch.arange(8)[None], (2, 4)))
    assert (picture[:, 3] == 255).all() and (picture[:, 11] == 0).all()


def test_the_heat_map_tells_how_many_tokens_a_cluster_stands_for() -> None:
    legend = {entry.text.split()[0].strip("+"): entry.color for entry in token_count_legend()}
    assert list(legend) == ["1", "2", "4", "8", "16", "32", "64"]
    assignment = torch.tensor([[0, 1, 1, *[2] * 4, *[3] * 93]])
    picture = np.asarray(draw_token_counts(noise(80, 80), assignment, (10, 10)))
    first = picture[2, 2::8].tolist()  # inside the tokens of the first row
    assert [tuple(color) for color in first[:4]] == [legend["1"], legend["2"], legend["2"], legend["4"]]
    assert tuple(first[-1]) == legend["64"]
    assert len({tuple(color) for color in picture.reshape(-1, 3).tolist()}) == 4 + 1  # and the lines


def test_a_sheet_holds_titles_notes_and_legends() -> None:
    photo = Image.new("RGB", (50, 30), (10, 200, 30))
    panel = Panel("off", photo)
    bare = draw_sheet([panel] * 3, panel_width=100)
    assert bare.width == 2 * (100 + 16) + 16
    assert draw_sheet([panel], panel_width=100).width == 100 + 2 * 16
    noted = draw_sheet([panel, Panel("on", photo, note="2.6x")], panel_width=100)
    assert noted.height > draw_sheet([panel] * 2, panel_width=100).height
    legend = [LegendEntry(WORSE, "a long explanation")] * 6
    assert draw_sheet([panel], legend=legend, panel_width=100).height > bare.height // 2 + 6 * 10
    assert draw_sheet([panel], heading="x" * 300, panel_width=100).width == 100 + 2 * 16
    with pytest.raises(ValueError, match="not 0 panels in 2"):
        draw_sheet([])


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("with_assignment", [False, True])
def test_a_comparison_holds_every_panel(with_labels: bool, with_assignment: bool) -> None:
    image, labels = noise(30, 50), np.zeros((30, 50), dtype=np.uint8)
    labels[:, 25:], labels[0] = 1, 11
    assignment = draw_assignment(image, torch.arange(15)[None], (3, 5), border=WORSE) if with_assignment else None
    picture = compare_predictions(
        image,
        labels.clip(max=1),
        np.zeros_like(labels),
        assignment,
        labels if with_labels else None,
        class_names=["road", "sky"],
        panel_width=200,
    )
    panels = 4 + with_assignment + with_labels
    assert picture.width == (2 if panels == 4 else 3) * 216 + 16
    colors = {color for _, color in picture.getcolors(maxcolors=1 << 20)}
    assert {(128, 64, 128), (70, 130, 180), WORSE} <= colors
    assert ((0, 0, 0) in colors) == with_labels  # black stands for unlabeled alone


def test_pil_images_of_any_mode_are_taken() -> None:
    gray = Image.fromarray(noise(8, 8)).convert("L")
    assert draw_assignment(gray, torch.arange(4)[None], (2, 2)).mode == "RGB"
