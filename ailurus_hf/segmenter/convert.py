"""Official Segmenter checkpoints (github.com/rstrudel/segmenter) to folders for `from_pretrained`.

A checkpoint is two files: checkpoint.pth, whose entry "model" holds the weights, and variant.yml, which says what was
built and how its pictures were prepared.
"""

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .configuration_segmenter import LAYER_NORM_EPS, SegmenterConfig
from .image_processing_segmenter import NORMALIZATION, SegmenterImageProcessor
from .modeling_segmenter import SegmenterForSemanticSegmentation

logger = logging.getLogger(__name__)

# Classifiers of the ImageNet pretraining that the official checkpoints carry along; nothing in Segmenter reads them.
UNUSED = re.compile(r"encoder\.(head|head_dist|pre_logits)\.")

# Original name -> ours; \1 is the number of the layer. Fused qkv projections are split in _convert_weights.
RENAMED = [
    (r"encoder\.cls_token", "encoder.embeddings.cls_token"),
    (r"encoder\.dist_token", "encoder.embeddings.distillation_token"),
    (r"encoder\.pos_embed", "encoder.embeddings.position_embeddings"),
    (r"encoder\.patch_embed\.proj\.(weight|bias)", r"encoder.embeddings.patch_embeddings.projection.\1"),
    (r"encoder\.norm\.(weight|bias)", r"encoder.layernorm.\1"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.norm1\.(weight|bias)", r"\1.layers.\2.layernorm_before.\3"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.norm2\.(weight|bias)", r"\1.layers.\2.layernorm_after.\3"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"\1.layers.\2.attention.o_proj.\3"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"\1.layers.\2.mlp.\3.\4"),
    (r"decoder\.(cls_emb|proj_patch|proj_classes)", r"decoder.\1"),
    (r"decoder\.(proj_dec|decoder_norm|mask_norm|head)\.(weight|bias)", r"decoder.\1.\2"),
]
FUSED_QKV = re.compile(r"(encoder|decoder)\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")


def convert_segmenter_checkpoint(
    checkpoint_path: str | Path, output_dir: str | Path
) -> SegmenterForSemanticSegmentation:
    """Writes model and image processor of an official checkpoint (github.com/rstrudel/segmenter) to a folder.

    Every weight is used exactly once, apart from the ImageNet classifiers (`encoder.head`), which are dropped.

    Args:
        checkpoint_path: the .pth file; variant.yml lies beside it.
        output_dir: the folder.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: before anything is written, where a file is missing or is not what it should be, or where weights
            are missing, left over or of another shape: all are named.

    Example:
        model = convert_segmenter_checkpoint("seg_large_mask/checkpoint.pth", "segmenter-large")
    """
    checkpoint_path = Path(checkpoint_path)
    variant = _read_variant(checkpoint_path.parent / "variant.yml")
    weights = _read_weights(checkpoint_path)
    config, processor = _build_config(variant), _build_processor(variant)
    model = SegmenterForSemanticSegmentation(config)
    _load(model, _convert_weights(weights))
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    return model.eval()


def _read_variant(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no variant.yml beside the checkpoint: expected {path}")
    try:
        variant = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not plain YAML: {error}") from error
    if not isinstance(variant, dict) or not isinstance(variant.get("net_kwargs"), dict):
        raise ValueError(f"{path} has no net_kwargs: it is not the variant.yml of a Segmenter")
    return variant


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        # weights_only: a checkpoint from a stranger could otherwise run anything.
        raise ValueError(
            f"{path} cannot be read as weights alone (cut off, or it holds objects other than tensors, numbers and "
            f"text): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    weights = data.get("model") if isinstance(data, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f'{path} has no entry "model": it is not the checkpoint of a Segmenter')
    return weights


def _required(section: dict[str, Any], key: str, where: str) -> Any:
    if key not in section:
        raise ValueError(f"variant.yml: {where} has no {key}")
    return section[key]


def _build_config(variant: dict[str, Any]) -> SegmenterConfig:
    net = variant["net_kwargs"]
    decoder = _required(net, "decoder", "net_kwargs")
    width = _required(net, "d_model", "net_kwargs")
    encoder_config = {
        "model_type": "deit" if net.get("distilled", False) else "vit",
        "hidden_size": width,
        "num_hidden_layers": _required(net, "n_layers", "net_kwargs"),
        "num_attention_heads": _required(net, "n_heads", "net_kwargs"),
        "intermediate_size": 4 * width,
        "image_size": _required(net, "image_size", "net_kwargs"),
        "patch_size": _required(net, "patch_size", "net_kwargs"),
        "layer_norm_eps": LAYER_NORM_EPS,
    }
    decoder_type, decoder_config = _required(decoder, "name", "decoder"), None
    if decoder_type not in ("mask_transformer", "linear"):
        raise ValueError(f"variant.yml: decoder {decoder_type!r} is neither mask_transformer nor linear")
    if decoder_type == "mask_transformer":
        # What the original's create_decoder hands to MaskTransformer: as wide as the encoder, heads of 64.
        decoder_config = {
            "hidden_size": width,
            "num_hidden_layers": _required(decoder, "n_layers", "decoder"),
            "num_attention_heads": width // 64,
            "intermediate_size": 4 * width,
        }
    return SegmenterConfig(
        encoder_config=encoder_config,
        decoder_type=decoder_type,
        decoder_config=decoder_config,
        num_labels=_required(net, "n_cls", "net_kwargs"),
    )


def _build_processor(variant: dict[str, Any]) -> SegmenterImageProcessor:
    name = _required(variant["net_kwargs"], "normalization", "net_kwargs")
    if name not in NORMALIZATION:
        raise ValueError(f"variant.yml: normalization {name!r} is none of {', '.join(NORMALIZATION)}")
    mean, std = NORMALIZATION[name]
    kwargs: dict[str, Any] = {"image_mean": list(mean), "image_std": list(std)}
    inference = variant.get("inference_kwargs") or {}
    if "im_size" in inference:
        kwargs |= {"do_resize": True, "size": {"shortest_edge": inference["im_size"]}}
    kwargs |= {key: inference[key] for key in ("window_size", "window_stride") if key in inference}
    return SegmenterImageProcessor(**kwargs)


def _convert_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    converted, unknown = {}, []
    for name, value in weights.items():
        if UNUSED.match(name):
            logger.info("%s: a classifier of the pretraining, dropped", name)
        elif match := FUSED_QKV.fullmatch(name):
            part, layer, kind = match.groups()
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                converted[f"{part}.layers.{layer}.attention.{letter}_proj.{kind}"] = third
        else:
            for pattern, ours in RENAMED:
                if match := re.fullmatch(pattern, name):
                    converted[match.expand(ours)] = value
                    break
            else:
                unknown.append(name)
    if unknown:
        raise ValueError(f"the checkpoint holds weights that no Segmenter has: {', '.join(unknown)}")
    return converted


def _load(model: SegmenterForSemanticSegmentation, weights: dict[str, Tensor]) -> None:
    wanted = model.state_dict()
    problems = [f"missing {name} {list(value.shape)}" for name, value in wanted.items() if name not in weights]
    for name, value in weights.items():
        if name not in wanted:
            problems.append(f"left over {name} {list(value.shape)}")
        elif value.shape != wanted[name].shape:
            problems.append(f"{name} is {list(value.shape)}, expected {list(wanted[name].shape)}")
    if problems:
        raise ValueError("the weights do not fit variant.yml (names as in ailurus_hf): " + "; ".join(problems))
    model.load_state_dict(weights)


__all__ = ["convert_segmenter_checkpoint"]
