"""What the README and the docs show runs: Python blocks in order, commands against the parser, links to files."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from ailurus_hf.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A tiny ViT with new weights, for the one on the Hub that the README loads."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor().save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_the_python_blocks_run_in_order(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # so that what the README writes is not left in the checkout
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block.replace("google/vit-base-patch16-224", str(stand_in)), "README.md", "exec"), names)
    assert "196" in capsys.readouterr().out  # the status table: 224² in patches of 16
    assert names["labels"].shape == names["street"].size[::-1]
    assert names["representatives"].shape == (2, 192, 64)


def test_the_commands_parse() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "ailurus-hf"
        build_parser().parse_args(arguments)


def test_every_command_is_shown() -> None:
    listed = re.search(r"\{(.*?)\}", build_parser().format_usage())
    commands = listed.group(1).split(",") if listed else [*build_parser()._subparsers._group_actions[0].choices]
    for command in commands:
        assert f"ailurus-hf {command}" in README, command


def test_the_field_table_is_the_configuration() -> None:
    from ailurus_hf import AiluRusConfig

    shown = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", README, re.MULTILINE))))
    assert shown <= set(AiluRusConfig.__dataclass_fields__)
    for name in ("clustering", "restore"):
        default = getattr(AiluRusConfig(keep_ratio=0.5), name)
        assert re.search(rf'^\| `{name}` .*\| `"{default}"` \|$', README, re.MULTILINE), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document: str) -> None:
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
