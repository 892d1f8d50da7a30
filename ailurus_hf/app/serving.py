"""The model and the page brought together, and served."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.bad_input import BadInputError
from ..evaluation.loading import load_model
from ..evaluation.tasks import TaskName
from ..extras import require
from .workbench import Workbench

if TYPE_CHECKING:
    import gradio

# Of a checkout: the model of `make demo`, and the image that the page opens with.
ASSETS = Path(__file__).parents[2] / "examples" / "assets"
SHIPPED, STREET = ASSETS / "segmenter-camvid", ASSETS / "street.jpg"
EXAMPLE = STREET if STREET.is_file() else None
LARGEST_FILE = "200mb"


def open_workbench(
    model: str | None = None, *, task: TaskName | None = None, device: str = "auto", dtype: str = "float32"
) -> Workbench:
    """Loads a model for the page.

    Args:
        model: a folder or a name on the Hub; None: the small Segmenter of this repository, in a checkout.
        task: "segment", "classify", "depth" or "detect", which the model then has to be for; None: what it is for.
        device: such as "cpu" or "cuda"; "auto": the first accelerator there is.
        dtype: "float32", "float16" or "bfloat16".

    Returns:
        What computes, without a page.

    Raises:
        BadInputError: no such model, one that has nothing to show, or none given outside a checkout.

    Example:
        bench = open_workbench("depth-anything/Depth-Anything-V2-Small-hf")
    """
    if model is None and not SHIPPED.is_dir():
        raise BadInputError(
            "--model is needed: the small Segmenter that is there without it comes with a checkout only"
        )
    if model is None:  # as someone in the checkout would write it
        here = Path.cwd()
        model = str(SHIPPED.relative_to(here) if SHIPPED.is_relative_to(here) else SHIPPED)
    return Workbench(load_model(model, task, device, dtype, None))


def launch(
    model: str | None = None,
    *,
    task: TaskName | None = None,
    device: str = "auto",
    dtype: str = "float32",
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    example: Path | None = EXAMPLE,
    ready: Callable[[str], object] | None = None,
) -> None:
    """Serves the page until the process is interrupted.

    Args:
        model, task, device, dtype: as of `open_workbench`.
        host: the address to listen at; "0.0.0.0" lets other machines in.
        port: None: the first free one from 7860 on.
        share: a public address through Gradio's own servers, for some days.
        example: an image that the page opens with; by default that of a checkout. None: it opens empty.
        ready: is told the address when the page is there; None: nobody is.

    Raises:
        BadInputError: as of `open_workbench`, or a port that is taken.
        MissingExtraError: gradio is not installed.

    Example:
        launch("depth-anything/Depth-Anything-V2-Small-hf", port=8080)
    """
    require("gradio", "app")  # told before the model is loaded
    from .page import build_page

    page = build_page(open_workbench(model, task=task, device=device, dtype=dtype), example)
    address = serve(page, host, port, share, [] if example is None else [example])
    if ready is not None:
        ready(address)
    try:
        while True:
            time.sleep(1)
    finally:
        page.close(verbose=False)


def serve(
    page: gradio.Blocks,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    allowed: Sequence[Path] = (),
) -> str:
    """Starts serving in a thread; returns the address.

    Args:
        host, port, share: as of `launch`.
        allowed: files and folders beside what is dropped in that the page may show, such as its example.

    Raises:
        BadInputError: the port is taken.
    """
    from .markup import head
    from .page import THEME

    try:
        _, local, public = page.queue(default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=THEME,
            head=head(),
            quiet=True,
            prevent_thread_lock=True,
            inline=False,
            ssr_mode=False,
            max_file_size=LARGEST_FILE,
            allowed_paths=[str(path) for path in allowed],
            footer_links=["gradio", "settings"],
        )
    except OSError as error:
        raise BadInputError(f"cannot serve at {host}, port {port or 'any from 7860 on'}: {error}") from error
    return public or local
