"""Settings that were measured, by name: what `AiluRusConfig.preset` and `AiluRusDiffusionConfig.preset` start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

VisionPreset = Literal["paper", "dense", "classification"]
DiffusionPreset = Literal["fast", "balanced", "faithful"]

VISION_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Figures 3 and 4 of the paper: 400 of ViT-L's 1600 tokens at 640².
    "paper": {
        "cluster_location": 2,
        "num_clusters": 400,
        "clustering": "density_peaks",
        "restore": "copy",
        "restore_at": "decoder",
    },
    # docs/method.md, "clusters of CamVid".
    "dense": {"cluster_location": 2, "keep_ratio": 0.25, "clustering": "ward", "restore": "smooth"},
    # docs/results.md, "classification in steps".
    "classification": {
        "cluster_location": (1, 3),
        "keep_ratio": (0.65, 0.37),
        "clustering": "pairs",
        "restore": "copy",
    },
}

# What `apply_ailurus(model)` takes where nothing is given: a preset by what the model's class is for, else HALF.
PRESET_OF_CLASS: Mapping[str, VisionPreset] = {
    "ForSemanticSegmentation": "dense",
    "ForUniversalSegmentation": "dense",
    "ForImageClassification": "classification",
}
HALF: Mapping[str, Any] = {"cluster_location": 2, "keep_ratio": 0.5}

KEYS: Mapping[str, Any] = {"scope": "attention", "reduce": "kv", "refresh_every": 4, "extrapolate": True}
FEW_KEYS: Mapping[str, Any] = {**KEYS, "keep_ratio": {"largest": 0.0625}, "clustering": "kmeans"}
NEAR_KEYS: Mapping[str, Any] = {**KEYS, "keep_ratio": {"largest": 0.125}, "clustering": "pairs"}
# docs/results.md, "pictures from text, inner layers": "keys 0.0625 at full size, k-means, inner layers every 5, first
# 3, extrapolated", and the same with other clusterings. Pairs take longer to cluster, and are nearer where the rest is.
DIFFUSION_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"inner_every": 5, "unreduced_first_steps": 3, **FEW_KEYS},
    "balanced": {"inner_every": 3, "unreduced_first_steps": 3, **NEAR_KEYS},
    "faithful": {"inner_every": 2, "unreduced_first_steps": 5, **NEAR_KEYS},
}

KEPT_ALONE: Mapping[str, Any] = {
    "cluster_location": 0,
    "unreduced_first_steps": 3,
    "between": "nothing",
    "extrapolate": True,
}
# Of transformers on patches, which have one resolution: docs/results.md, "pictures of a transformer, few tokens".
TRANSFORMER_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # "first 3 steps whole, full every 5, extrapolated, nothing between"
    "fast": {"full_every": 5, **KEPT_ALONE},
    # "first 3 steps whole, full every 3, extrapolated, nothing between"
    "balanced": {"full_every": 3, **KEPT_ALONE},
    # "first 3 steps whole, full every 2, extrapolated, nothing between"
    "faithful": {"full_every": 2, **KEPT_ALONE},
}
