"""How settings are typed: presets, registered clusterings with their own settings, several locations."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from ailurus_hf import TokenClusters, __version__, register_clustering
from ailurus_hf.choices import CLUSTERING_CLASSES
from ailurus_hf.cli import build_parser, main, video
from ailurus_hf.cli.arguments import given_clustering, load
from ailurus_hf.clustering import Clustering, DensityPeaks
from ailurus_hf.config import AiluRusConfig
from ailurus_hf.evaluation.benchmark import method_fields

TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("settings")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY, image_size=64)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def stripes():
    @register_clustering("stripes")
    @dataclass(frozen=True)
    class Stripes(Clustering):
        width: int = 4
        output: float = 0.5  # as an option of the commands is called

        def cluster(self, features, grid, num_clusters):
            tokens = torch.arange(features.shape[1], device=features.device) // self.width
            return TokenClusters.from_assignment(
                tokens.clamp(max=num_clusters - 1).expand(len(features), -1), num_clusters
            )

    yield Stripes
    del CLUSTERING_CLASSES["stripes"]


def reduced(vit: str, *options: str) -> AiluRusConfig:
    args = build_parser(["status"]).parse_args(["status", "--model", vit, *options])
    return load(args, None).ailurus


def test_a_preset_is_that_of_the_library(vit: str) -> None:
    assert reduced(vit, "--preset", "classification") == AiluRusConfig.preset("classification")
    other = reduced(vit, "--preset", "dense", "--num-clusters", "16", "--restore", "copy")
    assert other == AiluRusConfig.preset("dense", num_clusters=16, restore="copy")


def test_several_locations(vit: str) -> None:
    config = reduced(vit, "--cluster-location", "1,3", "--keep-ratio", "0.65,0.37")
    assert (config.cluster_location, config.keep_ratio) == ((1, 3), (0.65, 0.37))


def test_settings_of_a_clustering(vit: str) -> None:
    options = ["--clustering", "density_peaks", "--num-spatial-neighbors", "20", "--alpha", "0.5"]
    assert reduced(vit, *options).clustering == DensityPeaks(alpha=0.5, num_spatial_neighbors=20)
    preset = reduced(vit, "--preset", "paper", "--num-density-neighbors", "3")
    assert preset.clustering == DensityPeaks(num_density_neighbors=3) and preset.num_clusters == 400


def test_a_clustering_registered_elsewhere_is_a_choice_with_its_options(
    vit: str, stripes: type, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--clustering", "stripes", "--width", "8"]
    assert reduced(vit, *options).clustering == stripes(width=8)
    assert main(["status", "--model", vit, *options]) == 0
    assert "64 → 32" in capsys.readouterr().out
    # In a command that has an option of a setting's name, the setting's has a longer one.
    arguments = ["visualize", "x.jpg", "--model", vit, "--output", "folder", "--clustering-output", "0.25"]
    args = build_parser(["visualize"]).parse_args(arguments)
    assert args.output == "folder" and given_clustering(args) == {"output": 0.25}
    assert method_fields("stripes-copy") == {"clustering": "stripes", "restore": "copy"}
    parser = argparse.ArgumentParser()
    video.add_arguments(parser)
    assert "stripes" in parser.format_help() and "--clustering-width" in parser.format_help()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--clustering", "pairs", "--alpha", "0.5"], "alpha is no setting of pairs"),
        (["--clustering", "density_peaks", "--alpha", "1.5"], "alpha"),
        (["--preset", "magic"], "magic"),
        (["--no-ailurus", "--preset", "dense"], "--no-ailurus and --preset"),
        (["--no-ailurus", "--alpha", "0.5"], "--no-ailurus and --alpha"),
        (["--keep-ratio", "0.5,half"], "'0.5,half' is not a number"),
        (["--cluster-location", "1,3"], "2 locations"),
    ],
)
def test_wrong_settings_get_one_line(
    vit: str, options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["status", "--model", vit, *options])
    except SystemExit as exit:
        code = exit.code
    streams = capsys.readouterr()
    assert code == 2 and told in streams.err, streams.err
    assert streams.err.count("\n") == 1 and streams.out == ""


def test_names_of_methods() -> None:
    assert method_fields("paper") == {"clustering": "density_peaks", "restore": "copy"}
    assert method_fields("local-kmeans") == {"clustering": "local_kmeans", "restore": "residual"}
    assert method_fields("local-kmeans-smooth") == {"clustering": "local_kmeans", "restore": "smooth"}
    assert method_fields("kmeans-copy") == {"clustering": "kmeans", "restore": "copy"}


def test_video_takes_the_names_of_other_commands() -> None:
    parser = argparse.ArgumentParser()
    video.add_arguments(parser)
    given = ["--model", "m", "--controlnet", "c", "--prompt", "p", "--video", "v", "--output", "o"]
    short = parser.parse_args([*given, "--keep-ratio", "0.25", "--clustering", "kmeans", "--num-rounds", "3"])
    long = parser.parse_args(
        [*given, "--ailurus-keep-ratio", "0.25", "--ailurus-clustering", "kmeans", "--ailurus-num-rounds", "3"]
    )
    assert vars(short) == vars(long) and short.ailurus_keep_ratio == 0.25


def test_help_of_all_commands_fits_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    for name, command in parser._subparsers._group_actions[0].choices.items():
        text = command.format_help()
        assert "==SUPPRESS==" not in text and len(text) > 50, name


def test_nothing_in_the_library_imports_the_command_line() -> None:
    for path in Path(__file__).parents[2].glob("ailurus_hf/**/*.py"):
        if "cli" not in path.parts:
            source = path.read_text()
            assert not any(word in source for word in ("from ..cli", "from .cli", "ailurus_hf.cli")), path


@pytest.mark.parametrize(
    ("word", "told"), [("segmnt", "did you mean segment?"), ("clasify", "did you mean classify?"), ("xyz", "there are")]
)
def test_a_command_that_is_not_there(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([word, "x.jpg"])
    told_line = capsys.readouterr().err
    assert exit.value.code == 2 and told in told_line and told_line.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"ailurus-hf {__version__}\n"
