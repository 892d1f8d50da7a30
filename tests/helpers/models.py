"""Tiny models made from configs, one for every supported architecture, and inputs for them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from model_parts import (
    BEIT,
    BLIP,
    DECODER,
    DINO,
    DINO3,
    EOMT,
    GRID,
    NECK,
    PATCH,
    PIXIO,
    RADIO,
    SIZES,
    SQUARE,
    STAGES,
    beit_backbone,
    boxes,
    clip,
    clipseg,
    depth,
    dinov2_backbone,
    eomt,
    last,
    logits,
    maps,
    masks,
    owl,
    segmenter,
    vitpose,
    yolos,
    zoedepth,
)
from torch import nn


@dataclass(frozen=True)
class Case:
    """make: a new model. prediction: what the model is for, as a tensor of its output.

    grid, patch: of its input; any_size: it takes other sizes. every_way: tested with all settings, and not with some.
    compiles: transformers' own model compiles to one graph. maps: it returns attention maps once set to eager.
    auto: the class whose from_pretrained loads it. trains: gradients reach the images.
    """

    make: Callable[[], nn.Module]
    prediction: Callable[[object], torch.Tensor]
    grid: tuple[int, int] = GRID
    patch: int = PATCH
    any_size: bool = True
    every_way: bool = False
    compiles: bool = True
    maps: bool = True
    auto: str | None = None
    trains: bool = True

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


CASES = {
    "ViTModel": Case(lambda: hf.ViTModel(hf.ViTConfig(**SIZES)), last, every_way=True, auto="AiluRusModel"),
    "ViTForImageClassification": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, num_labels=5)),
        logits,
        auto="AiluRusModelForImageClassification",
    ),
    "DeiTModel": Case(lambda: hf.DeiTModel(hf.DeiTConfig(**SIZES)), last, auto="AiluRusModel"),
    "DeiTWithTeacher": Case(
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SIZES, num_labels=5)), logits
    ),
    "ViTMSNModel": Case(lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**SIZES)), last, auto="AiluRusModel"),
    "IJepaModel": Case(lambda: hf.IJepaModel(hf.IJepaConfig(**SIZES)), last, auto="AiluRusModel"),
    "ViTMAEModel": Case(lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SIZES, mask_ratio=0.0)), last, auto="AiluRusModel"),
    "BeitModel": Case(lambda: hf.BeitModel(hf.BeitConfig(**BEIT)), last, every_way=True, auto="AiluRusModel"),
    "BeitModel(shared)": Case(
        lambda: hf.BeitModel(
            hf.BeitConfig(**{**BEIT, "use_relative_position_bias": False}, use_shared_relative_position_bias=True)
        ),
        last,
        auto="AiluRusModel",
    ),
    "BeitForSemanticSegmentation": Case(
        lambda: hf.BeitForSemanticSegmentation(
            hf.BeitConfig(**BEIT, out_indices=[1, 2, 3, 4], pool_scales=[1], use_auxiliary_head=False, num_labels=5)
        ),
        logits,
        auto="AiluRusModelForSemanticSegmentation",
    ),
    "BeitBackbone": Case(lambda: hf.BeitBackbone(beit_backbone(**STAGES)), maps),
    "Data2VecVisionModel": Case(
        lambda: hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**BEIT)), last, maps=False, auto="AiluRusModel"
    ),
    "Data2VecVisionForSemanticSegmentation": Case(
        lambda: hf.Data2VecVisionForSemanticSegmentation(
            hf.Data2VecVisionConfig(
                **{**BEIT, "use_shared_relative_position_bias": True},
                out_indices=[1, 2, 3, 4],
                pool_scales=[1],
                use_auxiliary_head=False,
                num_labels=5,
            )
        ),
        logits,
        grid=SQUARE,
        any_size=False,
        maps=False,
    ),
    "Dinov2Model": Case(lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)), last, auto="AiluRusModel"),
    "Dinov2ForImageClassification": Case(
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO, num_labels=5)),
        logits,
        auto="AiluRusModelForImageClassification",
    ),
    "Dinov2Backbone": Case(lambda: hf.Dinov2Backbone(dinov2_backbone(**STAGES)), maps, every_way=True),
    "Dinov2WithRegistersModel": Case(
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)),
        last,
        auto="AiluRusModel",
    ),
    "Dinov2WithRegistersBackbone": Case(
        lambda: hf.Dinov2WithRegistersBackbone(hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3, **STAGES)),
        maps,
    ),
    "DINOv3ViTModel": Case(lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINO3)), last, auto="AiluRusModel"),
    "DINOv3ViTBackbone": Case(lambda: hf.DINOv3ViTBackbone(hf.DINOv3ViTConfig(**DINO3, **STAGES)), maps),
    "CLIPVisionModel": Case(lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES)), last),
    "CLIPModel": Case(clip, lambda out: out.image_embeds),
    "SiglipVisionModel": Case(
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)), lambda out: out.pooler_output
    ),
    "Siglip2VisionModel": Case(
        lambda: hf.Siglip2VisionModel(
            hf.Siglip2VisionConfig(**{k: v for k, v in SIZES.items() if k != "image_size"}, num_patches=64)
        ),
        lambda out: out.pooler_output,
        compiles=False,
        auto="AiluRusModel",
    ),
    "MetaClip2VisionModel": Case(lambda: hf.MetaClip2VisionModel(hf.MetaClip2VisionConfig(**SIZES)), last),
    "BlipVisionModel": Case(lambda: hf.BlipVisionModel(hf.BlipVisionConfig(**BLIP)), last, every_way=True),
    "Blip2VisionModel": Case(lambda: hf.Blip2VisionModel(hf.Blip2VisionConfig(**BLIP)), last),
    "InstructBlipVisionModel": Case(lambda: hf.InstructBlipVisionModel(hf.InstructBlipVisionConfig(**BLIP)), last),
    "CLIPSeg": Case(clipseg, logits, grid=SQUARE, any_size=False, trains=False),
    "OWL-ViT": Case(lambda: owl(hf.OwlViTForObjectDetection, hf.OwlViTConfig), boxes),
    "OWLv2": Case(lambda: owl(hf.Owlv2ForObjectDetection, hf.Owlv2Config), boxes),
    "Aimv2VisionModel": Case(
        lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**SIZES)), last, grid=SQUARE, any_size=False
    ),
    "PixioModel": Case(lambda: hf.PixioModel(hf.PixioConfig(**PIXIO)), last, auto="AiluRusModel"),
    "RadioModel": Case(lambda: hf.RadioModel(hf.RadioConfig(**RADIO)), last, auto="AiluRusModel"),
    "Tipsv2VisionModel": Case(lambda: hf.Tipsv2VisionModel(hf.Tipsv2VisionConfig(**DINO)), last, auto="AiluRusModel"),
    "Tipsv2VisionBackbone": Case(lambda: hf.Tipsv2VisionBackbone(hf.Tipsv2VisionConfig(**DINO, **STAGES)), maps),
    "PixioBackbone": Case(lambda: hf.PixioBackbone(hf.PixioConfig(**PIXIO, **STAGES)), maps),
    "DPTForDepthEstimation": Case(
        lambda: hf.DPTForDepthEstimation(
            hf.DPTConfig(**{**SIZES, "image_size": SQUARE[0] * PATCH}, **NECK, backbone_out_indices=[0, 1, 2, 3])
        ),
        depth,
        grid=SQUARE,
        any_size=False,
        every_way=True,
    ),
    "DPTForSemanticSegmentation": Case(
        lambda: hf.DPTForSemanticSegmentation(
            hf.DPTConfig(
                **{**SIZES, "image_size": SQUARE[0] * PATCH}, **NECK, backbone_out_indices=[0, 1, 2, 3], num_labels=5
            )
        ),
        logits,
        grid=SQUARE,
        any_size=False,
        auto="AiluRusModelForSemanticSegmentation",
    ),
    "DPT over DINOv2": Case(
        lambda: hf.DPTForDepthEstimation(
            hf.DPTConfig(backbone_config=dinov2_backbone(reshape_hidden_states=False, apply_layernorm=True), **NECK)
        ),
        depth,
    ),
    "DepthAnything": Case(
        lambda: hf.DepthAnythingForDepthEstimation(
            hf.DepthAnythingConfig(
                backbone_config=dinov2_backbone(reshape_hidden_states=False),
                patch_size=PATCH,
                reassemble_hidden_size=32,
                head_hidden_size=8,
                **NECK,
            )
        ),
        depth,
    ),
    "ZoeDepth over BEiT": Case(zoedepth, depth),
    "UperNet over DINOv2": Case(
        lambda: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(
                backbone_config=dinov2_backbone(),
                hidden_size=8,
                pool_scales=[1],
                use_auxiliary_head=False,
                num_labels=5,
            )
        ),
        logits,
        auto="AiluRusModelForSemanticSegmentation",
    ),
    "UperNet over BEiT": Case(
        lambda: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(
                backbone_config=beit_backbone(), hidden_size=8, pool_scales=[1], use_auxiliary_head=False, num_labels=5
            )
        ),
        logits,
        auto="AiluRusModelForSemanticSegmentation",
    ),
    "YOLOS": Case(yolos, boxes, every_way=True),
    "YOLOS(positions between layers)": Case(lambda: yolos(use_mid_position_embeddings=True), boxes),
    "VitPose": Case(vitpose, lambda out: out.heatmaps, patch=8, any_size=False),
    "EoMT": Case(
        lambda: eomt(hf.EomtForUniversalSegmentation, hf.EomtConfig(**EOMT), predicts_masks=False),
        masks,
        grid=SQUARE,
        any_size=False,
        compiles=False,
    ),
    "EoMT(predicting masks)": Case(
        lambda: eomt(hf.EomtForUniversalSegmentation, hf.EomtConfig(**EOMT), predicts_masks=True),
        masks,
        grid=SQUARE,
        any_size=False,
        compiles=False,
    ),
    "EoMT-DINOv3": Case(
        lambda: eomt(hf.EomtDinov3ForUniversalSegmentation, hf.EomtDinov3Config(**EOMT), predicts_masks=True),
        masks,
        grid=SQUARE,
        any_size=False,
        compiles=False,
    ),
    "Segmenter(ViT, mask transformer)": Case(
        lambda: segmenter("vit", decoder_config=DECODER),
        logits,
        every_way=True,
        auto="AiluRusModelForSemanticSegmentation",
    ),
    "Segmenter(DeiT, linear)": Case(
        lambda: segmenter("deit", decoder_type="linear"), logits, auto="AiluRusModelForSemanticSegmentation"
    ),
}


def enable_checkpointing(model: nn.Module) -> None:
    """Gradient checkpointing, by the name that the installed transformers has for it."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    getattr(model, next(name for name in names if hasattr(model, name)))()


