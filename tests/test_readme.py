"""What the README and the docs show runs: Python blocks in order, commands against the parser, links to files."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusion_models import UNET, UP, make_controlnet, make_vae, scheduler
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from ailurus_hf import ailurus_status
from ailurus_hf.choices import CLUSTERING_CLASSES
from ailurus_hf.cli import build_parser
from ailurus_hf.clustering import get_clustering
from ailurus_hf.video import open_clip, write_video

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "benchmarks/results/README.md"]
DOCUMENTS += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


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


@pytest.fixture
def diffusion_stand_in(tmp_path: Path) -> Path:
    """A tiny Stable Diffusion with new weights, whose texts are bytes."""
    torch.manual_seed(0)
    alphabet = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **sizes, **ends))
    unet = UNet2DConditionModel(**{**UNET, "sample_size": 32}, **UP, attention_head_dim=2)
    parts = {"vae": make_vae(), "unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer}
    parts |= {"scheduler": scheduler(), "safety_checker": None, "feature_extractor": None}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(tmp_path / "diffusion")
    make_controlnet().save_pretrained(tmp_path / "diffusion/controlnet")
    return tmp_path / "diffusion"


def test_the_python_blocks_run_in_order(
    stand_in: Path,
    diffusion_stand_in: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # so that what the README writes is not left in the checkout
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    here = {
        "google/vit-base-patch16-224": stand_in,
        "stable-diffusion-v1-5/stable-diffusion-v1-5": diffusion_stand_in,
        "lllyasviel/sd-controlnet-canny": diffusion_stand_in / "controlnet",
    }
    frames = [Image.effect_noise((64, 64), 90).convert("RGB") for _ in range(3)]
    write_video(tmp_path / "walk.mp4", frames, 8)
    for block in blocks("python"):
        for name, folder in here.items():
            block = block.replace(name, str(folder))
        exec(compile(block, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "196" in shown  # the status table: 224² in patches of 16
    assert "1024 → 256" in shown and "2 of 4 forwards" in shown
    assert names["picture"].size == (64, 64) and ailurus_status(names["pipe"]).active
    assert names["labels"].shape == names["street"].size[::-1]
    assert names["representatives"].shape == (2, 192, 64)
    assert len(list(open_clip(tmp_path / "ocean.mp4"))) == 3


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
        assert (ROOT / document).parent.joinpath(target).exists(), target


def test_the_clustering_of_contributing_works() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"^## Add a clustering$.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block
    names: dict = {}
    try:
        exec(compile(block[1], "CONTRIBUTING.md", "exec"), names)
        for clustering in ("rows", names["Rows"]()):
            clusters = get_clustering(clustering)(torch.randn(2, 24, 8), (4, 6), 12)
            assert torch.equal(clusters.assignment, (torch.arange(24) // 2).expand(2, -1))
    finally:
        CLUSTERING_CLASSES.pop("rows", None)
