"""Plain and reduced, each compiled: the share of the FLOPs-ideal that is reached, and how long compiling takes.

    python -m benchmarks.vision.compiled_speed                      # all of GEOMETRIES, batch 1, fp32
    python -m benchmarks.vision.compiled_speed --precision bf16 --models "ViT-B/16 512"
    python -m benchmarks.vision.compiled_speed --tiny               # a dry run in seconds: measures and saves nothing
    python -m benchmarks.vision.compiled_speed --precision bf16 --device cuda

Every contender is one graph (fullgraph) on the same weights. "Of slicing": the time of the same layers on the first M
tokens (nothing clustered, merged or weighted) over ours; what that leaves of the share is the machine's. Compile time
is that of the first call, with no cache of earlier runs. UNets: `python -m benchmarks.diffusion_speed --compile`.
Random weights but for the Segmenter: speed does not depend on them; cosines to the plain model's prediction are of
random images, a lower bound.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import ViTConfig, ViTModel

from ailurus_hf import AiluRusConfig, SegmenterForSemanticSegmentation, ailurus_status, apply_ailurus
from ailurus_hf.evaluation.timing import wait_for
from ailurus_hf.status import LocationStatus
from ailurus_hf.vision.discovery import find_encoders

from ..harness import DTYPES, SPEED_COLUMNS, environment, interleaved, log, markdown, model_flops, save
from ..peers.slicing import slice_layers
from . import families_speed, vit_speed
from .segmenter_quality import SHIPPED

COLUMNS = {
    "model": "model",
    "clustering": "clustering",
    **SPEED_COLUMNS,
    "share_of_slicing": "of slicing|{:.3f}",
    "plain_compile_s": "compiling plain|{:.0f} s",
    "compile_s": "reduced|{:.0f} s",
    "cosine": "cosine|{:.3f}",
    "cosine_eager": "to eager|{:.4f}",
}


@dataclass(frozen=True)
class Geometry:
    """make: the model, for images of height and width `size`. prediction: from its output. fields: of AiluRusConfig."""

    make: Callable[[], nn.Module]
    size: tuple[int, int]
    prediction: Callable[[Any], Tensor]
    fields: dict[str, Any]


def of_vit(name: str) -> Geometry:
    size, num_clusters, _ = vit_speed.GEOMETRIES[name]
    fields = {"cluster_location": 2, "num_clusters": num_clusters}
    return Geometry(lambda: vit_speed.make_vit(name), (size, size), lambda out: out.last_hidden_state, fields)


def of_family(name: str) -> Geometry:
    given = families_speed.GEOMETRIES[name]
    return Geometry(lambda: given.make(given.size), (given.size, given.size), given.prediction, given.fields)


GEOMETRIES = {
    "ViT-B/16 512": of_vit("ViT-B/16 512"),
    "ViT-L/16 640": of_vit("ViT-L/16 640"),
    "DINOv2-L + DPT head 518": of_family("DINOv2-L + DPT head 518"),
    "Segmenter, shipped, 720 × 960": Geometry(
        lambda: SegmenterForSemanticSegmentation.from_pretrained(SHIPPED, dtype=torch.float32),
        (720, 960),
        lambda out: out.logits,
        {"cluster_location": 2, "keep_ratio": 0.25},
    ),
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 24, "num_attention_heads": 2}


def tiny(name: str) -> Geometry:
    """The geometry of a dry run: a model of the same kind, or the same one on a small image."""
    given = GEOMETRIES[name]
    if name in families_speed.GEOMETRIES:
        small = partial(families_speed.depth_anything, 84, SMALL, (8, 8, 16, 16), 8)
        return replace(given, make=small, size=(84, 84))
    if name in vit_speed.GEOMETRIES:
        config = ViTConfig(**{**SMALL, "num_hidden_layers": 4}, image_size=128)
        fields = {"cluster_location": 2, "num_clusters": 16}
        return replace(given, make=lambda: ViTModel(config, add_pooling_layer=False), size=(128, 128), fields=fields)
    return replace(given, size=(96, 128))


@torch.no_grad()
def measure(
    name: str,
    clusterings: Sequence[str],
    precision: str,
    repeats: int,
    backend: str = "inductor",
    geometry: Geometry | None = None,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """A row a clustering; forwards of all contenders in turn. geometry: instead of the one of that name."""
    geometry, device = geometry or GEOMETRIES[name], torch.device(device)
    torch.manual_seed(0)
    plain = geometry.make().eval().to(device, DTYPES[precision])
    images = torch.randn(3, 1, 3, *geometry.size).to(device, DTYPES[precision])
    full, before = model_flops(lambda: plain(images[0])), geometry.prediction(plain(images[0]))
    contenders: dict[str, Callable[[int], Any]] = {}
    _, plain_compile = _compiled(sharing_weights(plain), images, contenders, "plain", backend)
    rows: list[dict[str, Any]] = []
    for clustering in clusterings:
        reduced = apply_ailurus(sharing_weights(plain), AiluRusConfig(**geometry.fields, clustering=clustering))
        eager = geometry.prediction(reduced(images[0]))
        row = {"model": name, "clustering": clustering, "precision": precision, **geometry.fields}
        status = ailurus_status(reduced)
        row["ideal"] = full / (full - status.saved_flops)
        if "slicing" not in contenders:
            _compiled(sliced(sharing_weights(plain), status.locations[0]), images, contenders, "slicing", backend)
        output, row["compile_s"] = _compiled(reduced, images, contenders, clustering, backend)
        after = geometry.prediction(output)
        row["plain_compile_s"] = plain_compile
        row |= {"cosine": _cosine(before, after), "cosine_eager": _cosine(eager, after)}
        rows.append(row)
        log.info("%s, %s compiled in %.0f s", name, clustering, row["compile_s"])
    with torch._dynamo.config.patch(recompile_limit=8 * len(contenders)):
        seconds = interleaved(contenders, repeats, warmup=2, device=device)
    for row in rows:
        row |= {"plain_ms": 1e3 * seconds["plain"], "reduced_ms": 1e3 * seconds[row["clustering"]]}
        row["speed_up"] = row["plain_ms"] / row["reduced_ms"]
        row["share_of_ideal"] = row["speed_up"] / row["ideal"]
        row["share_of_slicing"] = seconds["slicing"] / seconds[row["clustering"]]
    return rows


def sliced(model: nn.Module, like: LocationStatus) -> nn.Module:
    """The model with the layers of its encoder after a location on the first tokens, as many as there are clusters."""
    (found,) = find_encoders(model)
    layers = found.layers[like.location :]
    assert like.num_tokens is not None and like.num_clusters is not None
    slice_layers(layers, {like.num_tokens: like.num_clusters}, found.prefix)
    return model


def sharing_weights(model: nn.Module, replaced: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A copy on the same weights: where in memory weights lie moves a ratio by several percent.

    replaced: modules of it that the copy has others for.
    """
    kept: dict[int, Any] = {id(each): each for each in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, kept | {id(old): new for old, new in (replaced or {}).items()})


