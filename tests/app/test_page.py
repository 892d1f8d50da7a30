"""The page in a headless Chromium: it opens with a result, follows its controls, refuses in words, says no error."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import chromium
from cli_models import save_models
from PIL import Image

from ailurus_hf.app import Workbench, open_workbench
from ailurus_hf.app.serving import serve
from ailurus_hf.video import write_video

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the server under Gradio

LAST = 30_000  # ms, for what has to happen at all


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("page"))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "street.png")
    Image.fromarray(pixels[:, :64]).save(folder / "other.png")
    (folder / "text.png").write_text("no picture")
    (folder / "text.mp4").write_text("no clip")
    Image.fromarray(np.full((32, 32), 900, np.uint16)).save(folder / "dark.png")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "ailurus-hf[app]"')
    from ailurus_hf.app.page import build_page

    page = build_page(Workbench(open_workbench(str(folder / "segmenter")).loaded, repeats=1), folder / "street.png")
    yield serve(page, allowed=[folder])
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[object]:
    """Pages of it share what Gradio has the browser load."""
    with chromium() as found:
        yield found.new_context()


@pytest.fixture
def page(browser, address: str):
    """The page with its first result; what the console says and what is asked for elsewhere stands in its lists."""
    page = browser.new_page()
    page.set_default_timeout(LAST)
    page.said, page.elsewhere = [], []
    page.on("console", lambda message: page.said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda asked: page.elsewhere.append(asked.url) if is_elsewhere(asked.url, address) else None)
    page.goto(address)
    page.wait_for_selector(".tiles")
    yield page
    page.close()


def is_elsewhere(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def tile(page, text: str) -> None:
    """Waits until a tile says so."""
    page.locator("#summary .tiles dd", has_text=text).wait_for()


def drop(page, file: Path) -> None:
    page.locator("#photo input[type=file]").set_input_files(file)
    page.wait_for_function(
        "name => document.querySelector('#photo img')?.src.includes(name)", arg=file.name, timeout=LAST
    )


def test_it_opens_with_a_comparison_and_asks_for_nothing_elsewhere(page) -> None:
    tile(page, "96 → 24")
    summary = page.locator("#summary").inner_text()
    assert "as fast" in summary and "of the pixels agree" in summary and "0.25 after layer 2, ward, smooth" in summary
    assert page.locator("#pictures .slider img").count() == 2
    pictures = page.locator("#pictures").inner_text()
    assert "96 tokens in 24 clusters" in pictures and "where they differ" in pictures
    assert 'AiluRusConfig.preset("dense")' in page.locator("#python").inner_text()
    assert page.said == [] and page.elsewhere == []


def test_controls_change_the_result(page) -> None:
    tile(page, "96 → 24")
    page.get_by_label("range slider for Keep ratio").fill("0.5")
    page.locator("#compare").click()
    tile(page, "96 → 48")
    page.get_by_label("range slider for Location").click(position={"x": 2, "y": 2})  # let go, it runs by itself
    page.locator("#summary", has_text="0.5 after layer 0").wait_for()
    page.get_by_role("radio", name="residual").check()
    page.locator("#summary", has_text="ward, residual").wait_for()
    page.get_by_role("radio", name="classification").check()
    page.locator("#summary", has_text="0.65 and 0.37 after layers 1 and 3, pairs, copy").wait_for()
    assert 'AiluRusConfig.preset("classification")' in page.locator("#python").inner_text()
    assert page.get_by_label("range slider for Location").input_value() == "1" and page.said == []


def test_it_works_by_keyboard(page) -> None:
    tile(page, "96 → 24")
    page.get_by_label("range slider for Keep ratio").focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    page.get_by_role("tab", name="Image").focus()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "compare":
            break
    page.keyboard.press("Enter")
    tile(page, "96 → 19")
    page.locator("#pictures .slider input").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')") == "51 % off, 49 % on"
    assert page.said == []


def test_an_image_is_dropped_in(page, folder: Path) -> None:
    drop(page, folder / "other.png")
    page.locator("#compare").click()
    tile(page, "64 → 16")
    assert "other.png" in page.locator("#python").inner_text() and page.said == []


@pytest.mark.parametrize(
    ("name", "told"), [("text.png", "text.png is not a readable image"), ("dark.png", "16-bit values go up to 900")]
)
def test_a_bad_image_is_refused_in_words(page, folder: Path, name: str, told: str) -> None:
    drop(page, folder / name)
    page.locator("#compare").click()
    page.locator("#summary", has_text=told).wait_for()
    page.get_by_test_id("toast-body").filter(has_text=told).wait_for()
    shown = page.locator("body").inner_text()
    assert "Traceback" not in shown and str(folder) not in shown and "as fast" not in shown


def test_a_clip_goes_through_and_a_bad_one_does_not(page, folder: Path) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="clips need imageio-ffmpeg")
    write_video(folder / "walk.mp4", [Image.effect_noise((64, 48), 90).convert("RGB") for _ in range(3)], 8)
    page.get_by_role("tab", name="Clip").click()
    page.locator("#clip input[type=file]").set_input_files(folder / "walk.mp4")
    page.locator("#clip video").wait_for()
    page.locator("#compare").click()
    page.locator("#summary .told", has_text="3 frames").wait_for()
    page.wait_for_function("document.querySelector('#result-clip video')?.videoWidth === 128", timeout=LAST)
    assert page.said == []
    page.locator("#clip").get_by_label("Clear").click()
    page.locator("#clip input[type=file]").set_input_files(folder / "text.mp4")
    page.locator("#clip video").wait_for()
    page.locator("#compare").click()
    page.locator("#summary", has_text="text.mp4 is not a readable video").wait_for()


def test_two_sessions_keep_their_own(page, browser, address: str) -> None:
    other = browser.new_page()
    other.goto(address)
    tile(other, "96 → 24")
    other.get_by_label("range slider for Keep ratio").fill("0.75")
    page.get_by_label("range slider for Keep ratio").fill("0.5")
    for each in (other, page):
        each.locator("#compare").click()
    tile(other, "96 → 72")
    tile(page, "96 → 48")
    assert page.get_by_label("range slider for Keep ratio").input_value() == "0.5"
    other.close()


def test_dark_and_light_are_both_met(browser, address: str) -> None:
    backgrounds = set()
    for theme in ("light", "dark"):
        page = browser.new_page()
        page.goto(f"{address}?__theme={theme}")
        page.wait_for_selector(".tiles")
        backgrounds.add(page.locator(".tiles > div").last.evaluate("tile => getComputedStyle(tile).backgroundColor"))
        page.close()
    assert len(backgrounds) == 2
