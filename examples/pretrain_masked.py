"""Masked-image pretraining of a small Segmenter's encoder, on the training photographs alone (no labels).

    python examples/pretrain_masked.py --data CAMVID --output pretrained --minutes 15
    python examples/pretrain_masked.py --data CAMVID --output pretrained --steps 2000 --masks cells --ailurus 2,24

The encoder sees a quarter of a window's patches; a light decoder predicts the pixels of the others (MAE, He et al.
2021). Writes a Segmenter folder for `train_segmenter.py --init`.

--ailurus L,M runs the layers after L on M representatives of the visible tokens. Patches that are visible at random lie
on no grid, on which tokens could be near each other, so it takes --masks cells: of every 2 x 2 patches one is visible
(Li et al. 2022, "Uniform Masking"), and those form a grid of half the sides. Hidden patches take no part in the
clustering, which would tell of what is to be predicted. For the decoder every visible token gets back its own value
after L and what its representative has gained since.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed
from camvid_data import CLASSES, HEIGHT, PATCH, CamVid, training_batch, window_positions
from torch import Tensor, nn
from torch.nn import functional as F
from training import Stopwatch, data_folder
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from ailurus_hf.choices import clustering_names
from ailurus_hf.clustering import get_clustering
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


class Reduction(NamedTuple):
    """After layer `location` the encoder runs on so many representatives of the visible tokens."""

    location: int
    num_clusters: int
    clustering: str


def random_order(batch: int, grid: tuple[int, int]) -> Tensor:
    """Every patch's index once, in random order, LongTensor[B, h * w]: the first ones are visible."""
    return torch.rand(batch, grid[0] * grid[1]).argsort(1)


def order_by_cells(batch: int, grid: tuple[int, int]) -> Tensor:
    """The same, but one patch of every 2 x 2 comes first, in the order of the cells' own grid."""
    rows, columns = grid[0] // 2, grid[1] // 2
    index = torch.arange(grid[0] * grid[1]).view(rows, 2, columns, 2).transpose(1, 2).reshape(-1, 4)
    turns = torch.rand(batch, rows * columns, 4).argsort(-1)
    return index.expand(batch, -1, -1).gather(2, turns).transpose(1, 2).flatten(1)


class MaskedPretraining(nn.Module):
    """The encoder on the visible patches, two narrow layers on all cells, and the loss on the hidden patches."""

    def __init__(
        self,
        segmenter: SegmenterForSemanticSegmentation,
        whole: tuple[int, int],
        width: int = 128,
        by_cells: bool = False,
        reduction: Reduction | None = None,
    ):
        super().__init__()
        self.encoder, self.whole, self.by_cells, self.reduction = segmenter.encoder, whole, by_cells, reduction
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
        order = order_by_cells(batch, grid) if self.by_cells else random_order(batch, grid)
        visible = order[:, : int(count * keep)]
        pick = visible[..., None].expand(-1, -1, tokens.shape[-1])
        tokens = (tokens + positions[:, 1:]).gather(1, pick)
        first = (self.encoder.embeddings.cls_token + positions[:, :1]).to(tokens.dtype)
        hidden = self.encoded(torch.cat((first, tokens), dim=1), (grid[0] // 2, grid[1] // 2))
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

    def encoded(self, hidden: Tensor, cells: tuple[int, int]) -> Tensor:
        """The class token and the visible tokens through all layers; cells: the visible tokens' grid."""
        layers = list(self.encoder.layers)
        location = None if self.reduction is None else self.reduction.location
        for layer in layers[:location]:
            hidden = layer(hidden)
        if self.reduction is None:
            return hidden
        first, tokens = hidden[:, :1], hidden[:, 1:]
        clusters = get_clustering(self.reduction.clustering)(tokens.detach(), cells, self.reduction.num_clusters)
        merged = clusters.merge(tokens)
        # A representative weighs in attention as the tokens that it stands for did.
        weight = F.pad(clusters.counts.log(), (1, 0))[:, None, None].to(hidden.dtype)
        reduced = torch.cat((first, merged), dim=1)
        for layer in layers[location:]:
            reduced = layer(reduced, weight)
        return torch.cat((reduced[:, :1], tokens + clusters.unmerge(reduced[:, 1:] - merged)), dim=1)


def two_numbers(text: str) -> tuple[int, int]:
    first, second = map(int, text.split(","))
    return first, second


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what cannot be done, before anything is read."""
    if args.masks == "cells" and any(side % 2 for side in args.grid):
        parser.error(f"--masks cells needs a --grid of even sides, got {args.grid[0]} {args.grid[1]}")
    if args.ailurus is None:
        return
    if args.masks != "cells":
        parser.error("--ailurus needs --masks cells: patches that are visible at random lie on no grid")
    location, num_clusters = args.ailurus
    visible = args.grid[0] * args.grid[1] // 4
    if not 0 <= location < args.layers or not 1 <= num_clusters <= visible:
        parser.error(
            f"--ailurus L,M: L from 0 to {args.layers - 1} and M from 1 to {visible} visible tokens, got {args.ailurus}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="CamVid folder (default: $AILURUS_DATA/camvid)")
    parser.add_argument("--output", required=True, help="folder to write the Segmenter to")
    parser.add_argument("--minutes", type=float, default=15, help="of training; a pause does not count")
    parser.add_argument("--steps", type=int, help="so many, however long they take, instead of --minutes")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--decoder-layers", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=(12, 16), help="patches of a window")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--masks", default="random", choices=["random", "cells"], help="cells: three of every 2 x 2")
    parser.add_argument("--ailurus", type=two_numbers, metavar="L,M", help="M tokens after layer L; with --masks cells")
    parser.add_argument("--clustering", default="local_kmeans", choices=clustering_names())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    check(parser, args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    set_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    data = CamVid(data_folder(args.data, "camvid"), "train")
    model = small_segmenter(data.grid, args.width, args.layers, args.decoder_layers)
    start_well(model, data)
    model.set_attn_implementation("eager")  # on a CPU, in training, faster than SDPA at so few tokens
    reduction = Reduction(*args.ailurus, args.clustering) if args.ailurus else None
    masked = MaskedPretraining(model, data.grid, by_cells=args.masks == "cells", reduction=reduction)
    optimizer = torch.optim.AdamW(masked.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    step, minutes, losses, clock = 0, 0.0, [], Stopwatch()
    while (progress := step / args.steps if args.steps else minutes / args.minutes) < 1:
        started = time.time()
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
        minutes += clock.counted(time.time() - started) / 60
        if step % 50 == 0:
            rate = args.batch_size / clock.typical
            log.info("step %d  loss %.4f  %.0f windows/s  %.0f %%", step, np.mean(losses[-50:]), rate, 100 * progress)
    model.save_pretrained(args.output)
    report = {"steps": step, "loss": float(np.mean(losses[-50:])), "minutes": minutes, "args": vars(args)}
    (Path(args.output) / "pretraining.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
