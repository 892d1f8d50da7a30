"""The documents and their code blocks, and tiny models that stand in for those of the Hub that the documents load."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusion_models import UNET, UP, make_controlnet, make_vae, scheduler
from PIL import Image

from ailurus_hf import SegmenterConfig, SegmenterForSemanticSegmentation, SegmenterImageProcessor
from ailurus_hf.video import write_video

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/results/README.md",
    *PAGES,
]
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "Not run by the tests"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the title that a reader sees above it."""

    language: str
    title: str
    text: str


def blocks(document: str) -> list[Block]:
    return [Block(*match.groups(default="")) for match in FENCE.finditer((ROOT / document).read_text())]


SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
CONVOLUTIONS = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}


def save_stand_ins(folder: Path) -> dict[str, str]:
    """Tiny models with new weights by the names on the Hub that they stand in for, saved in a folder."""
    torch.manual_seed(0)
    sides = {"size": {"height": 64, "width": 64}}
    labels = {"num_labels": 5}
    dino = hf.Dinov2Config(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
        patch_size=14,
        **STAGES,
        reshape_hidden_states=False,
    )
    beit = hf.BeitConfig(
        **SIZES, **labels, image_size=64, patch_size=4, use_relative_position_bias=True, out_indices=[1, 2, 3, 4],
        pool_scales=[1], use_auxiliary_head=False,
    )  # fmt: skip
    segmenter = SegmenterConfig(
        encoder_config={"model_type": "vit", "image_size": 64, "patch_size": 4, **SIZES}, **labels
    )
    models = {
        "google/vit-base-patch16-224": (
            hf.ViTForImageClassification(hf.ViTConfig(**SIZES)),
            hf.ViTImageProcessor(),
        ),
        "microsoft/beit-base-finetuned-ade-640-640": (
            hf.BeitForSemanticSegmentation(beit),
            hf.BeitImageProcessor(do_center_crop=False, **sides),
        ),
        "depth-anything/Depth-Anything-V2-Small-hf": (
            hf.DepthAnythingForDepthEstimation(
                hf.DepthAnythingConfig(
                    backbone_config=dino, reassemble_hidden_size=32, head_hidden_size=4, **CONVOLUTIONS
                )
            ),
            hf.DPTImageProcessor(size={"height": 112, "width": 112}, ensure_multiple_of=14, keep_aspect_ratio=True),
        ),
        "hustvl/yolos-small": (
            hf.YolosForObjectDetection(
                hf.YolosConfig(**SIZES, **labels, image_size=[64, 64], patch_size=8, num_detection_tokens=4)
            ),
            hf.YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}),
        ),
        "my-segmenter": (
            SegmenterForSemanticSegmentation(segmenter),
            SegmenterImageProcessor(size={"shortest_edge": 64}, label_pad_value=255),
        ),
    }
    folders = {}
    for name, (model, processor) in models.items():
        folders[name] = str(folder / name.rsplit("/")[-1])
        model.save_pretrained(folders[name])
        processor.save_pretrained(folders[name])
    folders["stable-diffusion-v1-5/stable-diffusion-v1-5"] = str(folder / "diffusion")
    folders["lllyasviel/sd-controlnet-canny"] = str(folder / "controlnet")
    save_stable_diffusion(folder / "diffusion")
    make_controlnet().save_pretrained(folder / "controlnet")
    return folders


def save_stable_diffusion(folder: Path) -> None:
    """Its texts are bytes."""
    alphabet = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = hf.CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text_encoder = hf.CLIPTextModel(hf.CLIPTextConfig(vocab_size=len(words), **sizes, **ends))
    unet = UNet2DConditionModel(**{**UNET, "sample_size": 32}, **UP, attention_head_dim=2)
    parts = {"vae": make_vae(), "unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer}
    parts |= {"scheduler": scheduler(), "safety_checker": None, "feature_extractor": None}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)


def prepare(folder: Path) -> None:
    """What the documents' commands and programs read: the checkout's examples, photographs, labels, a clip."""
    for name in ("examples", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    street = Image.open(ROOT / "examples/assets/street.jpg").resize((96, 72))
    (folder / "photos").mkdir()
    for path in ("photo.jpg", "street.jpg", "photos/a.jpg", "photos/b.jpg", "photos/c.jpg"):
        street.save(folder / path)
    Image.new("L", street.size, 1).save(folder / "photo_labels.png")
    Image.effect_noise((64, 64), 90).save(folder / "edges.png")
    write_video(folder / "walk.mp4", [Image.effect_noise((64, 64), 90).convert("RGB") for _ in range(3)], 8)


def with_stand_ins(text: str, folders: dict[str, str]) -> str:
    """The block with the stand-ins' folders for names of the Hub, and fewer steps of denoising."""
    text = text.replace("num_inference_steps=20", "num_inference_steps=2")
    for name, folder in folders.items():
        text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])", folder, text)
    return text
