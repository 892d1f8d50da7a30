"""What clustering, merging and unmerging cost beside the layers that they save, for images of 256² to 2048² pixels.

    python -m benchmarks.clustering.clustering_overhead      # ViT-B/16's layers, after layer 2, a quarter kept
    python -m benchmarks.clustering.clustering_overhead --sides 256 512 --keep 0.5

One layer on all tokens and one on the kept tokens are timed, and counted as often as the model runs them: "overhead" is
what clustering, merging and unmerging add to the layers of the reduced model, "speed-up" is that of the layers with it.
Random tokens and weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from ailurus_hf.clustering import get_clustering

from ..harness import environment, interleaved, log, markdown, save

PATCH, WIDTH, LAYERS, HEADS = 16, 768, 12, 12
COLUMNS = {
    "side": "image|{0}²",
    "clustering": "clustering",
    "num_tokens": "tokens",
    "num_clusters": "kept",
    "cluster_ms": "cluster + merge + unmerge|{:.1f} ms",
    "plain_ms": "plain layers|{:.0f} ms",
    "reduced_ms": "reduced layers|{:.0f} ms",
    "overhead": "overhead|{:.1%}",
    "speed_up": "speed-up|{:.2f}×",
}


@torch.inference_mode()
def measure(side: int, keep: float, location: int, repeats: int, width: int = WIDTH) -> list[dict[str, Any]]:
    """A row for each clustering, of images of side² pixels."""
    config = ViTConfig(
        hidden_size=width, num_attention_heads=HEADS, intermediate_size=4 * width, attn_implementation="sdpa"
    )
    layer, grid = ViTLayer(config).eval(), (side // PATCH, side // PATCH)
    num_tokens = grid[0] * grid[1]
    count = max(round(keep * num_tokens), 1)
    tokens = torch.randn(3, 1, num_tokens, width)

    def clustering(name: str) -> Any:
        cluster = get_clustering(name)

        def run(turn: int) -> None:
            x = tokens[turn % 3]
            clusters = cluster(x, grid, count)
            clusters.unmerge(clusters.merge(x))

        return run

    names = ("density_peaks", "local_kmeans", "ward")
    contenders = {
        "all": lambda turn: layer(tokens[turn % 3]),
        "kept": lambda turn: layer(tokens[turn % 3][:, :count]),
        **{name: clustering(name) for name in names},
    }
    ms = {name: 1e3 * seconds for name, seconds in interleaved(contenders, repeats, warmup=1).items()}
    plain, reduced = LAYERS * ms["all"], location * ms["all"] + (LAYERS - location) * ms["kept"]
    return [
        {
            "side": side,
            "clustering": name,
            "num_tokens": num_tokens,
            "num_clusters": count,
            "cluster_ms": ms[name],
            "plain_ms": plain,
            "reduced_ms": reduced,
            "overhead": ms[name] / reduced,
            "speed_up": plain / (reduced + ms[name]),
        }
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", type=int, default=[256, 512, 1024, 2048], help="pixels")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--location", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="clustering_overhead", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for side in args.sides:
        rows += measure(side, args.keep, args.location, args.repeats)
        log.info(markdown(rows[-3:], COLUMNS))
    save(args.name, rows, environment(torch.device("cpu"), "fp32"))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
