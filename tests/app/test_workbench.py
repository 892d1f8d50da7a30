"""What the page computes: each task compared, settings as controls and as Python, refusals in words, sessions apart."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from cli_models import save_models
from model_parts import PATCH, SQUARE
from models import CASES
from PIL import Image

from ailurus_hf import AiluRusConfig, ailurus_status
from ailurus_hf.app import Workbench, open_workbench
from ailurus_hf.app.controls import SAVED, Controls, Preset
from ailurus_hf.app.workbench import LONGEST, MOST_FRAMES
from ailurus_hf.errors import AiluRusError
from ailurus_hf.evaluation.bad_input import BadInputError
from ailurus_hf.presets import VISION_PRESETS
from ailurus_hf.video import open_clip, write_video
from ailurus_hf.visualization import class_palette, overlay_labels

SIDE = SQUARE[0] * PATCH
SIZE = {"height": SIDE, "width": SIDE}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("models"))
    CASES["DepthAnything"].make().save_pretrained(folder / "depth")
    hf.DPTImageProcessor(size=SIZE).save_pretrained(folder / "depth")
    CASES["YOLOS"].make().save_pretrained(folder / "detect")
    hf.YolosImageProcessor(size={"height": 32, "width": 48}).save_pretrained(folder / "detect")
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    return tmp_path / "street.png"


def bench_of(models: Path, name: str) -> Workbench:
    return Workbench(open_workbench(str(models / name)).loaded, repeats=1)


@pytest.mark.parametrize("name", ["segmenter", "vit", "depth", "detect"])
def test_an_image_is_compared_and_the_python_does_the_same(
    name: str, models: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(models, name)
    controls = bench.start._replace(keep_ratio=0.5, location=1, clustering="local_kmeans")
    found = bench.compare(photo, controls)
    tokens, kept = found.result["tokens"]
    assert kept == round(0.5 * tokens) and 0 <= found.result["agreement"] <= 1 and found.told
    assert found.image.plain.picture.size == found.image.reduced.picture.size
    titles = [panel.title for panel in found.image.panels]
    assert f"{tokens} tokens in {kept} clusters" in titles and "image" not in titles
    assert "0.5 after layer 1, local_kmeans" in found.setting and not ailurus_status(bench.loaded.model).active
    monkeypatch.chdir(photo.parent)
    names: dict = {}
    exec(compile(found.python, "copied", "exec"), names)
    location = ailurus_status(names["model"]).locations[0]
    assert (location.location, location.num_tokens, location.num_clusters) == (1, tokens, kept)
    assert names["model"].config.architectures == bench.loaded.model.config.architectures
    if name == "segmenter":
        drawn = overlay_labels(Image.open(photo), names["labels"], class_palette(bench.loaded.class_names()))
        assert drawn == found.image.reduced.picture


def test_controls_start_with_what_suits_the_task(models: Path) -> None:
    assert bench_of(models, "segmenter").start == Controls("dense", 0.25, 2, "ward", "smooth")
    assert bench_of(models, "depth").start.restore == "residual"
    vit = bench_of(models, "vit")
    assert vit.start == Controls("classification", 0.37, 1, "pairs", "copy") and vit.last_location == 3
    vit.loaded.model.config.ailurus_config = AiluRusConfig(cluster_location=3, keep_ratio=0.7).to_dict()
    saved = Workbench(vit.loaded)
    assert saved.start == Controls(SAVED, 0.7, 3, "local_kmeans", "residual")
    assert list(saved.presets)[1:] == ["classification", *(n for n in VISION_PRESETS if n != "classification")]


@pytest.mark.parametrize("name", VISION_PRESETS)
def test_a_preset_is_itself_until_something_is_changed(name: str) -> None:
    preset = Preset(name, AiluRusConfig.preset(name))
    start = preset.controls()
    if name == "paper":  # its number of clusters is a share here
        assert preset.config_of(start) == AiluRusConfig.preset("paper", keep_ratio=0.25)
    else:
        assert preset.config_of(start) == preset.config
        assert preset.expression(start) == f'AiluRusConfig.preset("{name}")'
    for changed in (
        start._replace(keep_ratio=0.4),
        start._replace(location=3),
        start._replace(clustering="local_kmeans"),
        start._replace(restore="residual"),
    ):
        config = preset.config_of(changed)
        assert eval(preset.expression(changed), {"AiluRusConfig": AiluRusConfig}) == config
        assert Preset(name, config).controls() == changed


def test_saved_settings_are_written_as_python() -> None:
    config = AiluRusConfig(cluster_location=(1, 3), keep_ratio=(0.6, 0.5), clustering={"name": "ward"}, restore="copy")
    preset = Preset(SAVED, config)
    for controls in (preset.controls(), preset.controls()._replace(keep_ratio=0.3)):
        again = eval(preset.expression(controls), {"AiluRusConfig": AiluRusConfig})
        assert again.to_dict() == preset.config_of(controls).to_dict()


def refused(bench: Workbench, path: Path, **changed: object) -> str:
    with pytest.raises(AiluRusError) as raised:
        bench.compare(path, bench.start._replace(**changed))
    assert str(path.parent) not in str(raised.value), "where the page keeps the file is nobody's business"
    return str(raised.value)


def test_bad_files_and_settings_are_refused_in_words(models: Path, photo: Path, tmp_path: Path) -> None:
    bench = bench_of(models, "segmenter")
    (tmp_path / "text.png").write_text("no picture")
    assert refused(bench, tmp_path / "text.png").startswith("text.png is not a readable image")
    (tmp_path / "empty.png").touch()
    assert "the file is empty" in refused(bench, tmp_path / "empty.png")
    Image.fromarray(np.full((32, 32), 900, np.uint16)).save(tmp_path / "dark.png")
    assert "16-bit values go up to 900" in refused(bench, tmp_path / "dark.png")
    Image.new("1", (16000, 16000)).save(tmp_path / "huge.png")
    assert "exceeds limit" in refused(bench, tmp_path / "huge.png")
    assert "no preset" in refused(bench, photo, preset="best")
    assert "clustering" in refused(bench, photo, clustering="none")
    assert "keep_ratio" in refused(bench, photo, keep_ratio=0.0)
    assert not ailurus_status(bench.loaded.model).active


def test_16_bits_and_large_images_are_brought_to_what_the_page_shows(models: Path, tmp_path: Path) -> None:
    bench = bench_of(models, "vit")
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(tmp_path / "deep.png")
    assert bench.compare(tmp_path / "deep.png", bench.start).note == ""
    Image.new("RGB", (3 * LONGEST, 60), "red").save(tmp_path / "wide.png")
    assert bench.compare(tmp_path / "wide.png", bench.start).note == (
        f"scaled down from {3 * LONGEST}×60 to {LONGEST}×20 pixels"
    )


def test_an_image_with_too_few_tokens_is_told(models: Path, photo: Path) -> None:
    found = bench_of(models, "segmenter")
    told = found.compare(photo, found.start._replace(keep_ratio=1.0)).told
    assert told == ["nothing was reduced: the image has no more tokens than are kept"]


def test_a_clip_is_written_with_both_predictions(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="clips need imageio-ffmpeg")
    frames = [Image.effect_noise((64, 48), 90).convert("RGB") for _ in range(4)]
    write_video(tmp_path / "walk.mp4", frames, 8)
    for name in ("segmenter", "depth"):
        bench, counted = bench_of(models, name), []
        controls = bench.start._replace(keep_ratio=0.5)
        found = bench.compare_clip(tmp_path / "walk.mp4", controls, 3, tmp_path / f"{name}.mp4", counted.append)
        assert counted == [1, 2, 3] and found.frames == 3
        written = open_clip(found.file)
        assert written.size[0] == 128 and written.fps == 8 and len(list(written)) == 3
        assert found.result["tokens"][1] == round(0.5 * found.result["tokens"][0]) and found.python and found.told
    assert not ailurus_status(bench.loaded.model).active


def test_bad_clips_are_refused_in_words(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="clips need imageio-ffmpeg")
    (tmp_path / "text.mp4").write_text("no clip")
    bench = bench_of(models, "segmenter")
    with pytest.raises(AiluRusError, match=r"^text\.mp4 is not a readable video"):
        bench.compare_clip(tmp_path / "text.mp4", bench.start, MOST_FRAMES, tmp_path / "out.mp4")
    vit = bench_of(models, "vit")
    with pytest.raises(AiluRusError, match="give it images"):
        vit.compare_clip(tmp_path / "text.mp4", vit.start, 1, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_two_sessions_do_not_disturb_each_other(models: Path, photo: Path) -> None:
    bench = bench_of(models, "segmenter")
    chosen = [bench.start._replace(keep_ratio=keep, clustering="local_kmeans") for keep in (0.25, 0.75)]
    alone = [bench.compare(photo, controls) for controls in chosen]
    together: list[list] = [[], []]

    def session(number: int) -> None:
        for _ in range(4):
            together[number].append(bench.compare(photo, chosen[number]))

    threads = [threading.Thread(target=session, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for before, found in zip(alone, together, strict=True):
        assert len(found) == 4
        for each in found:
            assert each.result["tokens"] == before.result["tokens"]
            for side in ("plain", "reduced"):
                assert getattr(each.image, side).picture == getattr(before.image, side).picture


def test_models_that_have_nothing_to_show_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    hf.ViTModel(config).save_pretrained(tmp_path / "encoder")
    hf.ViTImageProcessor().save_pretrained(tmp_path / "encoder")
    with pytest.raises(BadInputError, match="no head whose output can be shown"):
        open_workbench(str(tmp_path / "encoder"))
    monkeypatch.setattr("ailurus_hf.app.serving.SHIPPED", tmp_path / "nowhere")
    with pytest.raises(BadInputError, match="--model is needed"):
        open_workbench()


def test_it_needs_no_gradio() -> None:
    code = """
import sys
sys.modules["gradio"] = None
import ailurus_hf.app
from ailurus_hf.cli import main
sys.exit(main(["app"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert 'pip install "ailurus-hf[app]"' in done.stderr
