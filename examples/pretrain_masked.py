"""Masked-image pretraining of a small Segmenter's encoder, on the training photographs alone (no labels).

    python examples/pretrain_masked.py --data CAMVID --output pretrained --minutes 15

The encoder sees a quarter of a window's patches; a light decoder predicts the pixels of the others (MAE, He et al.
2021). Writes a Segmenter folder for `train_segmenter.py --init`.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from camvid_data import CLASSES, HEIGHT, PATCH, CamVid, training_batch, window_positions
from torch import Tensor, nn
from torch.nn import functional as F
from training import data_folder
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from ailurus_hf.segmenter import SegmenterConfig, SegmenterForSemanticSegmentation

log = logging.getLogger("pretrain")


def small_segmenter(
    grid: tuple[int, int], width: int, layers: int, decoder_layers: int
) -> SegmenterForSemanticSegmentation:
    """A Segmenter for CamVid whose position embeddings lie on the grid of a whole image's patches."""
    encoder = {
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "image_size": [grid[0] * PATCH, grid[1] * PATCH],
        "patch_size": PATCH,
    }
    config = SegmenterConfig(
        encoder_config=encoder,
        decoder_config={"num_hidden_layers": decoder_layers},
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
        semantic_loss_ignore_index=len(CLASSES),
    )
    return SegmenterForSemanticSegmentation(config)