def make_model(name: str) -> nn.Module:
    """The model with weights large enough that attention is far from uniform and tokens matter."""
    torch.manual_seed(0)
    model = CASES[name].make().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "relative_position_bias_table" in parameter_name:
                parameter.normal_()
            elif parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.3)
            elif parameter.ndim > 1 and parameter.std() < 0.1:
                parameter.mul_(4)
            if parameter_name.endswith(QUERIES_AND_KEYS):
                parameter.mul_(3)
            if parameter_name.endswith("self_attn.qkv.weight"):
                parameter[: 2 * len(parameter) // 3].mul_(3)
    return model


QUERIES_AND_KEYS = ("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")


def images(batch=2, grid=GRID, seed=0, patch=PATCH):
    """Random images, smooth enough to have clusters."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, grid[0], grid[1], generator=generator)
    fine = torch.randn(batch, 3, grid[0] * patch, grid[1] * patch, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=patch, mode="bilinear") + 0.3 * fine


def images_for(name, batch=2, seed=0):
    return images(batch, CASES[name].grid, seed, CASES[name].patch)


def blocky_images_for(name, batch=2, seed=0):
    """Images in which every 2 x 2 patches are equal; with `without_positions` their tokens stay equal."""
    generator = torch.Generator().manual_seed(seed)
    (rows, columns), patch = CASES[name].grid, CASES[name].patch
    patches = torch.randn(batch, 3, rows // 2, columns // 2, patch, patch, generator=generator)
    tiled = patches.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return tiled.permute(0, 1, 2, 4, 3, 5).reshape(batch, 3, rows * patch, columns * patch)


def without_positions(model):
    """The model with nothing in it that tells equal patches apart by their position."""
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(
                (
                    "position_embeddings",
                    "position_embedding",
                    "position_embedding.weight",
                    "position_embeddings.weight",
                    "inv_freq",
                )
            ):
                parameter.zero_()
            if name.endswith("relative_position_bias_table"):
                # One bias for all displacements; those of the class token stay what they are.
                parameter[:-3] = parameter[:1]
        for module in model.modules():
            if "VitPoseBackbonePatchEmbeddings" in type(module).__name__:
                # Its patches overlap into a border of zeros: without, equal patches are equal tokens.
                module.projection.padding = (0, 0)
    return model


def run(model, pixel_values, **kwargs):
    original = getattr(model, "_orig_mod", model)
    parameters = inspect.signature(original.forward).parameters
    if "interpolate_pos_encoding" in parameters or isinstance(original, hf.BeitBackbone):
        kwargs["interpolate_pos_encoding"] = True
    if "input_ids" in parameters:
        kwargs["input_ids"] = torch.ones(len(pixel_values), 3, dtype=torch.long)
    if "noise" in parameters:
        # Without, the model draws an order of the patches.
        patch = original.config.patch_size
        cells = pixel_values.shape[-2] // patch * (pixel_values.shape[-1] // patch)
        kwargs["noise"] = torch.arange(cells).expand(len(pixel_values), -1)
    if "spatial_shapes" in parameters:
        pixel_values = patchified(pixel_values, original.config.patch_size, kwargs)
    return model(pixel_values=pixel_values, **kwargs)


def patchified(pixel_values, patch, kwargs, padding=3):
    """Patches as SigLIP 2 takes them, with padding after them; puts the mask and the grids into kwargs."""
    patches = pixel_values.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1)
    grid, patches = patches.shape[1:3], patches.flatten(3).flatten(1, 2)
    mask = torch.ones(patches.shape[:2], dtype=torch.long)
    kwargs["spatial_shapes"] = torch.tensor([list(grid)] * len(patches))
    kwargs["pixel_attention_mask"] = nn.functional.pad(mask, (0, padding))
    # What stands in the padding is never seen.
    return nn.functional.pad(patches, (0, 0, 0, padding), value=1e3)


def predict(model, name, pixel_values, **kwargs):
    with torch.no_grad():
        return CASES[name].prediction(run(model, pixel_values, **kwargs))


def of_encoder(out):
    """The part of an output that holds hidden states and attention maps."""
    return getattr(out, "vision_model_output", out)
