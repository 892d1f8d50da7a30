"""The page in Gradio: controls on the left, plain beside reduced on the right. `Workbench` computes what it shows."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ..choices import RESTORES, clustering_names
from ..errors import AiluRusError
from ..evaluation.loading import first_line
from ..evaluation.timing import measured_on
from ..extras import needs_extra
from ..visualization.report import compared_html
from .controls import Controls
from .markup import EMPTY, HEADER, refused_html, summary_html
from .workbench import MOST_FRAMES, ComparedClip, ComparedPhoto, Workbench

with needs_extra("app", "The page"):
    import gradio as gr

logger = logging.getLogger(__name__)

# Letters of the machine: the page loads nothing from elsewhere.
THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.blue,
    neutral_hue=gr.themes.colors.slate,
    font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(
    # Of enough contrast to be read.
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_title_text_color="*neutral_700",
    button_primary_background_fill="#00599c",
    button_primary_background_fill_hover="#004a82",
    button_primary_background_fill_dark="#00599c",
    button_primary_background_fill_hover_dark="#0069b8",
)
# Gradio finds it as a default, and gives each run its own.
PROGRESS = gr.Progress()
PHOTO, CLIP = "image", "clip"


class Results(NamedTuple):
    """What a run fills, in the order of the page."""

    summary: gr.HTML
    pictures: gr.HTML
    clip: gr.Video
    python: gr.Code


def build_page(bench: Workbench, example: Path | None = None) -> gr.Blocks:
    """The page.

    Args:
        bench: the model.
        example: an image that is there as the page opens, and compared at once; None: there is none.
    """
    with gr.Blocks(title="ailurus_hf", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(HEADER)
        mode = gr.State(PHOTO)
        with gr.Row():
            with gr.Column(scale=2, min_width=320, elem_id="settings"):
                photo, clip, frames = _sources(bench, mode, example)
                button = gr.Button("Compare", variant="primary", elem_id="compare")
                controls = _controls(bench)
            with gr.Column(scale=3, min_width=320):
                results = _results()
        given = [mode, photo, clip, frames, *controls]
        run, rerun = _runs(bench)
        shared: dict[str, Any] = {
            "show_progress_on": [results.summary],
            "concurrency_id": "model",
            "api_visibility": "private",
        }
        button.click(run, given, list(results), **shared)
        changed = [controls[1].release, controls[2].release, *(control.input for control in controls[3:])]
        gr.on([*changed], rerun, given, list(results), trigger_mode="always_last", **shared)
        started = controls[0].input(
            lambda name: bench.controls_of(name)[1:], controls[0], controls[1:], api_visibility="private"
        )
        started.then(rerun, given, list(results), **shared)
        if example is not None:
            page.load(run, given, list(results), **shared)
    return page


def _sources(bench: Workbench, mode: gr.State, example: Path | None) -> tuple[gr.Image, gr.Video, gr.Slider]:
    with gr.Tabs():
        with gr.Tab("Image") as photo_tab:
            photo = gr.Image(
                value=None if example is None else str(example),
                type="filepath",
                sources=["upload", "clipboard"],
                label="Image",
                height=300,
                elem_id="photo",
            )
            # The file as it was dropped: what Gradio would make of it is cut off at 8 bits, or fails without words.
            photo.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
        with gr.Tab("Clip", visible=bench.task != "classify") as clip_tab:
            clip = gr.Video(sources=["upload"], label="Clip", height=300, elem_id="clip")
            frames = gr.Slider(1, MOST_FRAMES, 16, step=1, label="Frames, from the first one on")
    photo_tab.select(lambda: PHOTO, None, mode, api_visibility="private")
    clip_tab.select(lambda: CLIP, None, mode, api_visibility="private")
    return photo, clip, frames


def _controls(bench: Workbench) -> list[Any]:
    """As the fields of `Controls`."""
    start = bench.start
    preset = gr.Radio(list(bench.presets), value=start.preset, label="Preset")
    keep = gr.Slider(0.05, 1, start.keep_ratio, step=0.01, label="Keep ratio", info="Share of the tokens that is kept")
    location = gr.Slider(
        0,
        bench.last_location,
        start.location,
        step=1,
        label="Location",
        info="Merge after this layer; 0: before the first",
    )
    clustering = gr.Dropdown(list(clustering_names()), value=start.clustering, label="Clustering")
    restore = gr.Radio(list(RESTORES), value=start.restore, label="Restore", info="What a token gets back at the end")
    return [preset, keep, location, clustering, restore]


def _results() -> Results:
    return Results(
        summary=gr.HTML(EMPTY, elem_id="summary", padding=False),
        pictures=gr.HTML(elem_id="pictures", padding=False),
        clip=gr.Video(show_label=False, visible=False, autoplay=True, loop=True, elem_id="result-clip"),
        python=gr.Code(label="Copy as Python", language="python", visible=False, interactive=False, elem_id="python"),
    )


def _runs(bench: Workbench) -> tuple[Any, Any]:
    """What the button does, and what a changed control does."""

    def run(
        mode: str, photo: str | None, clip: str | None, frames: int, *values: Any, progress: Any = PROGRESS
    ) -> Iterator[list[Any]]:
        given = photo if mode == PHOTO else clip
        if given is None:
            yield _refused(f"There is no {mode} yet: drop one on the left.")
            return
        controls = Controls(values[0], float(values[1]), int(values[2]), *values[3:])
        try:
            if mode == PHOTO:
                yield _photo_shown(bench, bench.compare(Path(given), controls))
                return
            with tempfile.TemporaryDirectory(prefix="ailurus-app-") as folder:  # Gradio has its copy after the yield
                output, total = Path(folder) / "compared.mp4", int(frames)
                done = lambda count: progress((count, total), unit="frames")  # noqa: E731
                yield _clip_shown(bench, bench.compare_clip(Path(given), controls, total, output, done))
        except AiluRusError as error:
            yield _refused(str(error))
        except Exception as error:  # models refuse an image in as many ways as there are of them
            logger.exception("a comparison failed")
            yield _refused(f"The model failed: {first_line(error)}")

    def rerun(mode: str, photo: str | None, *others: Any) -> Iterator[list[Any]]:
        if mode == PHOTO and photo is not None:  # a clip takes long: the button starts it
            yield from run(mode, photo, *others)
        else:
            yield [gr.skip()] * len(Results._fields)

    return run, rerun


def _photo_shown(bench: Workbench, found: ComparedPhoto) -> list[Any]:
    notes = [f"Reduced: {found.setting}", _device(bench), found.note]
    summary = summary_html(found.result, bench.agree, found.told, notes)
    return [summary, compared_html(found.image), gr.update(value=None, visible=False), _shown(found.python)]


def _clip_shown(bench: Workbench, found: ComparedClip) -> list[Any]:
    notes = [f"{found.frames} frames, medians. Reduced: {found.setting}", _device(bench)]
    summary = summary_html(found.result, bench.agree, found.told, notes)
    return [summary, "", _shown(str(found.file)), _shown(found.python)]


def _shown(value: str) -> Any:
    return gr.update(value=value, visible=True)


def _refused(words: str) -> list[Any]:
    """The words in place of results, and on top of the page, which may have been scrolled."""
    gr.Warning(escape(words))
    return [refused_html(words), "", gr.update(value=None, visible=False), gr.update(value="", visible=False)]


def _device(bench: Workbench) -> str:
    about = measured_on(bench.loaded.device, str(bench.loaded.dtype).removeprefix("torch."))
    return f"{Path(bench.loaded.name).name} on {about['device']}, {about['precision']}"