def start_well(model: SegmenterForSemanticSegmentation, data: CamVid) -> None:
    """Starting values for a Segmenter without pretraining."""
    pixels = torch.stack([data.image(i) for i in range(0, len(data), 4)])[:, :, : HEIGHT // PATCH * PATCH]
    start_embeddings(model.encoder.embeddings, pixels, data.grid)
    start_attention([*model.encoder.layers, *model.decoder.layers])


@torch.no_grad()
def start_embeddings(embeddings: nn.Module, pixels: Tensor, grid: tuple[int, int]) -> None:
    """Patch embedding: the patches' principal components, partly whitened. Positions: sines and cosines."""
    width = embeddings.position_embeddings.shape[-1]
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    variance, directions = torch.linalg.eigh(torch.cov(patches.T))
    variance, directions = variance.flip(0)[:width], directions.flip(1)[:, :width]
    filters = directions / (variance + variance[width // 8]).sqrt()
    embeddings.patch_embeddings.projection.weight.copy_(filters.T.reshape(width, 3, PATCH, PATCH))
    embeddings.patch_embeddings.projection.bias.copy_(-patches.mean(0) @ filters)
    embeddings.position_embeddings[0, 1:] = 0.5 * sine_positions(grid, width)


@torch.no_grad()
def start_attention(layers: Iterable[nn.Module]) -> None:
    """Query and key alike, value and output opposite to the identity (Trockman and Kolter 2023).

    It spares a ViT without pretraining the learning of the obvious.
    """
    for layer in layers:
        attention = layer.attention
        width = attention.q_proj.in_features
        for head in range(attention.num_attention_heads):
            rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            u, s, v = torch.linalg.svd(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width))
            root = s[: attention.head_dim].sqrt()[:, None]
            attention.q_proj.weight[rows] = root * u.T[: attention.head_dim]
            attention.k_proj.weight[rows] = root * v[: attention.head_dim]
        u, s, v = torch.linalg.svd(0.4 * torch.randn(width, width) / width**0.5 - 0.4 * torch.eye(width))
        attention.v_proj.weight.copy_(s.sqrt()[:, None] * v)
        attention.o_proj.weight.copy_(u * s.sqrt())


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of row and column, Tensor[h * w, width]."""
    frequency = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [side.flatten()[:, None] * frequency for side in (rows, columns)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


class MaskedPretraining(nn.Module):
    """The encoder on the visible patches, two narrow layers on all cells, and the loss on the hidden patches."""

    def __init__(self, segmenter: SegmenterForSemanticSegmentation, whole: tuple[int, int], width: int = 128):
        super().__init__()
        self.encoder, self.whole = segmenter.encoder, whole
        config = ViTConfig(
            hidden_size=width, num_attention_heads=2, intermediate_size=4 * width, attn_implementation="eager"
        )
        self.narrow = nn.Linear(segmenter.config.hidden_size, width)
        self.hidden_token = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList([ViTLayer(config) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 3 * PATCH * PATCH)
        positions = torch.cat((torch.zeros(1, width), sine_positions(whole, width)))
        self.register_buffer("positions", positions[None])

    def forward(self, images: Tensor, corners: Tensor, grid: tuple[int, int], keep: float) -> Tensor:
        """Mean squared error of the hidden patches' normalized pixels; images Tensor[B, 3, h, w]."""
        tokens = self.encoder.embeddings.patch_embeddings(images)
        batch, count, _ = tokens.shape
        positions = window_positions(self.encoder.embeddings.position_embeddings, corners, grid, self.whole)
        order = torch.rand(batch, count).argsort(1)
        visible = order[:, : int(count * keep)]
        pick = visible[..., None].expand(-1, -1, tokens.shape[-1])
        tokens = (tokens + positions[:, 1:]).gather(1, pick)
        first = (self.encoder.embeddings.cls_token + positions[:, :1]).to(tokens.dtype)
        hidden = torch.cat((first, tokens), dim=1)
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        hidden = self.narrow(self.encoder.layernorm(hidden))[:, 1:]

        everywhere = self.hidden_token.to(hidden.dtype).expand(batch, count, -1)
        everywhere = everywhere.scatter(1, visible[..., None].expand(-1, -1, hidden.shape[-1]), hidden)
        everywhere = everywhere + window_positions(self.positions, corners, grid, self.whole)[:, 1:]
        for layer in self.layers:
            everywhere = layer(everywhere)
        masked = order[:, int(count * keep) :]
        everywhere = everywhere.gather(1, masked[..., None].expand(-1, -1, everywhere.shape[-1]))
        predicted = self.pixels(self.norm(everywhere)).float()

        target = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        target = target.gather(1, masked[..., None].expand(-1, -1, target.shape[-1]))
        target = F.layer_norm(target, target.shape[-1:], eps=1e-3)
        return F.mse_loss(predicted, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="CamVid folder (default: $AILURUS_DATA/camvid)")
    parser.add_argument("--output", required=True, help="folder to write the Segmenter to")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--decoder-layers", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=(12, 16), help="patches of a window")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    set_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    data = CamVid(data_folder(args.data, "camvid"), "train")
    model = small_segmenter(data.grid, args.width, args.layers, args.decoder_layers)
    start_well(model, data)
    model.set_attn_implementation("eager")  # on a CPU, in training, faster than SDPA at so few tokens
    masked = MaskedPretraining(model, data.grid)
    optimizer = torch.optim.AdamW(masked.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    started, step, losses = time.time(), 0, []
    while (progress := (time.time() - started) / (60 * args.minutes)) < 1:
        # Warm up, hold, and fall to nothing over the last third: right whatever the number of steps turns out to be.
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 100, 3 * (1 - progress))
        indices = rng.integers(len(data), size=args.batch_size).tolist()
        images, _, corners = training_batch(data, indices, tuple(args.grid), (0.7, 1.8), 0.0, rng)
        with torch.autocast("cpu", torch.bfloat16):
            loss = masked(images, corners, tuple(args.grid), keep=0.25)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(masked.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0:
            rate = step * args.batch_size / (time.time() - started)
            log.info("step %d  loss %.4f  %.0f windows/s  %.0f %%", step, np.mean(losses[-50:]), rate, 100 * progress)
    model.save_pretrained(args.output)
    report = {"steps": step, "loss": float(np.mean(losses[-50:])), "minutes": args.minutes, "args": vars(args)}
    (Path(args.output) / "pretraining.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
