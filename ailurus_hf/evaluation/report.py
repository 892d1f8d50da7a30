"""The page of --report: what `comparison_page` shows of images that a command compares, plain beside reduced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..apply import ailurus_enabled
from ..visualization import ComparedImage, Panel
from ..visualization.report import LARGE, Page, Row
from .timing import measured_on
from .writing import save_text

if TYPE_CHECKING:
    from PIL import Image

    from .loading import LoadedModel
    from .paired import Pair


class Shown(NamedTuple):
    """Of one image and both predictions, what a task has to show.

    sides: pictures of both predictions, the legend with the first; none where a prediction is no picture.
    panels: what is shown below them, beside the clusters.
    rows: numbers and words of both, beside those that all tasks have.
    """

    sides: Sequence[Panel] = ()
    panels: Sequence[Panel] = ()
    rows: Sequence[Row] = ()


class Report:
    """The page, image by image.

    Args:
        loaded: the model.
        file: where the page goes.
        metric: what the predictions are scored by; None: they are not.
    """

    def __init__(self, loaded: LoadedModel, file: Path, metric: str | None) -> None:
        self.loaded, self.file, self.metric = loaded, file, metric
        self.page = Page()

    def add(self, name: str, image: Image.Image, pair: Pair, result: dict[str, Any], shown: Shown) -> None:
        """An image.

        Args:
            name: that the page has for it.
            image: in its own size.
            pair, result: both runs, and their numbers as `Pair.to_dict` has them.
            shown: what the task shows.
        """
        if self.page.is_full:
            self.page.add(None)
            return
        self.page.add(compared_image(self.loaded, name, image, pair, result, shown, self.metric))

    def write(self, results: Sequence[dict[str, Any]], summary: dict[str, Any], told: Sequence[str]) -> str:
        """Writes the file, and returns what it holds, in words. Raises WritingError.

        Args:
            results: of all images; summary: of `summarize_pairs`; told: what `verdict` says.
        """
        plain, reduced = (_span([result["tokens"][i] for result in results]) for i in (0, 1))
        tiles = [("as fast", f"{summary['speedup']:.2f}×"), ("tokens", f"{plain} → {reduced}")]
        tiles.append(("an image", f"{summary['plain_ms']:.0f} → {summary['reduced_ms']:.0f} ms"))
        tiles.append(("of the predictions agree", f"{summary['agreement']:.1%}"))
        tiles += [(what, f"{off} → {on}") for what, off, on in _score_rows(summary, self.metric)]
        loaded = self.loaded
        about = measured_on(loaded.device, str(loaded.dtype).removeprefix("torch."))
        versions = [f"{library} {about['versions'][library]}" for library in ("torch", "transformers")]
        notes = [
            ", ".join([about["device"], about["precision"], *versions, about["date"]]),
            "Times are medians over runs, plain and reduced in turn.",
            *(f"{line[0].upper()}{line[1:]}." for line in told),
        ]
        page = self.page.html(
            title=f"{Path(loaded.name).name}: AiluRus off and on",
            setting=f"Reduced: {loaded.setting()}",
            summary=tiles,
            notes=notes,
            footer=f"Written by ailurus-hf. Pictures: at most {LARGE} pixels wide or high. It needs no other file.",
        )
        save_text(page, self.file)
        shown, total = len(self.page.sections), self.page.num_images
        return f"{self.file}, {shown} of {total} images" if shown < total else str(self.file)


def compared_image(
    loaded: LoadedModel,
    name: str,
    image: Image.Image,
    pair: Pair,
    result: dict[str, Any],
    shown: Shown,
    metric: str | None = None,
) -> ComparedImage:
    """One image of a page: what the task shows of it, its clusters, and its numbers. Runs the reduced model once more.

    Args: as of `Report` and `Report.add`.
    """
    with ailurus_enabled(loaded.model, loaded.ailurus):
        clusters = loaded.draw_clusters(loaded.prepare(image)).panels()
    titles, sides = list(pair.titles()), list(shown.sides)
    if not sides:  # then what the first layers see, and what the later ones do
        sides = [clusters[0], clusters[-1]] if clusters else [Panel("image", image)] * 2
        titles = [f"{title}: {side.title}" for title, side in zip(titles, sides, strict=True)]
    plain, reduced = (
        Panel(title, side.picture, side.title, side.legend) for title, side in zip(titles, sides, strict=True)
    )
    rows = [*number_rows(result, metric), *shown.rows]
    return ComparedImage(name, plain, reduced, [*clusters, *shown.panels], rows)


def number_rows(result: dict[str, Any], metric: str | None) -> list[Row]:
    """The numbers of an image as rows: time, speed-up, tokens, agreement, score."""
    rows: list[Row] = [("time", f"{result['plain_ms']:.0f} ms", f"{result['reduced_ms']:.0f} ms")]
    rows.append(("speed-up", "", f"{result['speedup']:.2f}×"))
    rows.append(("tokens", str(result["tokens"][0]), str(result["tokens"][1])))
    rows.append(("agreement", "", f"{result['agreement']:.2%}"))
    return rows + _score_rows(result, metric)


def _score_rows(result: dict[str, Any], metric: str | None) -> list[Row]:
    if metric is None:
        return []
    plain, reduced = (result[f"{kind}_{metric.lower()}"] for kind in ("plain", "reduced"))
    return [] if plain is None or reduced is None else [(metric, f"{plain:.2%}", f"{reduced:.2%}")]


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
