"""Tiny VitDet and SAM encoders made from configs, and inputs for them."""

import torch
import transformers as hf

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
SAM = {**SIZES, "mlp_dim": 64, "output_channels": 8, "window_size": 4, "global_attn_indexes": [1, 3]}
VITDET = {**SIZES, "window_size": 4, "window_block_indices": [0, 2], "use_relative_position_embeddings": True}
VITDET |= {"pretrain_image_size": 32, "mlp_ratio": 2}
MODELS = {
    "VitDet": lambda **f: hf.VitDetModel(hf.VitDetConfig(**{**VITDET, **f})),
    "SAM": lambda **f: hf.SamVisionModel(hf.SamVisionConfig(**{**SAM, **f})),
    "SAM-HQ": lambda **f: hf.SamHQVisionModel(hf.SamHQVisionConfig(**{**SAM, **f})),
}


def make(name, **fields):
    torch.manual_seed(0)
    model = MODELS[name](**fields).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            if parameter_name.endswith("qkv.weight"):
                parameter[:64].mul_(2)
    return model


def images(batch=2, seed=0):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def predict(model, x):
    with torch.no_grad():
        return model(x).last_hidden_state
