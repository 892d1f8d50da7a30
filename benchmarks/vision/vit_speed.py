"""How much of the speed-up that the FLOPs allow is reached on full-size ViTs, and what clustering costs.

"Of slicing": the time of the same layers on the first M tokens (nothing clustered, merged, weighted or unmerged) over
ours. What that leaves of the share is the machine's: matrix products of fewer rows run at a lower rate.

    python -m benchmarks.vision.vit_speed                 # ViT-L at 640 x 640 and ViT-B at 512 x 512, batch 1, fp32
    python -m benchmarks.vision.vit_speed --device cuda --dtype bf16 --batch 16

Random weights: speed does not depend on them. Fidelity here is the cosine to the plain model's output on random images,
a lower bound that real images and weights do not reach; benchmarks.vision.segmenter_quality measures quality.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import ViTConfig, ViTModel

from ailurus_hf import AiluRusConfig, ailurus_status, apply_ailurus
from ailurus_hf.clustering import ClusterFunction, get_clustering
from ailurus_hf.vision.discovery import find_encoders

from ..harness import DTYPES, SPEED_COLUMNS, environment, interleaved, log, markdown, model_flops, save
from ..peers.slicing import slice_layers

GEOMETRIES = {
    "ViT-L/16 640": (640, 400, {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}),
    "ViT-B/16 512": (512, 256, {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}),
}
COLUMNS = {
    "model": "model",
    "clustering": "clustering",
    **SPEED_COLUMNS,
    "share_of_slicing": "of slicing|{:.3f}",
    "overhead": "cluster + merge + unmerge|{:.2%}",
    "cosine": "cosine|{:.3f}",
}


def make_vit(name: str) -> ViTModel:
    """The model of a geometry, with new weights."""
    size, _, sizes = GEOMETRIES[name]
    config = ViTConfig(**sizes, intermediate_size=4 * sizes["hidden_size"], image_size=size, patch_size=16)
    return ViTModel(config, add_pooling_layer=False)


@torch.inference_mode()
def measure(
    name: str,
    clusterings: Sequence[str],
    repeats: int,
    location: int = 2,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    batch: int = 1,
) -> list[dict[str, Any]]:
    """A row a clustering: plain and reduced forwards in turn, and the clustering steps alone on the features at L.

    All contenders are one set of weights: where in memory weights lie moves a ratio by several percent.
    """
    (size, num_clusters, _), device = GEOMETRIES[name], torch.device(device)
    torch.manual_seed(0)
    plain = make_vit(name).eval().to(device, DTYPES[precision])
    images = torch.randn(4, batch, 3, size, size).to(device, DTYPES[precision])
    full = model_flops(lambda: plain(images[0]))
    before = plain(images[0], output_hidden_states=True)
    tokens, grid = before.hidden_states[location][:, 1:].contiguous(), (size // 16, size // 16)

    def twin() -> ViTModel:
        with torch.device("meta"):
            model = make_vit(name).eval()
        model.load_state_dict(plain.state_dict(), assign=True)
        return model

    sliced = twin()
    layers = find_encoders(sliced)[0].layers[location:]
    slice_layers(layers, {tokens.shape[1]: num_clusters}, prefix=1, pad=False)
    contenders: dict[str, Callable[[int], Any]] = {
        "plain": lambda n: plain(images[n % len(images)]),
        "slicing": lambda n: sliced(images[n % len(images)]),
    }
    rows: list[dict[str, Any]] = []
    for clustering in clusterings:
        settings = AiluRusConfig(cluster_location=location, num_clusters=num_clusters, clustering=clustering)
        reduced = apply_ailurus(twin(), settings)
        after = reduced(images[0]).last_hidden_state.float()
        rows.append(
            {
                "model": name,
                "clustering": clustering,
                "location": location,
                "num_tokens": tokens.shape[1],
                "num_clusters": num_clusters,
                "batch": batch,
                "ideal": full / (full - batch * ailurus_status(reduced).saved_flops),
                "cosine": cosine_similarity(before.last_hidden_state.float(), after, dim=-1).mean().item(),
            }
        )
        contenders[clustering] = lambda n, model=reduced: model(images[n % len(images)])
        contenders[f"{clustering} steps"] = partial(_steps, get_clustering(clustering), tokens, grid, num_clusters)

    seconds = interleaved(contenders, repeats, device=device)
    for row in rows:
        reduced_seconds, steps = seconds[row["clustering"]], seconds[f"{row['clustering']} steps"]
        row["speed_up"] = seconds["plain"] / reduced_seconds
        row["share_of_ideal"] = row["speed_up"] / row["ideal"]
        row["share_of_slicing"] = seconds["slicing"] / reduced_seconds
        row["overhead"] = steps / reduced_seconds
        row |= {"plain_ms": 1e3 * seconds["plain"], "reduced_ms": 1e3 * reduced_seconds, "steps_ms": 1e3 * steps}
    return rows


def _steps(cluster: ClusterFunction, tokens: Tensor, grid: tuple[int, int], num_clusters: int, _: int) -> None:
    clusters = cluster(tokens, grid, num_clusters)
    clusters.unmerge(clusters.merge(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--clusterings", nargs="+", default=["density_peaks", "local_kmeans"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--name", default="vit_speed", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for name in args.models:
        options = {"device": args.device, "precision": args.dtype, "batch": args.batch}
        rows += measure(name, args.clusterings, args.repeats, **options)
        log.info("%s done", name)
    save(args.name, rows, environment(args.device, args.dtype))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
