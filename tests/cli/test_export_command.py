"""`ailurus-hf export`: files that run elsewhere, checked against the model; what no file can hold is refused."""

from pathlib import Path

import pytest
import torch
from cli_models import run_json

from ailurus_hf.cli import export, main
from ailurus_hf.clustering import get_clustering
from ailurus_hf.clusters import TokenClusters, stable_argsort

REDUCED = ["--keep-ratio", "0.5", "--cluster-location", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("suffix", export.FORMATS)
def test_a_file_that_gives_the_models_outputs(suffix: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip({".onnx": "onnxruntime", ".xml": "openvino"}.get(suffix, "torch"))
    call = ["export", "--model", str(models / "vit"), "--output", f"out/vit{suffix}", "--dynamic-batch"]
    told = run_json(capsys, *call, *REDUCED)
    assert told["export"]["outputs"] == ["logits"] and told["export"]["difference"] < 1e-4
    assert told["ailurus"]["active"] and Path(f"out/vit{suffix}").is_file() and told["export"]["megabytes"] > 0
    run_file = export.READERS[export.FORMATS[suffix]](Path(f"out/vit{suffix}"))
    (logits,) = run_file(torch.rand(5, 3, 64, 64))
    assert logits.shape == (5, 3)
    assert main([*call, *REDUCED]) == 2 and "is there already" in capsys.readouterr().err


class Assignments(torch.nn.Module):
    """From images to the clusters of their pixels, by what sorts, scatters and counts past 255; and to orders of values
    many of which are equal."""

    OUTPUTS = ("ward", "density_peaks", "pairs", "ascending", "descending")

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = pixels.flatten(2).transpose(1, 2)
        made = [get_clustering(name)(tokens, (20, 18), 300) for name in self.OUTPUTS[:3]]
        values = tokens[..., 0].round()
        orders = [stable_argsort(values), stable_argsort(values, descending=True)]
        return (*(clusters.assignment for clusters in made), *orders)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the exporters' own code
@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_openvino_sorts_scatters_and_counts_as_torch_does(suffix: str) -> None:
    pytest.importorskip("openvino")
    pixels, path = torch.randn(3, 8, 20, 18, generator=torch.Generator().manual_seed(0)), Path(f"clusters{suffix}")
    export.WRITERS[export.FORMATS[suffix]](Assignments(), pixels[:1], path, Assignments.OUTPUTS, True)
    got = export.READERS["openvino"](path)(pixels)
    for name, want, each in zip(Assignments.OUTPUTS, Assignments()(pixels), got, strict=True):
        assert torch.equal(want, each), name


class Means(torch.nn.Module):
    """From images to the means of three clusters of their pixels, of which the last is empty."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
        tokens = pixels.flatten(2).transpose(1, 2)
        return (TokenClusters.from_assignment((tokens[..., 0] > 0).long(), 3).merge(tokens),)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of the exporters' own code
@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch-export"])
def test_the_last_clusters_may_be_empty(kind: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(kind, "torch"))
    pytest.importorskip({"openvino": "openvino"}.get(kind, "torch"))
    suffix = {kind: suffix for suffix, kind in export.FORMATS.items()}[kind]
    pixels, path = torch.randn(3, 8, 4, 6, generator=torch.Generator().manual_seed(0)), Path(f"means{suffix}")
    export.WRITERS[kind](Means(), pixels[:1], path, ["means"], True)
    torch.testing.assert_close(export.READERS[kind](path)(pixels)[0], Means()(pixels)[0])


def test_openvino_unmerges_smoothly_in_any_batch(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    call = ["export", "--model", str(models / "segmenter"), "--output", "segmenter.xml", "--dynamic-batch"]
    smooth = ["--restore", "smooth", "--restore-at", "decoder"]
    assert run_json(capsys, *call, *REDUCED, *smooth)["export"]["difference"] < 1e-4


def test_what_openvino_cannot_convert_is_told(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(export, "_openvino_extensions", lambda: [])
    call = ["export", "--model", str(models / "vit"), "--output", "vit.xml", "--clustering", "ward"]
    assert main([*call, *REDUCED]) == 2
    assert "OpenVINO cannot convert it: " in capsys.readouterr().err and not Path("vit.xml").exists()


def test_in_words_and_all_outputs_that_are_tensors(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", str(models / "segmenter"), "--output", "segmenter.pt2", *REDUCED]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("segmenter.pt2: torch-export, ") and lines[1] == "takes 1 × 3 × 64 × 64, gives logits"
    assert lines[2].startswith("on other images its outputs differ from the model's by ")


def test_a_file_that_gives_something_else_is_named(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = export.READERS["torch-export"]
    monkeypatch.setitem(export.READERS, "torch-export", lambda path: lambda x: [y + 1 for y in read(path)(x)])
    assert main(["export", "--model", str(models / "vit"), "--output", "vit.pt2", *REDUCED]) == 1
    assert "gives other outputs than the model" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_what_no_file_can_hold_is_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit = ["export", "--model", str(models / "vit")]
    for rest, message in (
        (["--output", "vit.txt"], "must end in .onnx, .pt2, .xml, got vit.txt"),
        (["--output", "vit.pt2", "--keep-ratio", "0.5", "--min-keep-ratio", "0.2"], "a file has one number"),
    ):
        assert main([*vit, *rest]) == 2 and message in capsys.readouterr().err
    assert not list(Path().iterdir())
