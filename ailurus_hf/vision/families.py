"""The model families whose encoders can be reduced: one declaration each, and what they need to say it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import AiluRusError
from .registry import (
    Family,
    Reader,
    TokenDecoder,
    patch_grid,
    register_family,
    register_reader,
    register_token_decoder,
)


def feature_maps(backbone: Any) -> list[int]:
    """The hidden states that a backbone makes feature maps of."""
    return [backbone.stage_names.index(name) for name in backbone.out_features]


def dpt_neck(model: Any) -> list[int]:
    """The hidden states that DPT's neck takes, from its own encoder or from a backbone."""
    backbone = getattr(model, "backbone", None)
    return [i + 1 for i in model.config.backbone_out_indices] if backbone is None else feature_maps(backbone)


def with_mid_positions(encoder: Any) -> Iterable[int]:
    """YOLOS adds position embeddings to all tokens after every layer but the last, if its config says so."""
    return range(encoder.config.num_hidden_layers - 1) if encoder.config.use_mid_position_embeddings else ()


def before_predicted_masks(encoder: Any) -> list[int]:
    """EoMT predicts a mask before each of its last layers while it trains, and where a checkpoint asks for it."""
    first = encoder.config.num_hidden_layers - encoder.config.num_blocks
    # Read at once: each read waits for the device.
    predicts = [encoder.training or probability > 0 for probability in encoder.attn_mask_probs.tolist()]
    return [first + block - 1 for block, predicted in enumerate(predicts) if predicted]


def in_grid_order(encoder: Any, arguments: dict[str, Any]) -> None:
    """ViTMAE shuffles tokens by `noise` and drops `mask_ratio` of them; sorted noise leaves the grid as it is."""
    if encoder.config.mask_ratio != 0:
        raise AiluRusError(
            f"{type(encoder).__name__} drops mask_ratio = {encoder.config.mask_ratio} of its tokens, which leaves no "
            "grid to cluster on: set config.mask_ratio = 0"
        )
    noise = arguments.get("noise")
    if noise is None:
        pixel_values = arguments["pixel_values"]
        rows, columns = patch_grid(encoder, pixel_values)
        arguments["noise"] = torch.arange(rows * columns, device=pixel_values.device).expand(len(pixel_values), -1)
    elif not torch.compiler.is_compiling() and bool((noise.diff(dim=1) <= 0).any()):
        raise AiluRusError(f"{type(encoder).__name__} shuffles tokens by noise, which has to ascend in each image")


