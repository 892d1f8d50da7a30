"""The command line: what each command writes and prints, and one line with exit code 2 for whatever cannot work."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_models import TINY, run_json, save_models
from PIL import Image
from transformers import BertConfig, ViTConfig, ViTImageProcessor, ViTModel

from ailurus_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor, config
from ailurus_hf.cli import build_parser, doctor, main
from ailurus_hf.cli.arguments import AILURUS_FIELDS
from ailurus_hf.evaluation.comparison import confusion, mean_iou
from ailurus_hf.segmenter import sliding_window_logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of odd sizes, their labels, a text file called .jpg, a cut-off PNG, and two tiny models."""
    folder = tmp_path_factory.mktemp("cli")
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for name, (height, width) in {"a": (37, 53), "b": (64, 40)}.items():
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        labels = generator.integers(0, 4, (height, width), dtype=np.uint8)  # 3 is unlabeled
        Image.fromarray(labels).save(folder / "labels" / f"{name}.png")
    (folder / "text.jpg").write_text("no image")
    whole = (folder / "images/b.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])

    save_models(folder)
    BertConfig().save_pretrained(folder / "bert")
    (folder / "empty").mkdir()
    (folder / "official").mkdir()
    (folder / "official/variant.yml").write_text("net_kwargs: {}")
    (folder / "official/text.pth").write_text("no weights")
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_a_shell_completes_commands_and_options(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    words = ("ailurus-hf dep", "ailurus-hf segment --keep-r", "ailurus-hf segment --restore sm")
    for line, want in zip(words, ("depth", "--keep-ratio", "smooth"), strict=True):
        given = f"COMP_WORDS=({line}); COMP_CWORD={line.count(' ')}; _shtab_ailurus_hf; echo ${{COMPREPLY[@]}}"
        found = subprocess.run(["bash", "-c", f"{script}\n{given}"], capture_output=True, text=True, check=True)
        assert want in found.stdout.split()


def test_segment_writes_label_maps_and_overlays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["segment", "images", "--model", "segmenter", "--keep-ratio", "0.5", "--output", str(tmp_path)]
    found = run_json(capsys, *arguments)
    assert [Path(image["image"]).name for image in found["images"]] == ["a.png", "b.png"]
    assert sum(found["images"][0]["classes"].values()) == pytest.approx(1, abs=1e-3)
    labels = np.asarray(Image.open(tmp_path / "a_labels.png"))
    assert labels.shape == (37, 53) and labels.max() < 3
    assert Image.open(tmp_path / "a_overlay.png").size == (53, 37)
    assert main([*arguments, "--overwrite"]) == 0
    assert "a.png: " in capsys.readouterr().out


def plain_labels(name: str) -> np.ndarray:
    model = SegmenterForSemanticSegmentation.from_pretrained("segmenter").eval()
    processor = SegmenterImageProcessor.from_pretrained("segmenter")
    image = Image.open(f"images/{name}.png")
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0].numpy()


def test_segment_without_ailurus_is_the_model_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["segment", "images/a.png", "--model", "segmenter", "--no-ailurus", "--output", str(tmp_path)]
    assert run_json(capsys, *arguments)["ailurus"] is None
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a_labels.png")), plain_labels("a"))


def test_compare_reports_times_agreement_and_miou(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["segment", "images", "--model", "segmenter", "--compare", "--labels", "labels", "--repeats", "1"]
    found = run_json(capsys, *arguments, "--num-clusters", "9", "--output", str(tmp_path))
    first = found["images"][0]
    assert first["tokens"] == [35, 9]  # 37×53 in patches of 8, padded: 5×7
    assert first["plain_ms"] > 0 and first["speedup"] == pytest.approx(
        first["plain_ms"] / first["reduced_ms"], abs=2e-3
    )
    assert 0 < first["agreement"] < 1 and 0 <= first["reduced_miou"] <= 1
    matrix = confusion(plain_labels("a"), np.asarray(Image.open("labels/a.png")).astype(int), 3)
    assert first["plain_miou"] == pytest.approx(mean_iou(matrix), abs=1e-5)
    assert set(found["all"]) == {"plain_ms", "reduced_ms", "speedup", "agreement", "plain_miou", "reduced_miou"}
    assert (tmp_path / "b_comparison.png").is_file()
    assert main([*arguments, "--output", str(tmp_path), "--overwrite"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["image", "off", "ms", "on", "ms", "speed-up", "agreement", "off", "mIoU", "on", "mIoU"]
    assert [line.split()[0] for line in table[1:4]] == ["a.png", "b.png", "all"]


def test_comparing_a_model_that_keeps_all_tokens_agrees_everywhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["segment", "images/a.png", "--model", "segmenter", "--compare", "--output", str(tmp_path)]
    found = run_json(capsys, *arguments, "--keep-ratio", "1", "--repeats", "1")
    assert found["all"]["agreement"] == 1
    assert found["images"][0]["plain_miou"] is None


BENCHMARK = ["benchmark", "images", "--repeats", "2", "--locations", "1", "--keep", "1", "0.5"]


@pytest.mark.parametrize(("model", "tokens"), [("segmenter", "40 → 20"), ("vit", "64 → 32")])
def test_benchmark_measures_every_setting(model: str, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*BENCHMARK, "--model", model, "--methods", "paper", "local-kmeans"]
    found = run_json(capsys, *arguments)
    assert found["num_images"] == 2 and found["model"] == model and found["ailurus"] is None
    assert found["measured_on"]["device"] and found["measured_on"]["versions"]["torch"] == torch.__version__
    plain, *rows = found["rows"]
    assert plain["method"] == "plain" and plain["speed_up"] == plain["ideal"] == plain["cosine"] == 1
    kept = [(row["method"], row["location"], row["keep"]) for row in rows]
    assert kept == [(method, 1, keep) for method in ("paper", "local-kmeans") for keep in (1, 0.5)]
    for row in rows:
        assert row["speed_up"] == pytest.approx(plain["ms"] / row["ms"], rel=1e-3)
        assert row["share"] == pytest.approx(row["speed_up"] / row["ideal"], rel=1e-3)
        if row["keep"] == 1:  # nothing is reduced: the same outputs
            assert (row["agreement"], row["ideal"], row["cosine"]) == (1, 1, pytest.approx(1))
        else:
            assert row["tokens"] == tokens and 1.2 < row["ideal"] < 2.5 and 0.1 < row["cosine"] < 0.99999
    assert main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 5 and table[0].startswith("| method | location | keep | tokens | ms | speed-up | ideal |")
    assert table[2].startswith("| plain | – | – | – |") and f"| paper | 1 | 0.5 | {tokens} |" in table[4]


def test_benchmark_of_a_backbone_and_of_windows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ViTModel(ViTConfig(**TINY, image_size=64)).save_pretrained(tmp_path / "backbone")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "backbone")
    row = run_json(capsys, *BENCHMARK, "--model", str(tmp_path / "backbone"))["rows"][2]
    assert row["agreement"] is None and row["cosine"] < 1
    assert main([*BENCHMARK, "--model", str(tmp_path / "backbone")]) == 0
    assert "| – |" in capsys.readouterr().out.splitlines()[3]
    model = SegmenterForSemanticSegmentation.from_pretrained("segmenter")
    model.save_pretrained(tmp_path / "windows")
    SegmenterImageProcessor(window_size=32, window_stride=16).save_pretrained(tmp_path / "windows")
    row = run_json(capsys, *BENCHMARK, "--model", str(tmp_path / "windows"))["rows"][2]
    (tmp_path / "one").mkdir()
    Image.open("images/b.png").crop((0, 0, 32, 32)).save(tmp_path / "one/window.png")
    whole = run_json(capsys, "benchmark", str(tmp_path / "one"), *BENCHMARK[2:], "--model", "segmenter")["rows"][2]
    assert row["tokens"] == whole["tokens"] == "16 → 8" and row["ideal"] == whole["ideal"] > 1


def test_classify_gives_the_best_classes(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "classify", "images/a.png", "--model", "vit", "--num-clusters", "16", "--top", "2")
    assert len(found["images"][0]["scores"]) == 2
    assert found["ailurus"] is not None
    assert main(["classify", "images", "--model", "vit"]) == 0
    assert capsys.readouterr().out.count("%") == 6


def test_visualize_draws_what_was_merged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for model, tokens in (("vit", 64), ("segmenter", 35)):
        arguments = ["visualize", "images/a.png", "--model", model, "--num-clusters", "9", "--fill", "distinct"]
        found = run_json(capsys, *arguments, "--output", str(tmp_path / model))
        assert found["images"][0]["tokens"] == [tokens, 9]
        assert all(Path(file).is_file() for file in found["images"][0]["files"])
    assert Image.open(tmp_path / "segmenter/a_assignment.png").size == (53, 37)


def test_status_tells_what_is_reduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--model", "vit", "--num-clusters", "16"]) == 0
    printed = capsys.readouterr().out
    assert "64" in printed and "16" in printed
    assert run_json(capsys, "status", "images/a.png", "--model", "vit", "--keep-ratio", "0.25")["ailurus"]


def test_the_configuration_saved_with_a_model_is_the_default(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    saved = json.loads((folder / "segmenter/config.json").read_text())
    saved["ailurus_config"] = {"cluster_location": 1, "num_clusters": 12}
    model = tmp_path / "model"
    model.mkdir()
    for file in (folder / "segmenter").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "config.json").write_text(json.dumps(saved))
    arguments = ["visualize", "images/a.png", "--model", str(model), "--output", str(tmp_path), "--overwrite"]
    assert run_json(capsys, *arguments)["images"][0]["tokens"] == [35, 12]
    assert run_json(capsys, *arguments, "--keep-ratio", "0.2")["images"][0]["tokens"] == [35, 7]


def test_doctor_finds_a_working_installation(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "doctor")
    assert found["self_check"]["ok"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert main(["doctor"]) == 0
    assert "self-check passed" in capsys.readouterr().out


def test_doctor_fails_where_reducing_does_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ailurus_hf.apply_ailurus", lambda model, config: model, raising=False)
    assert main(["doctor"]) == 1
    assert "self-check FAILED" in capsys.readouterr().out
    assert not doctor.report()["self_check"]["ok"]


SEGMENT = ["segment", "images/a.png", "--model", "segmenter"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["segment", "nowhere.jpg", "--model", "segmenter"], "nowhere.jpg"),
        (["segment", "x" * 300, "--model", "segmenter"], "File name too long"),
        (["segment", "empty", "--model", "segmenter"], "no image in folder empty"),
        (["segment", "images/a.png", "--model", "./nowhere"], "./nowhere"),
        (["segment", "images/a.png", "--model", "empty"], "no config.json"),
        (["segment", "images/a.png", "--model", "text.jpg"], "is a file"),
        (["segment", "images/a.png", "--model", "vit"], "AutoModelForSemanticSegmentation"),
        (["classify", "images/a.png", "--model", "segmenter"], "AutoModelForImageClassification"),
        (["visualize", "images/a.png", "--model", "bert"], "bert"),
        ([*SEGMENT, "--keep-ratio", "1.5"], "1.5"),
        ([*SEGMENT, "--keep-ratio", "0"], "got 0.0"),
        ([*SEGMENT, "--keep-ratio", "half"], "half"),
        ([*SEGMENT, "--num-clusters", "0"], "got 0"),
        ([*SEGMENT, "--num-clusters", "9", "--keep-ratio", "0.5"], "not allowed with"),
        ([*SEGMENT, "--cluster-location", "9"], "cluster_location 9"),
        ([*SEGMENT, "--restore-location", "1"], "restore_location"),
        ([*SEGMENT, "--clustering", "magic"], "magic"),
        ([*SEGMENT, "--labels", "labels"], "--compare"),
        ([*SEGMENT, "--compare", "--no-ailurus"], "nothing to compare"),
        ([*SEGMENT, "--no-ailurus", "--keep-ratio", "0.5"], "--keep-ratio"),
        ([*SEGMENT, "--output", "text.jpg"], "text.jpg"),
        ([*SEGMENT, "--device", "abacus"], "abacus"),
        ([*SEGMENT, "--repeats", "0"], "'0'"),
        ([*BENCHMARK, "--model", "vit", "--methods", "magic"], "no method 'magic'"),
        ([*BENCHMARK, "--model", "vit", "--locations", "9"], "cluster_location 9"),
        ([*BENCHMARK, "--model", "vit", "--keep", "1.5"], "1.5"),
        ([*BENCHMARK, "--model", "bert"], "bert"),
        (["benchmark", "empty", "--model", "vit"], "no image in folder empty"),
        (["convert-segmenter", "nowhere/nothing.pth", "out"], "nowhere"),
        (["convert-segmenter", "official/text.pth", "out"], "text.pth"),
        (["convert-segmenter", "official/text.pth", "text.jpg"], "text.jpg is a file"),
        (["teleport"], "teleport"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit:  # argparse's own refusals
        code = exit.code
    streams = capsys.readouterr()
    assert code == 2
    assert told in streams.err
    assert streams.err.count("\n") == 1, streams.err
    assert streams.out == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["segment", "text.jpg", "--model", "segmenter"], "text.jpg is not a readable image"),
        (["classify", "text.jpg", "--model", "vit"], "text.jpg is not a readable image"),
        (["visualize", "text.jpg", "--model", "vit"], "text.jpg is not a readable image"),
        (["benchmark", "cut.png", "--model", "vit"], "cut.png is not a readable image"),
        (["status", "cut.png", "--model", "vit"], "cut.png is not a readable image"),
        (["segment", "cut.png", "--model", "segmenter"], "cut.png is not a readable image"),
        ([*SEGMENT, "--compare", "--labels", "empty"], "empty/a.png"),
        ([*SEGMENT, "--compare", "--labels", "labels/b.png"], "[64, 40]"),
    ],
)
def test_an_input_that_fails_gets_one_line_and_exit_code_1(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    streams = capsys.readouterr()
    assert told in streams.err
    assert streams.err.count("\n") == 1, streams.err
    assert streams.out == ""


def test_what_is_no_image_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["segment", "images/a.png", "text.jpg", "--model", "./nowhere"]) == 2
    assert "text.jpg" in capsys.readouterr().err


def test_a_model_that_cannot_be_reached_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    start = time.perf_counter()
    assert main(["classify", "images/a.png", "--model", "some/model"]) == 2
    assert time.perf_counter() - start < 2
    assert "no model folder some/model" in capsys.readouterr().err


def test_no_traceback_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "ailurus_hf.cli", "classify", "text.jpg", "--model", "vit"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env={"PYTHONPATH": str(root), "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "ailurus-hf classify: error: text.jpg is not a readable image: cannot identify image file 'text.jpg'"
    ]


def test_the_choices_are_those_of_the_configuration() -> None:
    usage = build_parser()._subparsers._group_actions[0].choices["segment"].format_help()
    for choices in (config.CLUSTERINGS, config.RESTORES, config.RESTORES_AT):
        assert "{" + ",".join(choices) + "}" in usage
    assert {f"--{name.replace('_', '-')}" for name in AILURUS_FIELDS} <= set(re.findall(r"--[\w-]+", usage))


def test_windows_of_the_processor_are_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = SegmenterForSemanticSegmentation.from_pretrained("segmenter").eval()
    processor = SegmenterImageProcessor(window_size=32, window_stride=16)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["segment", "images/b.png", "--model", str(tmp_path / "model"), "--output", str(tmp_path)]
    found = run_json(capsys, *arguments, "--compare", "--repeats", "1", "--num-clusters", "9")
    assert found["images"][0]["tokens"] == [16, 9]  # of a window: 32×32 in patches of 8
    run_json(capsys, *arguments, "--no-ailurus")
    pixels = processor(images=Image.open("images/b.png"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        windows, whole = sliding_window_logits(model, pixels, 32, 16).argmax(1), model(pixels).logits.argmax(1)
    written = np.asarray(Image.open(tmp_path / "b_labels.png"))
    assert np.array_equal(written, windows[0].numpy()) and not np.array_equal(written, whole[0].numpy())


def test_help_needs_no_transformers() -> None:
    code = "import sys; from ailurus_hf.cli import build_parser; build_parser(); print('transformers' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(root), "PATH": ""}, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


def test_mean_iou_counts_the_classes_that_occur() -> None:
    truth = np.array([[0, 0, 1, 1, 255]])
    prediction = np.array([[0, 1, 1, 1, 2]])
    matrix = confusion(prediction, truth, 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert mean_iou(matrix) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert np.isnan(mean_iou(np.zeros((3, 3), dtype=int)))
