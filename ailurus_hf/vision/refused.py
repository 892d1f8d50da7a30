"""What is refused, and why."""

from __future__ import annotations

_PYRAMID = (
    "it halves its grid from stage to stage and shifts or pools windows on it, so its tokens never leave the grid"
)
_NO_BIAS = (
    "its layers hand neither a mask nor a bias to their attention, so a representative cannot count for its tokens"
)

# By the start of the module's name, so that every class of a family is found.
REFUSED = {
    "sam2": _PYRAMID,
    "swin": _PYRAMID,
    "swinv2": _PYRAMID,
    "maskformer.modeling_maskformer_swin": _PYRAMID,
    "hiera": _PYRAMID,
    "pvt": _PYRAMID,
    "pvt_v2": _PYRAMID,
    "internvl": _NO_BIAS,
    "timm_backbone": "it reads timm's layers on the whole grid: load a ViT of timm with AutoModel, "
    "or in transformers' format",
}
