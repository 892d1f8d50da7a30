"""Tiny geometries in place of the real ones and under their names, so that a dry run goes every row's way in seconds.

For a process of its own: nothing puts them back.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
# Deep enough for four layers that a head reads, and for locations of large models.
DEEP = {**VIT, "num_hidden_layers": 8}
CONTROLNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 768,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
UNET = {**CONTROLNET, "sample_size": 8, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}
ADDED = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")


def shrink() -> None:
    """Every benchmark's geometries, of those that can be imported."""
    for name, small in SMALL.items():
        with suppress(ImportError):
            small(importlib.import_module(f"benchmarks.{name}"))


def _vit_speed(module: Any) -> None:
    for name in module.GEOMETRIES:
        module.GEOMETRIES[name] = (128, 16, VIT)


def _families_speed(module: Any) -> None:
    makers = {
        "DINOv2-L + DPT head 518": (partial(module.depth_anything, sizes=DEEP, neck=(8, 8, 16, 16), fusion=8), 84),
        "EoMT-L 640": (partial(module.eomt, sizes=DEEP), 128),
    }
    for name, (make, size) in makers.items():
        module.GEOMETRIES[name] = replace(module.GEOMETRIES[name], make=make, size=size)


def _compiled_speed(module: Any) -> None:
    for name in module.vit_speed.GEOMETRIES:
        module.GEOMETRIES[name] = module.of_vit(name)
    name = "DINOv2-L + DPT head 518"
    module.GEOMETRIES[name] = module.of_family(name)


def _launch_modes(module: Any) -> None:
    for name in module.SHAPES:
        module.SHAPES[name] = ((8, 8), 16, 16)


def _attention_forms(module: Any) -> None:
    for name in module.SHAPES:
        module.SHAPES[name] = (1, 2, 17, 17, 8)


def _detection_speed(module: Any) -> None:
    module.SIZE = (96, 128)
    sizes = {**DEEP, "image_size": 96, "patch_size": 16, "intermediate_size": 64}
    for name in ("ViT-L", "ViT-B"):
        module.MODELS[name] = module.vit(sizes)
        module.ROWS[name] = [(7, 12)]


def _finetune_speed(module: Any) -> None:
    module.GEOMETRIES["ViT-B"] = ((64, 64), 5, VIT)


def _diffusion_speed(module: Any) -> None:
    sdxl = module.MODELS["sdxl"]
    added = {name: sdxl[name] for name in ADDED}
    module.MODELS["sd15"] = UNET
    module.MODELS["sdxl"] = {**UNET, "cross_attention_dim": sdxl["cross_attention_dim"], **added}


def _controlvideo_speed(module: Any) -> None:
    module.UNET = UNET
    module.CONTROLNET = {**CONTROLNET, "conditioning_embedding_out_channels": (4, 8, 8, 8)}
    module.VAE = {**module.VAE, "block_out_channels": (8,) * 4, "norm_num_groups": 4}


# In this order: what is made of another one's geometries comes after it.
SMALL = {
    "vision.vit_speed": _vit_speed,
    "vision.families_speed": _families_speed,
    "vision.compiled_speed": _compiled_speed,
    "clustering.launch_modes": _launch_modes,
    "vision.attention_forms": _attention_forms,
    "vision.detection_speed": _detection_speed,
    "training.finetune_speed": _finetune_speed,
    "diffusion.diffusion_speed": _diffusion_speed,
    "video.controlvideo_speed": _controlvideo_speed,
}
