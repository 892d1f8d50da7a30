"""What the page computes: one image or clip through one model, plain and reduced in turn. Needs no gradio."""

from __future__ import annotations

import dataclasses
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from PIL import Image

from ..errors import AiluRusError
from ..evaluation.bad_input import BadInputError
from ..evaluation.loading import LoadedModel
from ..evaluation.paired import run_once, run_pair, summarize_pairs
from ..evaluation.predictions import AGREE, OF_TASK, of_clip
from ..evaluation.report import compared_image
from ..evaluation.tasks import TASKS, TaskName
from ..evaluation.verdict import verdict
from ..images import by, read_image
from ..video import Clip, open_clip, write_video
from ..visualization import ComparedImage, side_by_side
from .controls import Controls, Preset, last_location, presets_for
from .python_code import as_python

# Images and frames are scaled down to so many pixels at their longer side.
LONGEST, LONGEST_OF_CLIP = 2048, 960
MOST_FRAMES = 64


class ComparedPhoto(NamedTuple):
    """An image without and with reduction.

    image: pictures, legends, and the task's own numbers. result: those of `Pair.to_dict`. told: the verdict, in lines.
    setting: how it was reduced, in words. python: a program that does the same. note: what was done to the image first;
    "": nothing.
    """

    image: ComparedImage
    result: dict[str, Any]
    told: Sequence[str]
    setting: str
    python: str
    note: str


class ComparedClip(NamedTuple):
    """A clip without and with reduction, side by side in `file`; the rest as of `ComparedPhoto`."""

    file: Path
    frames: int
    result: dict[str, Any]
    told: Sequence[str]
    setting: str
    python: str