def common_grid(encoder: Any, arguments: dict[str, Any]) -> tuple[tuple[int, int], int]:
    """SigLIP 2 takes patches, with a grid for each image and padding to one length."""
    patches, mask, grids = (arguments[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes"))
    if bool((grids != grids[:1]).any()):
        raise AiluRusError(
            f"the images of this batch have {len(grids.unique(dim=0))} different grids, which one number of clusters "
            "does not fit: give images of one grid together, or one at a time"
        )
    rows, columns = grids[0].tolist()
    num_tokens, length = rows * columns, patches.shape[1]
    if mask is not None and bool((mask.bool() != (torch.arange(length, device=mask.device) < num_tokens)).any()):
        raise AiluRusError(
            f"pixel_attention_mask must be open for the {num_tokens} patches of the grid, and for no others"
        )
    return (rows, columns), length - num_tokens


def one_size(encoder: Any, arguments: dict[str, Any]) -> None:
    """RADIO also takes images of several sizes, their patches in one sequence."""
    if arguments.get("image_grid_hw") is not None:
        raise AiluRusError(
            f"{type(encoder).__name__} was given images packed into one sequence (image_grid_hw), which is no grid: "
            "give images of one size together, or one at a time"
        )


def timm_grid(encoder: Any, pixel_values: Tensor) -> tuple[int, int]:
    rows, columns = encoder.timm_model.patch_embed.dynamic_feat_size(pixel_values.shape[-2:])
    return rows, columns


def timm_prefix(encoder: Any) -> int:
    return int(encoder.timm_model.num_prefix_tokens)


def as_timm_runs_layers(encoder: Any, arguments: dict[str, Any]) -> None:
    """timm makes grids of hidden states between its layers, and checkpoints them in a way that runs hooks twice."""
    name = type(encoder).__name__
    if arguments.get("output_hidden_states") or (
        encoder.config.output_hidden_states and "output_hidden_states" not in arguments
    ):
        raise AiluRusError(f"{name} reads hidden states on the whole grid: call it without output_hidden_states")
    if encoder.training and getattr(encoder.timm_model, "grad_checkpointing", False):
        raise AiluRusError(f"timm's gradient checkpointing clusters twice: switch it off on {name}")


_AT = "transformers.models."

_FAMILIES: tuple[Family, ...] = (
    Family("ViT", _AT + "vit.modeling_vit.ViTModel", prefix=1),
    Family("DeiT", _AT + "deit.modeling_deit.DeiTModel", prefix=2),
    Family("ViTMSN", _AT + "vit_msn.modeling_vit_msn.ViTMSNModel", prefix=1),
    Family("I-JEPA", _AT + "ijepa.modeling_ijepa.IJepaModel"),
    Family("ViTMAE (mask_ratio 0)", _AT + "vit_mae.modeling_vit_mae.ViTMAEModel", prefix=1, prepare=in_grid_order),
    Family(
        "BEiT", _AT + "beit.modeling_beit.BeitModel", prefix=1, models="BeitBackbone, UperNet, ZoeDepth, DPT over BEiT"
    ),
    Family("Data2VecVision", _AT + "data2vec.modeling_data2vec_vision.Data2VecVisionModel", prefix=1),
    Family("DINOv2", _AT + "dinov2.modeling_dinov2.Dinov2Model", prefix=1),
    Family(
        "DINOv2 backbone",
        _AT + "dinov2.modeling_dinov2.Dinov2Backbone",
        prefix=1,
        models="DepthAnything, PromptDepthAnything, DPT and UperNet over DINOv2",
        reads=feature_maps,
    ),
    Family(
        "DINOv2 with registers",
        _AT + "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
        prefix=1,
        registers="num_register_tokens",
    ),
    Family(
        "DINOv2 with registers, backbone",
        _AT + "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersBackbone",
        prefix=1,
        registers="num_register_tokens",
        reads=feature_maps,
    ),
    Family("DINOv3", _AT + "dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel", prefix=1, registers="num_register_tokens"),
    Family(
        "DINOv3 backbone",
        _AT + "dinov3_vit.modeling_dinov3_vit.DINOv3ViTBackbone",
        prefix=1,
        registers="num_register_tokens",
        reads=feature_maps,
    ),
    Family(
        "CLIP vision",
        _AT + "clip.modeling_clip.CLIPVisionModel",
        prefix=1,
        models="CLIPModel, LLaVA and others with its tower",
    ),
    Family("MetaCLIP 2 vision", _AT + "metaclip_2.modeling_metaclip_2.MetaClip2VisionModel", prefix=1),
    Family("BLIP vision", _AT + "blip.modeling_blip.BlipVisionModel", prefix=1, models="BLIP's models for any task"),
    Family(
        "BLIP-2 vision",
        _AT + "blip_2.modeling_blip_2.Blip2VisionModel",
        prefix=1,
        models="BLIP-2's models for any task",
    ),
    Family("InstructBLIP vision", _AT + "instructblip.modeling_instructblip.InstructBlipVisionModel", prefix=1),
    Family(
        "CLIPSeg vision",
        _AT + "clipseg.modeling_clipseg.CLIPSegVisionModel",
        prefix=1,
        models="CLIPSegForImageSegmentation",
    ),
    Family(
        "OWL-ViT vision",
        _AT + "owlvit.modeling_owlvit.OwlViTVisionTransformer",
        prefix=1,
        models="OwlViTForObjectDetection",
    ),
    Family(
        "OWLv2 vision", _AT + "owlv2.modeling_owlv2.Owlv2VisionTransformer", prefix=1, models="Owlv2ForObjectDetection"
    ),
    Family(
        "SigLIP vision", _AT + "siglip.modeling_siglip.SiglipVisionModel", models="SiglipModel, PaliGemma and others"
    ),
    Family(
        "SigLIP 2 vision (one grid a batch)",
        _AT + "siglip2.modeling_siglip2.Siglip2VisionModel",
        models="Siglip2Model, Siglip2ForImageClassification",
        layout=common_grid,
    ),
    Family("AIMv2 vision", _AT + "aimv2.modeling_aimv2.Aimv2VisionModel", models="Aimv2Model"),
    Family(
        "Pixio",
        _AT + "pixio.modeling_pixio.PixioModel",
        prefix=lambda encoder: int(encoder.config.n_cls_tokens),
        models="PixioBackbone",
    ),
    Family(
        "RADIO",
        _AT + "radio.modeling_radio.RadioModel",
        prefix=lambda encoder: int(encoder.config.num_summary_tokens),
        prepare=one_size,
    ),
    Family(
        "TIPSv2 vision",
        _AT + "tipsv2.modeling_tipsv2.Tipsv2VisionModel",
        prefix=1,
        registers="num_register_tokens",
        models="Tipsv2Model",
    ),
    Family(
        "TIPSv2 backbone",
        _AT + "tipsv2.modeling_tipsv2.Tipsv2VisionBackbone",
        prefix=1,
        registers="num_register_tokens",
        models="TIPSv2's DPT",
        reads=feature_maps,
    ),
    Family(
        "DPT",
        _AT + "dpt.modeling_dpt.DPTModel",
        prefix=1,
        models="DPTForDepthEstimation, DPTForSemanticSegmentation",
    ),
    Family(
        "YOLOS",
        _AT + "yolos.modeling_yolos.YolosModel",
        prefix=1,
        suffix="num_detection_tokens",
        models="YolosForObjectDetection",
        between=with_mid_positions,
    ),
    Family(
        "VitPose",
        _AT + "vitpose_backbone.modeling_vitpose_backbone.VitPoseBackbone",
        models="VitPoseForPoseEstimation",
        reads=feature_maps,
    ),
    Family(
        "EoMT",
        _AT + "eomt.modeling_eomt.EomtForUniversalSegmentation",
        prefix=1,
        registers="num_register_tokens",
        queries="num_queries",
        between=before_predicted_masks,
    ),
    Family(
        "EoMT-DINOv3",
        _AT + "eomt_dinov3.modeling_eomt_dinov3.EomtDinov3ForUniversalSegmentation",
        prefix=1,
        registers="num_register_tokens",
        queries="num_queries",
        between=before_predicted_masks,
    ),
)

_FAMILIES += tuple(
    Family(
        name,
        f"{_AT}timm_wrapper.modeling_timm_wrapper.{encoder}",
        prefix=timm_prefix,
        models="timm's VisionTransformer in transformers",
        grid=timm_grid,
        prepare=as_timm_runs_layers,
        methods=("timm_model.forward_features",),
    )
    for name, encoder in (
        ("timm ViT", "TimmWrapperModel"),
        ("timm ViT, classification", "TimmWrapperForImageClassification"),
    )
)

_DECODERS = (
    TokenDecoder("ailurus_hf.segmenter.modeling_segmenter.MaskTransformerDecoder", suffix="num_labels"),
    TokenDecoder("ailurus_hf.segmenter.modeling_segmenter.LinearDecoder"),
)

_READERS = (
    Reader("ailurus_hf.detection.pyramid.ViTPyramid", lambda pyramid: pyramid.taps),
    Reader(_AT + "beit.modeling_beit.BeitBackbone", feature_maps),
    Reader(
        _AT + "beit.modeling_beit.BeitForSemanticSegmentation", lambda model: [i - 1 for i in model.config.out_indices]
    ),
    Reader(
        _AT + "data2vec.modeling_data2vec_vision.Data2VecVisionForSemanticSegmentation",
        lambda model: [i - 1 for i in model.config.out_indices],
    ),
    Reader(_AT + "pixio.modeling_pixio.PixioBackbone", feature_maps),
    Reader(
        _AT + "clipseg.modeling_clipseg.CLIPSegForImageSegmentation",
        lambda model: [i + 1 for i in model.extract_layers],
    ),
    Reader(_AT + "dpt.modeling_dpt.DPTForDepthEstimation", dpt_neck),
    Reader(_AT + "dpt.modeling_dpt.DPTForSemanticSegmentation", dpt_neck),
)

for _family in _FAMILIES:
    register_family(_family)
for _decoder in _DECODERS:
    register_token_decoder(_decoder)
for _reader in _READERS:
    register_reader(_reader)
