"""The page with sliders: one file that needs no network, bounded in size, and in a browser a handle that moves."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import chromium
from PIL import Image

from ailurus_hf.visualization import ComparedImage, LegendEntry, Panel, comparison_page
from ailurus_hf.visualization.report import MOST_IMAGES

RED, BLUE = Image.new("RGB", (200, 100), (200, 0, 0)), Image.new("RGB", (200, 100), (0, 0, 200))
LEGEND = (LegendEntry((128, 64, 128), "road"), LegendEntry((25, 25, 25), "neither", striped=True))


def compared(name: str = "street.jpg") -> ComparedImage:
    return ComparedImage(
        name,
        Panel("off: 732 ms", RED, legend=LEGEND),
        Panel("on: 282 ms", BLUE),
        [Panel("clusters", Image.effect_noise((90, 60), 90), "2700 to 675")],
        [("time", "732 ms", "282 ms"), ("speed-up", "", "2.60×")],
    )


def page_of(*names: str, **fields: object) -> str:
    return comparison_page(map(compared, names), title="Segmenter: off and on", **fields)  # type: ignore[arg-type]


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_pictures_numbers_and_words_are_in_the_page() -> None:
    page = page_of("a.jpg", "b.jpg", setting="0.25 after layer 2", summary=[("as fast", "2.60×")], footer="the end")
    assert len(pictures(page)) == 6 and page.count("<img ") == page.count(' alt="') == 6
    for text in ("0.25 after layer 2", "2.60×", "732 ms", "2700 to 675", "the end", 'href="#image-2"', ">road<"):
        assert text in page
    assert 'aria-label="Divide between off and on: a.jpg"' in page
    first, second, noise = pictures(page)[:3]
    assert (first.format, second.format, noise.size) == ("PNG", "PNG", (90, 60))
    assert first.convert("RGB").getpixel((0, 0)) == (200, 0, 0)


def test_the_page_needs_no_other_file_and_no_network() -> None:
    page = page_of("a.jpg")
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)|url\(["']?([^"')]*)""", page)
    assert all(address.startswith(("data:", "#")) for pair in addresses for address in pair if address)
    assert "default-src 'none'" in page and "@import" not in page


def test_names_are_no_markup() -> None:
    page = page_of("<b>&\"'.jpg", "b.jpg")
    assert "<b>" not in page and "&lt;b&gt;&amp;" in page


def test_a_page_is_bounded() -> None:
    names = [f"{number}.jpg" for number in range(MOST_IMAGES + 3)]
    page = page_of(*names)
    assert page.count("<section ") == MOST_IMAGES
    assert f"The first {MOST_IMAGES} of {MOST_IMAGES + 3} images are shown" in page
    assert "images are shown" not in page_of("a.jpg")
    large = Panel("off", Image.effect_noise((3000, 1500), 90))
    page = comparison_page([ComparedImage("a.jpg", large, large, [large])], title="large")
    assert [picture.size for picture in pictures(page)] == [(1024, 512), (1024, 512), (768, 384)]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser, tmp_path: Path):
    """Opens a page of two images; what the console says and what is asked for stands in its lists."""

    def open_page(**context):
        file = tmp_path / "report.html"
        file.write_text(page_of("a.jpg", "b.jpg", summary=[("as fast", "2.60×")]), encoding="utf-8")
        page = browser.new_context(**context).new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url[:5]))
        page.goto(file.as_uri())
        return page

    return open_page


def color_at(page, share: float) -> tuple[int, ...]:
    """Of the first slider, near its lower edge."""
    shot = Image.open(io.BytesIO(page.locator(".slider").first.screenshot()))
    return shot.convert("RGB").getpixel((int(share * shot.width), int(0.9 * shot.height)))


def test_the_handle_moves_by_keyboard_and_changes_what_is_shown(opened) -> None:
    page = opened()
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert color_at(page, 0.45) == (200, 0, 0) and color_at(page, 0.55) == (0, 0, 200)
    page.keyboard.press("Tab")  # the links of the contents come first
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.type") == "range"
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')") == "60 % off, 40 % on"
    assert color_at(page, 0.55) == (200, 0, 0) and color_at(page, 0.65) == (0, 0, 200)
    page.keyboard.press("Home")
    assert color_at(page, 0.1) == (0, 0, 200)
    assert page.said == [] and set(page.asked) <= {"file:", "data:"}


def test_the_handle_moves_by_mouse_and_goes_on_by_keyboard(opened) -> None:
    page = opened()
    page.locator(".slider").first.scroll_into_view_if_needed()
    box = page.locator(".slider").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 0.3 * box["width"], y, steps=3)
    page.mouse.up()
    page.mouse.move(x - 0.3 * box["width"], y)  # released: it stays
    assert color_at(page, 0.75) == (200, 0, 0) and color_at(page, 0.85) == (0, 0, 200)
    page.keyboard.press("End")
    assert color_at(page, 0.9) == (200, 0, 0) and page.said == []


def test_the_handle_moves_by_touch(opened) -> None:
    page = opened(has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844})
    box = page.locator(".slider").first.bounding_box()
    page.touchscreen.tap(box["x"] + 0.2 * box["width"], box["y"] + box["height"] / 2)
    assert color_at(page, 0.15) == (200, 0, 0) and color_at(page, 0.35) == (0, 0, 200)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_dark_and_light_are_readable(opened) -> None:
    """WCAG's contrast of every text with what is behind it."""
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        found = page.evaluate(CONTRASTS)
        assert len(found) > 10 and min(found.values()) >= 4.5, {k: v for k, v in found.items() if v < 4.5}
    assert len(backgrounds) == 2


def test_without_scripts_both_pictures_are_there(opened) -> None:
    page = opened(java_script_enabled=False)
    one, other = (page.locator(f".{kind} img").first.bounding_box() for kind in ("before", "after"))
    assert other["y"] >= one["y"] + one["height"]


CONTRASTS = """() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const shares = numbers(color).map((value) => value / 255);
    const [r, g, b] = shares.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return numbers(color)[3] === 0 ? behind(element.parentElement) : color;
  };
  const found = {};
  for (const element of document.querySelectorAll("h1, h2, p, a, dt, dd, th, td, li, figcaption, small")) {
    if (!element.textContent.trim()) continue;
    const [low, high] = [getComputedStyle(element).color, behind(element)].map(luminance).sort((a, b) => a - b);
    found[element.tagName + " " + element.textContent] = (high + 0.05) / (low + 0.05);
  }
  return found;
}"""