def _compiled(
    model: nn.Module, images: Tensor, contenders: dict[str, Callable[[int], Any]], name: str, backend: str
) -> tuple[Any, float]:
    """Adds the compiled model to the contenders; its first output, and the seconds until that was there."""
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    contenders[name] = lambda n: compiled(images[n % len(images)])
    # All contenders run the same code, of which torch keeps no more than 8 graphs unless told otherwise.
    limit = torch._dynamo.config.patch(recompile_limit=8 * len(contenders))
    with limit, torch._inductor.config.patch(force_disable_caches=True):
        start = time.perf_counter()
        output = contenders[name](0)
        wait_for(images.device)
        return output, time.perf_counter() - start


def _cosine(one: Tensor, other: Tensor) -> float:
    return cosine_similarity(one.flatten(1).double(), other.flatten(1).double()).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--clusterings", nargs="+", default=["local_kmeans", "density_peaks", "ward"])
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="a dry run on small geometries; saves nothing")
    parser.add_argument("--name", default="compiled_speed", help="of the result file (default: %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for name in args.models:
        torch.compiler.reset()
        if args.tiny:
            rows += measure(name, args.clusterings, args.precision, 1, "eager", tiny(name))
        else:
            rows += measure(name, args.clusterings, args.precision, args.repeats, device=args.device)
            save(args.name, rows, environment(args.device, args.precision))
        print(markdown(rows[-len(args.clusterings) :], COLUMNS), flush=True)


if __name__ == "__main__":
    main()
