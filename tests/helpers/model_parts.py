"""Sizes and builders of the tiny models in models.py, and what each of them predicts."""

import torch
import transformers as hf

from ailurus_hf import SegmenterConfig, SegmenterForSemanticSegmentation

PATCH, GRID, DEPTH = 4, (8, 12), 4
SQUARE = (8, 8)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": GRID[0] * PATCH,
    "patch_size": PATCH,
}
WITHOUT_MLP = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
# DINOv2 counts its MLP in multiples of its width, and shrinks each layer's gain.
DINO = {**WITHOUT_MLP, "mlp_ratio": 2, "layerscale_value": 1.0}
# By default they start at all but zero.
BLIP = {**SIZES, "initializer_range": 0.02}
RADIO = {**WITHOUT_MLP, "mlp_ratio": 2.0, "max_img_size": 2 * GRID[1] * PATCH}
PIXIO = {**WITHOUT_MLP, "mlp_ratio": 2, "n_cls_tokens": 3}
DINO3 = {**SIZES, "num_register_tokens": 2, "layerscale_value": 1.0}
BEIT = {**SIZES, "layer_scale_init_value": 1.0, "use_relative_position_bias": True}
STAGES = {"out_features": ["stage1", "stage2", "stage4"]}
FOUR_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
# Heads read these; a batch norm in evaluation has no statistics worth the name, and needs none.
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
DECODER = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
EOMT = {
    **SIZES,
    "num_queries": 6,
    "num_blocks": 2,
    "num_upscale_blocks": 1,
    "num_register_tokens": 2,
    "layerscale_value": 1.0,
    "num_labels": 5,
    "image_size": SQUARE[0] * PATCH,
}


def segmenter(encoder, num_labels=5, **fields):
    return SegmenterForSemanticSegmentation(
        SegmenterConfig(encoder_config={"model_type": encoder, **SIZES}, num_labels=num_labels, **fields)
    )


def dinov2_backbone(**fields):
    return hf.Dinov2Config(**DINO, **{**FOUR_STAGES, **fields})


def beit_backbone(**fields):
    return hf.BeitConfig(**BEIT, **{**FOUR_STAGES, **fields})


def eomt(model_class, config, predicts_masks):
    """As trained (no masks are predicted between layers), or as new."""
    model = model_class(config)
    model.attn_mask_probs.fill_(float(predicts_masks))
    return model


def yolos(**fields):
    image_size = [GRID[0] * PATCH, GRID[1] * PATCH]
    return hf.YolosForObjectDetection(
        hf.YolosConfig(**{**SIZES, "image_size": image_size}, num_detection_tokens=5, num_labels=3, **fields)
    )


def vitpose():
    image_size = (GRID[0] * 8, GRID[1] * 8)
    backbone = {
        **WITHOUT_MLP,
        "mlp_ratio": 2,
        "image_size": image_size,
        "patch_size": (8, 8),
        "out_features": ["stage4"],
    }
    return hf.VitPoseForPoseEstimation(
        hf.VitPoseConfig(backbone_config=hf.VitPoseBackboneConfig(**backbone), num_labels=3)
    )


def zoedepth():
    model = hf.ZoeDepthForDepthEstimation(
        hf.ZoeDepthConfig(
            backbone_config=beit_backbone(reshape_hidden_states=False),
            **NECK,
            bottleneck_features=8,
            num_relative_features=8,
            bin_embedding_dim=8,
            num_attractors=[4, 2, 2, 1],
            bin_configurations=[{"n_bins": 4, "min_depth": 0.1, "max_depth": 1.0, "name": "test"}],
        )
    )
    with torch.no_grad():
        for module in (model.neck, model.relative_head, model.metric_head):
            for parameter in module.parameters():
                parameter.normal_(std=0.2)  # as it starts, its depth is all but constant
    return model


TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}


def clip():
    return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=SIZES, projection_dim=8))


def clipseg():
    config = hf.CLIPSegConfig(
        text_config=TEXT,
        vision_config=SIZES,
        projection_dim=8,
        extract_layers=[1, 2, 3],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    return hf.CLIPSegForImageSegmentation(config)


def owl(model_class, config_class):
    return model_class(config_class(text_config=TEXT, vision_config=SIZES, projection_dim=16))


def last(out):
    return out.last_hidden_state


def logits(out):
    return out.logits


def maps(out):
    return torch.cat([each.flatten(1) for each in out.feature_maps], 1)


def boxes(out):
    return torch.cat([out.logits, out.pred_boxes], -1)


def depth(out):
    return out.predicted_depth


def masks(out):
    return torch.cat([out.masks_queries_logits.flatten(1), out.class_queries_logits.flatten(1)], 1)
