"""The original Segmenter, restated without transformers, and random checkpoints in its layout.

The functions say what rstrudel/segmenter computes, with its own weight names.
"""

import torch
import yaml
from torch.nn import functional as F

WIDTH, HEADS, LAYERS, PATCH, CLASSES = 128, 2, 3, 8, 5


# ------------------------------------------------------------------------------------------- the original, restated


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)


def block(x, w, name, heads):
    batch, length, width = x.shape
    qkv = linear(norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv")
    q, k, v = qkv.reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1)
    x = x + linear((attention @ v).transpose(1, 2).reshape(batch, length, width), w, f"{name}.attn.proj")
    return x + linear(F.gelu(linear(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")), w, f"{name}.mlp.fc2")


def positions(w, extra, image_size, grid):
    table = w["encoder.pos_embed"]
    old = (image_size[0] // PATCH, image_size[1] // PATCH)
    if old == grid:
        return table
    patches = table[:, extra:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bilinear")
    return torch.cat((table[:, :extra], patches.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)), dim=1)


def original_segmenter(images, w, variant):
    net = variant["net_kwargs"]
    height, width = images.shape[-2:]
    images = F.pad(images, (0, -width % PATCH, 0, -height % PATCH))
    grid = (images.shape[-2] // PATCH, images.shape[-1] // PATCH)

    x = F.conv2d(images, w["encoder.patch_embed.proj.weight"], w["encoder.patch_embed.proj.bias"], stride=PATCH)
    extra = [w["encoder.cls_token"]] + ([w["encoder.dist_token"]] if net["distilled"] else [])
    x = torch.cat([t.expand(len(images), -1, -1) for t in extra] + [x.flatten(2).transpose(1, 2)], dim=1)
    x = x + positions(w, len(extra), net["image_size"], grid)
    for i in range(net["n_layers"]):
        x = block(x, w, f"encoder.blocks.{i}", net["n_heads"])
    x = norm(x, w, "encoder.norm")[:, len(extra) :]

    if net["decoder"]["name"] == "linear":
        masks = linear(x, w, "decoder.head")
    else:
        x = linear(x, w, "decoder.proj_dec")
        x = torch.cat((x, w["decoder.cls_emb"].expand(len(x), -1, -1)), dim=1)
        for j in range(net["decoder"]["n_layers"]):
            x = block(x, w, f"decoder.blocks.{j}", net["d_model"] // 64)
        x = norm(x, w, "decoder.decoder_norm")
        patches, classes = x[:, : -net["n_cls"]], x[:, -net["n_cls"] :]
        patches, classes = patches @ w["decoder.proj_patch"], classes @ w["decoder.proj_classes"]
        patches = patches / patches.norm(dim=-1, keepdim=True)
        classes = classes / classes.norm(dim=-1, keepdim=True)
        masks = norm(patches @ classes.transpose(1, 2), w, "decoder.mask_norm")
    masks = masks.transpose(1, 2).reshape(len(x), net["n_cls"], *grid)
    masks = F.interpolate(masks, size=images.shape[-2:], mode="bilinear")
    return masks[..., :height, :width]


# --------------------------------------------------------------------------------------------- random checkpoints


def make_variant(image_size=(48, 48), distilled=False, decoder="mask_transformer"):
    decoder = {"name": decoder, "n_cls": CLASSES} | ({"n_layers": 2} if decoder == "mask_transformer" else {})
    return {
        "net_kwargs": {
            "backbone": "random",
            "d_model": WIDTH,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "n_cls": CLASSES,
            "patch_size": PATCH,
            "image_size": list(image_size),
            "normalization": "deit" if distilled else "vit",
            "distilled": distilled,
            "decoder": decoder,
        },
        "inference_kwargs": {"im_size": 48, "window_size": 48, "window_stride": 32},
    }


def make_weights(variant, seed=0):
    net = variant["net_kwargs"]
    generator = torch.Generator().manual_seed(seed)
    w = {}

    def add(name, *shape, std=0.1, mean=0.0):
        w[name] = mean + std * torch.randn(*shape, generator=generator)

    def add_linear(name, out, inn):
        add(f"{name}.weight", out, inn, std=inn**-0.5)
        add(f"{name}.bias", out)

    def add_norm(name, width):
        add(f"{name}.weight", width, mean=1.0)
        add(f"{name}.bias", width)

    def add_block(name):
        add_norm(f"{name}.norm1", WIDTH)
        add_norm(f"{name}.norm2", WIDTH)
        add_linear(f"{name}.attn.qkv", 3 * WIDTH, WIDTH)
        add_linear(f"{name}.attn.proj", WIDTH, WIDTH)
        add_linear(f"{name}.mlp.fc1", 4 * WIDTH, WIDTH)
        add_linear(f"{name}.mlp.fc2", WIDTH, 4 * WIDTH)

    extra = 2 if net["distilled"] else 1
    grid = [side // PATCH for side in net["image_size"]]
    add("encoder.cls_token", 1, 1, WIDTH)
    if net["distilled"]:
        add("encoder.dist_token", 1, 1, WIDTH)
        add_linear("encoder.head_dist", 1000, WIDTH)
    add("encoder.pos_embed", 1, extra + grid[0] * grid[1], WIDTH, std=1.0)
    add("encoder.patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
    add("encoder.patch_embed.proj.bias", WIDTH)
    for i in range(LAYERS):
        add_block(f"encoder.blocks.{i}")
    add_norm("encoder.norm", WIDTH)
    add_linear("encoder.head", 1000, WIDTH)
    if net["decoder"]["name"] == "linear":
        add_linear("decoder.head", CLASSES, WIDTH)
    else:
        add_linear("decoder.proj_dec", WIDTH, WIDTH)
        add("decoder.cls_emb", 1, CLASSES, WIDTH, std=1.0)
        add("decoder.proj_patch", WIDTH, WIDTH)
        add("decoder.proj_classes", WIDTH, WIDTH)
        for j in range(2):
            add_block(f"decoder.blocks.{j}")
        add_norm("decoder.decoder_norm", WIDTH)
        add_norm("decoder.mask_norm", CLASSES)
    return w


def save_checkpoint(folder, weights, variant):
    torch.save({"model": weights, "epoch": 3}, folder / "checkpoint.pth")
    (folder / "variant.yml").write_text(yaml.safe_dump(variant))
    return folder / "checkpoint.pth"