class Workbench:
    """One model for all who look at the page.

    A lock keeps their runs apart: reduction is on in the model from apply to remove only, and nothing of one run is
    left for the next.

    Args:
        loaded: the model, with nothing on. Where it was saved with settings, the controls start with them.
        repeats: timed runs of an image, of each kind.

    Raises:
        BadInputError: the model is for no task that has something to show.
        UnsupportedModelError: nothing in it can be reduced.

    Example:
        bench = Workbench(load_model("my-segmenter", None, "auto", "float32", None))
        print(bench.compare(Path("street.jpg"), bench.start).result["speedup"])
    """

    def __init__(self, loaded: LoadedModel, repeats: int = 3) -> None:
        if loaded.task not in TASKS:
            nouns = ", ".join(task.noun for task in TASKS.values())
            raise BadInputError(f"{loaded.name} has no head whose output can be shown: the page takes what {nouns}")
        self.loaded, self.repeats, self.task = loaded, repeats, cast(TaskName, loaded.task)
        self.last_location = last_location(loaded.model)
        self.presets: dict[str, Preset] = presets_for(loaded)
        self.start = self.controls_of(next(iter(self.presets)))
        self._lock = threading.Lock()

    def controls_of(self, name: str) -> Controls:
        """Where the controls stand as a preset is chosen. Depth has to be right at borders: there every token keeps its
        own value."""
        found = self.presets[name].controls()
        restore = "residual" if self.task == "depth" and name == "dense" else found.restore
        return found._replace(location=min(found.location, self.last_location), restore=restore)

    @property
    def agree(self) -> str:
        """What the agreement is the share of."""
        return AGREE[self.task]

    def compare(self, path: Path, controls: Controls) -> ComparedPhoto:
        """One image.

        Raises:
            AiluRusError: a file that is no image or cannot be used, or settings that do not go together; in words for
                whoever gave them.
        """
        loaded, expression = self._reduced(controls)
        image, note = _read(path)
        with self._lock:
            pair = run_pair(loaded, loaded.prepare(image), self.repeats)
            agreement, shown = OF_TASK[self.task](loaded, image, pair)
            result = pair.to_dict(agreement)
            compared = compared_image(loaded, path.name, image, pair, result, shown)
        # The image itself and the numbers that every task has stand elsewhere on the page.
        panels = [panel for panel in compared.panels if panel.title != "image"]
        compared = dataclasses.replace(compared, panels=panels, rows=shown.rows)
        python = as_python(loaded, expression, path.name)
        return ComparedPhoto(compared, result, self._verdict(result), loaded.setting(), python, note)

    def compare_clip(
        self, path: Path, controls: Controls, frames: int, output: Path, done: Callable[[int], None] = lambda _: None
    ) -> ComparedClip:
        """The first frames of a clip; other runs come between its frames.

        Args:
            frames: how many, at most MOST_FRAMES.
            output: the clip to write, .mp4.
            done: is told how many frames are done.

        Raises:
            AiluRusError: as of `compare`; and a classifier, whose prediction is no picture.
        """
        if self.task == "classify":
            raise AiluRusError("what a classifier says is no picture, so there is no clip to make: give it images")
        loaded, expression = self._reduced(controls)
        results: list[dict[str, Any]] = []
        with _named(path):
            clip = open_clip(path, max_frames=min(frames, MOST_FRAMES))
            drawn = self._drawn(loaded, clip, results, done)
            count = write_video(output, drawn, clip.fps or 25)
        summary = {**summarize_pairs(results), "tokens": results[-1]["tokens"]}
        python = as_python(loaded, expression, "frame.png")
        return ComparedClip(output, count, summary, self._verdict(summary), loaded.setting(), python)

    def _drawn(
        self, loaded: LoadedModel, clip: Clip, results: list[dict[str, Any]], done: Callable[[int], None]
    ) -> Iterator[Image.Image]:
        """The frames, plain beside reduced; appends the numbers of each."""
        predictions = of_clip(self.task)
        for frame in clip:
            frame = _scaled(frame, LONGEST_OF_CLIP)
            with self._lock:
                inputs = loaded.prepare(frame)
                if not results:  # the first forward of a size is slow
                    run_once(loaded, inputs)
                pair = run_once(loaded, inputs)
                agreement, shown = predictions(loaded, frame, pair)
            results.append(pair.to_dict(agreement))
            done(len(results))
            yield side_by_side([[side.picture] for side in shown.sides], _titles(results))[0]

    def _reduced(self, controls: Controls) -> tuple[LoadedModel, str]:
        """The model with the settings that the controls say, and the settings as Python."""
        if controls.preset not in self.presets:
            raise AiluRusError(f"no preset {controls.preset!r}: there are {', '.join(self.presets)}")
        preset = self.presets[controls.preset]
        return dataclasses.replace(self.loaded, ailurus=preset.config_of(controls)), preset.expression(controls)

    def _verdict(self, result: dict[str, Any]) -> list[str]:
        tokens, kept = result["tokens"]
        if tokens == kept:
            return ["nothing was reduced: the image has no more tokens than are kept"]
        share = f"{kept / tokens:.0%} of the tokens"
        return verdict(tokens, result["speedup"]) or [f"it pays here: {result['speedup']:.2f}× as fast on {share}"]


def _read(path: Path) -> tuple[Image.Image, str]:
    """An image, not larger than a page has use for, and what was done to it."""
    with _named(path):
        image = read_image(path)
    scaled = _scaled(image, LONGEST)
    return scaled, "" if scaled is image else f"scaled down from {by(image.size)} to {by(scaled.size)} pixels"


def _scaled(image: Image.Image, longest: int) -> Image.Image:
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _titles(results: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Above the two halves of a frame: what the model took for it, in the middle of the frames so far."""
    plain, reduced = (statistics.median(result[key] for result in results) for key in ("plain_ms", "reduced_ms"))
    return f"AiluRus off: {plain:.0f} ms a frame", f"AiluRus on: {reduced:.0f} ms a frame"


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name the file as whoever gave it knows it, not where the page keeps it."""
    try:
        yield
    except AiluRusError as error:
        raise AiluRusError(str(error).replace(str(path), path.name)) from error
