"""Every task's command on a model of its kind: what it writes and prints, compared with plain, scored by labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from cli_models import run_json, save_task_models
from model_parts import PATCH, SQUARE
from models import CASES
from PIL import Image
from transformers import PreTrainedTokenizerFast

from ailurus_hf import AiluRusConfig
from ailurus_hf.cli import main
from ailurus_hf.evaluation.average_precision import average_precision
from ailurus_hf.evaluation.boxes import Boxes, Truth, box_agreement
from ailurus_hf.evaluation.depth import colorize_depth, depth_range, to_16_bits
from ailurus_hf.evaluation.verdict import verdict

SIDE = SQUARE[0] * PATCH
SIZE = {"height": SIDE, "width": SIDE}
ARCHITECTURES = {"depth": "DepthAnything", "detect": "YOLOS", "segment": "EoMT"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = tmp_path_factory.mktemp("models")
    save_task_models(folder)
    CASES["EoMT"].make().save_pretrained(folder / "segment")
    hf.EomtImageProcessor(size={"shortest_edge": SIDE, "longest_edge": SIDE}, do_pad=True).save_pretrained(
        folder / "segment"
    )
    CASES["CLIPModel"].make().save_pretrained(folder / "clip")
    hf.CLIPImageProcessor(size=SIZE, crop_size=SIZE).save_pretrained(folder / "clip")
    words = {word: i for i, word in enumerate(["<pad>", "This", "is", "a", "photo", "of", "cat", "dog", "</s>"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder / "clip"
    )
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for seed, name in enumerate("ab"):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"images/{name}.png")


def given(command: str, models: Path, *options: str) -> list[str]:
    return [command, "images", "--model", str(models / command), "--output", "out", *options]


FILES = {
    "depth": ("_depth.png", "_color.png"),
    "detect": ("_boxes.json", "_boxes.png"),
    "segment": ("_labels.png", "_overlay.png"),
}


@pytest.mark.parametrize("command", FILES)
def test_every_task_writes_its_results_and_resumes(
    command: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, *given(command, models, "--keep-ratio", "0.5"))
    assert len(found["images"]) == 2 and found["took"]["tokens"][0] > found["took"]["tokens"][1] > 0
    together = {"detections.json", "detections_images.json"} if command == "detect" else set()
    expected = {f"{x}{kind}" for x in "ab" for kind in FILES[command]} | together
    assert {path.name for path in Path("out").iterdir()} == expected
    assert main(given(command, models, "--keep-ratio", "0.5")) == 2
    assert len(run_json(capsys, *given(command, models, "--keep-ratio", "0.5", "--resume"))["skipped"]) == 2
    assert main(given(command, models, "--overwrite", "--batch-size", "2")) == 0
    streams = capsys.readouterr()
    assert streams.out.startswith("images/a.png: ") and " tokens" in streams.err and "2 images" in streams.err


@pytest.mark.parametrize("command", FILES)
def test_compare_tells_times_agreement_and_a_verdict(
    command: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, *given(command, models, "--compare", "--repeats", "1", "--keep-ratio", "1"))
    assert found["all"]["agreement"] == 1 and found["all"]["speedup"] > 0
    assert "tokens" in found["verdict"][0]
    assert {path.name for path in Path("out").iterdir()} == {"a_comparison.png", "b_comparison.png"}
    assert main(given(command, models, "--compare", "--repeats", "1", "--overwrite")) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:5] == ["image", "off", "ms", "on", "ms"]


@pytest.mark.parametrize("command", [*FILES, "classify"])
def test_a_report_is_a_page_of_all_images(
    command: str, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ailurus_hf.visualization.report.MOST_IMAGES", 1)
    words = {"segment": "where they differ", "depth": "of the range", "detect": ">boxes<", "classify": ">likeliest<"}
    if command == "classify":
        arguments = ["classify", "images", "--model", str(models / "clip"), "--labels-text", "a cat", "a dog"]
    else:
        arguments = given(command, models)
    arguments += ["--compare", "--repeats", "1", "--report", "new/report.html", "--keep-ratio", "0.5"]
    assert main(arguments) == 0
    assert "report: new/report.html, 1 of 2 images" in capsys.readouterr().out
    page = Path("new/report.html").read_text(encoding="utf-8")
    assert page.count('<div class="slider"') == 1 and "The first 1 of 2 images are shown" in page
    for text in (
        words[command],
        "→",
        "agreement",
        "0.5 after layer",
        "tokens that a cluster stands for",
        "AiluRus on:",
    ):
        assert text in page
    assert main([*arguments, "--output", "other"]) == 2 and "is there already" in capsys.readouterr().err
    found = run_json(capsys, *arguments, "--output", "other", "--overwrite")
    assert found["report"] == "new/report.html"


def test_scores_are_in_the_report(models: Path) -> None:
    Path("labels.csv").write_text("a.png,a cat\nb.png,a dog\n")
    arguments = ["classify", "images", "--model", str(models / "clip"), "--labels-text", "a cat", "a dog", "--compare"]
    assert main([*arguments, "--repeats", "1", "--labels", "labels.csv", "--report", "report.html"]) == 0
    assert "<dt>accuracy</dt>" in Path("report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--report", "report.html"], "--report is for --compare"),
        (["--compare", "--resume", "--report", "report.html"], "do not go together"),
        (["--compare", "--report", "images"], "images is a folder"),
    ],
)
def test_a_report_that_cannot_be_is_refused(
    options: list[str], told: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*given("depth", models), *options]) == 2
    assert told in capsys.readouterr().err


def test_several_processes_write_no_report(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*given("depth", models), "--compare", "--report", "report.html"]) == 2
    assert "one process, and 2 were started" in capsys.readouterr().err


def test_depth_of_16_bits_is_the_models(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, *given("depth", models, "--no-ailurus"))
    limits = found["images"][0]["depth"]
    model = hf.AutoModelForDepthEstimation.from_pretrained(models / "depth").eval()
    processor = hf.AutoImageProcessor.from_pretrained(models / "depth")
    with torch.no_grad():
        outputs = model(**processor(images=Image.open("images/a.png"), return_tensors="pt"))
    depth = processor.post_process_depth_estimation(outputs, target_sizes=[(32, 48)])[0]["predicted_depth"].numpy()
    written = np.asarray(Image.open("out/a_depth.png"))
    assert written.dtype == np.uint16 and written.shape == (32, 48)
    again = limits["low"] + written / 65535 * (limits["high"] - limits["low"])
    assert np.abs(again - depth).max() <= (limits["high"] - limits["low"]) / 65535


def test_depths_in_meters_are_millimeters() -> None:
    depth = np.array([[0.5, 1.25]], np.float32)
    assert np.asarray(to_16_bits(depth, depth_range(depth, metric=True))).tolist() == [[500, 1250]]
    assert depth_range(depth * 100, metric=True).metric is False
    assert np.asarray(colorize_depth(depth, 0.5, 1.25)).tolist() == [[[68, 1, 84], [253, 231, 37]]]


def test_one_file_of_all_boxes_is_as_coco_reads_it(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("images/b.png").rename("images/000139.png")
    Path("images/bad.png").write_text("no image")
    assert main(given("detect", models, "--threshold", "0")) == 1
    written, images = (json.loads(Path(f"out/detections{end}.json").read_text()) for end in ("", "_images"))
    names = {image["id"]: image["file_name"] for image in images["images"]}
    assert names == {1: "000139.png", 2: "a.png"}
    categories = {category["id"]: category["name"] for category in images["categories"]}
    for name, file in zip(("000139", "a"), (1, 2), strict=True):
        alone = json.loads(Path(f"out/{name}_boxes.json").read_text())
        mine = [box for box in written if box["image_id"] == file]
        assert [{**box, "image_id": f"{name}.png", "category": categories[box["category_id"]]} for box in mine] == alone
    before = Path("out/detections.json").read_bytes()
    Path("out/a_boxes.png").unlink()
    assert main(given("detect", models, "--threshold", "0", "--resume")) == 1
    assert Path("out/detections.json").read_bytes() == before
    for path in Path("out").glob("*_boxes.*"):
        path.unlink()
    for options in ([], ["--resume"]):
        assert main(given("detect", models, "--threshold", "0", *options)) == 2
    assert Path("out/detections.json").read_bytes() == before
    capsys.readouterr()
    Path("images/a.png").rename("images/7.png")
    Path("images/bad.png").unlink()
    run_json(capsys, *given("detect", models, "--overwrite"))
    ids = [image["id"] for image in json.loads(Path("out/detections_images.json").read_text())["images"]]
    assert ids == [139, 7]


def test_cocos_own_evaluation_reads_it(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="needs pycocotools")
    run_json(capsys, *given("detect", models, "--threshold", "0"))
    truth = coco.COCO()
    truth.dataset = json.loads(Path("out/detections_images.json").read_text()) | {"annotations": []}
    truth.createIndex()
    assert len(truth.loadRes("out/detections.json").anns) == 10


def test_boxes_are_those_of_the_model(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, *given("detect", models, "--no-ailurus", "--threshold", "0"))
    written = json.loads(Path("out/a_boxes.json").read_text())
    assert written == found["images"][0]["boxes"] and len(written) == 5
    assert all(x >= 0 and x + w <= 48.01 for x, _, w, _ in (box["bbox"] for box in written))
    assert [box["score"] for box in written] == sorted((box["score"] for box in written), reverse=True)
    # The model's own boxes as the truth: nothing is missed.
    names = sorted({(box["category_id"], box["category"]) for box in written})
    truth = {
        "images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate("ab")],
        "categories": [{"id": 10 + number, "name": name} for number, name in names],
        "annotations": [
            {"image_id": i, "category_id": 10 + box["category_id"], "bbox": box["bbox"]}
            for i, name in enumerate("ab")
            for box in json.loads(Path(f"out/{name}_boxes.json").read_text())
            if (box["category_id"], box["category"]) in names
        ],
    }
    Path("truth.json").write_text(json.dumps(truth))
    options = ["--compare", "--repeats", "1", "--labels", "truth.json", "--keep-ratio", "1"]
    summary = run_json(capsys, *given("detect", models, *options))["all"]
    assert summary["plain_ap"] == summary["reduced_ap"] > 0.9
    assert main(given("detect", models, "--compare", "--overwrite", "--labels", "images/a.png")) == 2


def test_average_precision_of_known_cases() -> None:
    corners = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], float)
    truth = [Truth(corners, np.array([0, 0]), np.zeros(2, bool))]
    assert average_precision([Boxes(corners, np.array([0, 0]), np.array([0.9, 0.8]))], truth) == pytest.approx(1)
    assert average_precision([Boxes(corners, np.array([1, 1]), np.array([0.9, 0.8]))], truth) == 0
    # One of two found: recall 0.5 at precision 1, which is 51 of 101 recalls.
    half = [Boxes(corners[:1], np.array([0]), np.array([0.9]))]
    assert average_precision(half, truth) == pytest.approx(51 / 101)
    # An overlap of 0.8 counts at 7 of the 10 overlaps: 0.5, 0.55, ... 0.8.
    near = [Boxes(np.array([[0, 0, 10, 8.0001], [20, 0, 30, 8.0001]]), np.array([0, 0]), np.array([0.9, 0.8]))]
    assert average_precision(near, truth) == pytest.approx(0.7)
    # A box in a crowd is no error, nor is a missed crowd.
    crowd = [Truth(corners, np.array([0, 0]), np.array([False, True]))]
    inside = Boxes(np.array([[0, 0, 10, 10], [21, 1, 24, 4]], float), np.array([0, 0]), np.array([0.5, 0.9]))
    assert average_precision([inside], crowd) == pytest.approx(1)
    assert average_precision(half, [Truth(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))]) is None


def test_agreement_of_boxes() -> None:
    corners = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], float)
    both = Boxes(corners, np.array([0, 1]), np.array([0.9, 0.8]))
    none = both.above(1.0)
    assert box_agreement(both, both) == 1 == box_agreement(none, none) and box_agreement(both, none) == 0
    assert box_agreement(both, both.above(0.85)) == pytest.approx(2 / 3)
    assert box_agreement(both, both._replace(labels=np.array([1, 0]))) == 0


def test_clip_classifies_by_texts(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["classify", "images", "--model", str(models / "clip")]
    found = run_json(capsys, *arguments, "--labels-text", "a cat", "a dog", "--no-ailurus")
    scores = found["images"][0]["scores"]
    model = hf.CLIPModel.from_pretrained(models / "clip").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(models / "clip")
    texts = tokenizer(["This is a photo of a cat.", "This is a photo of a dog."], padding=True, return_tensors="pt")
    pixels = hf.AutoImageProcessor.from_pretrained(models / "clip")(images=Image.open("images/a.png"))
    with torch.no_grad():
        out = model(
            input_ids=texts.input_ids,
            attention_mask=texts.attention_mask,
            pixel_values=torch.tensor(np.array(pixels.pixel_values)),
        )
    expected = out.logits_per_image[0].softmax(0)
    assert scores["a cat"] == pytest.approx(float(expected[0]), abs=2e-4)
    assert found["ailurus"] is None
    assert run_json(capsys, *arguments, "--labels-text", "a cat", "a dog", "--keep-ratio", "0.5")["ailurus"]["active"]
    assert main(arguments) == 2 and "--labels-text gives them" in capsys.readouterr().err
    assert main(["status", "--model", str(models / "clip")]) == 0


def test_classify_is_compared_and_scored(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["classify", "images", "--model", str(models / "clip"), "--labels-text", "a cat", "a dog"]
    arguments += ["--compare", "--repeats", "1", "--keep-ratio", "1"]
    Path("labels.csv").write_text("file,class\na.png,a cat\nb.png,0\n")
    cats = run_json(capsys, *arguments, "--labels", "labels.csv")["all"]
    Path("labels.csv").write_text("file,class\na.png,A DOG\nb.png,1\n")
    dogs = run_json(capsys, *arguments, "--labels", "labels.csv")["all"]
    assert cats["plain_accuracy"] + dogs["plain_accuracy"] == 1 and cats["agreement"] == 1
    Path("labels.csv").write_text("a.png,a cat\nb.png,a horse\n")
    assert main([*arguments, "--labels", "labels.csv"]) == 1
    assert "'a horse', is no class of the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "model", "told"),
    [
        ("segment", "depth", "DepthAnythingForDepthEstimation, which estimates depth: `ailurus-hf depth` runs it"),
        ("depth", "detect", "`ailurus-hf detect` runs it"),
        ("detect", "segment", "`ailurus-hf segment` runs it"),
        ("classify", "depth", "`ailurus-hf depth` runs it"),
        ("segment", "clip", "status, visualize and benchmark run it"),
    ],
)
def test_a_wrong_task_names_the_right_command(
    command: str, model: str, told: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "images", "--model", str(models / model)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("model", ["depth", "detect", "segment", "clip"])
def test_status_visualize_and_benchmark_run_every_model(
    model: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = ["--model", str(models / model)]
    assert main(["status", *name]) == 0
    assert main(["visualize", "images", *name, "--output", "out"]) == 0
    capsys.readouterr()
    found = run_json(capsys, "benchmark", "images", *name, "--methods", "paper", "--keep", "0.5", "--repeats", "1")
    assert len(found["rows"]) == 2 and found["rows"][1]["cosine"] <= 1 and "few" in " ".join(found["verdict"])


def test_saved_settings_are_taken_from_a_file(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AiluRusConfig(cluster_location=1, keep_ratio=0.25, clustering="ward", restore="smooth")
    config.save("tuned.json")
    Path("within.json").write_text(json.dumps({"version": 1, "config": config.to_dict()}))
    for file in ("tuned.json", "within.json"):
        found = run_json(capsys, "status", "--model", str(models / "depth"), "--config", file)["ailurus"]["config"]
        assert (found["cluster_location"], found["keep_ratio"], found["restore"]) == (1, 0.25, "smooth")
    status = ["status", "--model", str(models / "depth"), "--config", "tuned.json"]
    assert run_json(capsys, *status, "--num-clusters", "9")["ailurus"]["config"]["num_clusters"] == 9
    for options, told in (
        (["--preset", "dense"], "do not go together"),
        (["--no-ailurus"], "--no-ailurus and --config"),
    ):
        assert main([*status, *options]) == 2 and told in capsys.readouterr().err
    Path("tuned.json").write_text("[1]")
    assert main(status) == 2 and "must hold an object" in capsys.readouterr().err
    assert main([*status[:-1], "nowhere.json"]) == 2 and "cannot read --config" in capsys.readouterr().err


def test_what_a_verdict_says() -> None:
    assert verdict(4096, 1.5) == [] == verdict(0)
    assert "0.80x" in verdict(4096, 0.8)[0] and "smaller keep ratio" in verdict(4096, 0.8)[1]
    assert "196 tokens are too few" in verdict(196, 0.8)[0] and "larger images" in verdict(196, 0.8)[1]
    assert "196 tokens are few" in verdict(196)[0]
