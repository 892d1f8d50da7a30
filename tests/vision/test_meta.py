"""A reduced forward waits for no device: every family, and every clustering, on meta tensors, where reading a value
raises.

So it makes no choice by values either, which a CUDA graph could not repeat. What transformers' own forward reads has
data here: EoMT's chance that a mask is predicted, SigLIP 2's grids. What a user may give to be checked is left out:
ViTMAE's noise, SigLIP 2's mask.
"""

import pytest
import torch
from every_model import EVERY, SOME
from models import CASES, patchified

from ailurus_hf import AiluRusConfig, ailurus_status, apply_ailurus
from ailurus_hf.clustering import clustering_names

META = torch.device("meta")


def on_meta(name):
    """The model without data."""
    with META:
        model = (CASES[name].make if name in CASES else EVERY[name].make)().eval()
    for module in model.modules():
        if hasattr(module, "attn_mask_probs"):
            module.attn_mask_probs = torch.nn.Buffer(torch.full((2,), float("predicting" in name)))
    return model


def forward(name, model, batch):
    """Of the model's images without data."""
    x = EVERY[name].images()[:batch].to(META)
    with META, torch.no_grad():
        if name == "ViTMAEModel":
            return model(x, interpolate_pos_encoding=True).last_hidden_state
        if name == "Siglip2VisionModel":
            patches = patchified(x, model.config.patch_size, {}, padding=0)
            grids = torch.tensor([CASES[name].grid] * len(x), device="cpu")
            return model(patches, pixel_attention_mask=None, spatial_shapes=grids).pooler_output
        return EVERY[name].forward(model, x)


def reduced(name, model, batch=2, **fields):
    apply_ailurus(model, AiluRusConfig(**{**EVERY[name].settings, **fields}))
    forward(name, model, batch)
    return ailurus_status(model).locations


@pytest.mark.parametrize("name", EVERY)
def test_no_family_reads_a_value(name):
    model = on_meta(name)
    # Stages and windows unmerge in one way.
    for fields in ({"restore": "residual"}, {"restore": "smooth", "restore_at": "decoder"}) if name in CASES else ({},):
        (location, *_) = reduced(name, model, **fields)
        assert location.num_clusters < location.num_tokens


@pytest.mark.parametrize("name", SOME)
def test_no_clustering_reads_a_value_in_a_model(name):
    model = on_meta(name)
    for clustering in clustering_names():
        (location, *_) = reduced(name, model, clustering=clustering)
        assert location.num_clusters < location.num_tokens


@pytest.mark.parametrize("clustering", clustering_names())
def test_nor_at_a_second_location_or_with_all_tokens_back(clustering):
    model = on_meta("ViTModel")
    fields = {"cluster_location": (1, 2), "keep_ratio": (0.5, 0.25), "restore_location": 3, "restore": "copy"}
    first, second = reduced("ViTModel", model, **fields, clustering=clustering)
    assert (first.num_clusters, second.num_clusters) == (48, 24)


def test_a_read_raises():
    model = on_meta("ViTModel")
    with pytest.raises(RuntimeError, match="meta"):
        reduced("ViTModel", model, batch=1, min_keep_ratio=0.1)  # as many as the image asks for, which has to be read
