"""Clustering, and a ViT with it: eager, compiled, as a CUDA graph, and compiled as a CUDA graph.

    python -m benchmarks.clustering.launch_modes --device cuda --dtype bf16
    python -m benchmarks.clustering.launch_modes --modes eager compiled           # on a CPU, which has no such graphs
    python -m benchmarks.clustering.launch_modes --device cuda --clusterings local_kmeans "local_kmeans, triton"

A CUDA graph is launched whole, so what it takes is what the kernels take; eager adds what their launches cost. Each
contender is held against the plain model in the same mode. "Differs": of a clustering, the share of tokens that another
mode assigns otherwise than eager; of a model, the largest difference over the largest value.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ailurus_hf import AiluRusConfig, ailurus_status, apply_ailurus
from ailurus_hf.clustering import Clustering, LocalKMeans, get_clustering
from ailurus_hf.evaluation.timing import wait_for

from ..harness import DTYPES, environment, interleaved, log, markdown, model_flops, save
from ..vision import vit_speed
from ..vision.compiled_speed import sharing_weights

MODES = ("eager", "compiled", "CUDA graph", "compiled, CUDA graph")
# Tokens as a grid, channels, clusters: of a ViT-B at 512², of Stable Diffusion 1.5 at 512² and at 1024².
SHAPES = {
    "1024 tokens of 768": ((32, 32), 768, 256),
    "4096 tokens of 320": ((64, 64), 320, 1024),
    "16384 tokens of 320": ((128, 128), 320, 4096),
}
# Clusterings by names of their own, with settings that are no default.
WITH_SETTINGS: dict[str, Clustering] = {"local_kmeans, triton": LocalKMeans(kernel="triton")}
COLUMNS = {
    "of": "of",
    "batch": "images",
    "clustering": "clustering",
    "mode": "mode",
    "ms": "time|{:.2f} ms",
    "speed_up": "speed-up|{:.2f}×",
    "ideal": "FLOPs-ideal|{:.2f}×",
    "share_of_ideal": "share|{:.3f}",
    "compile_s": "compiling|{:.0f} s",
    "differs": "differs|{:.1e}",
}
Run = Callable[[Tensor], Any]


def as_graph(run: Run, x: Tensor) -> Run:
    """`run` as a CUDA graph; the returned call copies its tensor in, launches, and returns the graph's own output."""
    fixed, side = x.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made in a first call is no part of the graph
        for _ in range(3):
            run(fixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(fixed)

    def replay(other: Tensor) -> Any:
        fixed.copy_(other)
        graph.replay()
        return output

    return replay


def in_mode(run: Run, x: Tensor, mode: str, backend: str) -> tuple[Run, float | None]:
    """The call in a mode, and the seconds that compiling took."""
    seconds = None
    if mode.startswith("compiled"):
        run = torch.compile(run, fullgraph=True, dynamic=False, backend=backend)
        start = time.perf_counter()
        with torch._inductor.config.patch(force_disable_caches=True):
            run(x)
            wait_for(x.device)
        seconds = time.perf_counter() - start
    return (as_graph(run, x) if mode.endswith("CUDA graph") else run), seconds


def measured(
    runs: dict[str, Run], inputs: Tensor, mode: str, repeats: int, backend: str, differs: Callable[[Any, Any], float]
) -> dict[str, dict[str, Any]]:
    """A row a contender in one mode, all in turn. inputs: Tensor[K, …], one for each round."""
    torch.compiler.reset()
    calls, rows = {}, {}
    for name, run in runs.items():
        eager = run(inputs[0])
        calls[name], seconds = in_mode(run, inputs[0], mode, backend)
        found = differs(eager, calls[name](inputs[0]))
        rows[name] = {"clustering": name, "mode": mode, "compile_s": seconds, "differs": found}
    turns = {name: lambda n, call=call: call(inputs[n % len(inputs)]) for name, call in calls.items()}
    taken = interleaved(turns, repeats, warmup=2, device=inputs.device)
    for name, row in rows.items():
        row["ms"] = 1e3 * taken[name]
    return rows


@torch.no_grad()
def measure_clustering(
    shape: str,
    clusterings: Sequence[str],
    modes: Sequence[str],
    repeats: int,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    batch: int = 1,
    backend: str = "inductor",
) -> list[dict[str, Any]]:
    """A row a clustering and mode: clusters of random tokens, merged and unmerged."""
    grid, channels, count = SHAPES[shape]
    torch.manual_seed(0)
    tokens = torch.randn(3, batch, grid[0] * grid[1], channels).to(device, DTYPES[precision])

    def contender(name: str) -> Run:
        clustering = get_clustering(WITH_SETTINGS.get(name, name))

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            clusters = clustering(x, grid, count)
            return clusters.assignment, clusters.unmerge(clusters.merge(x))

        return run

    def differs(eager: Any, other: Any) -> float:
        return (eager[0] != other[0]).float().mean().item()

    runs = {name: contender(name) for name in clusterings}
    rows: list[dict[str, Any]] = []
    for mode in modes:
        found = measured(runs, tokens, mode, repeats, backend, differs)
        rows += [{"of": shape, "batch": batch, "num_clusters": count, **row} for row in found.values()]
    return rows


@torch.no_grad()
def measure_vit(
    name: str,
    clusterings: Sequence[str],
    modes: Sequence[str],
    repeats: int,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    batch: int = 1,
    location: int = 2,
    backend: str = "inductor",
) -> list[dict[str, Any]]:
    """A row a mode for the plain model and for each clustering."""
    size, num_clusters, _ = vit_speed.GEOMETRIES[name]
    torch.manual_seed(0)
    plain = vit_speed.make_vit(name).eval().to(device, DTYPES[precision])
    images = torch.randn(3, batch, 3, size, size).to(device, DTYPES[precision])
    full, runs, ideal = model_flops(lambda: plain(images[0])), {"plain": plain}, {"plain": 1.0}
    for clustering in clusterings:
        chosen = WITH_SETTINGS.get(clustering, clustering)
        config = AiluRusConfig(cluster_location=location, num_clusters=num_clusters, clustering=chosen)
        runs[clustering] = apply_ailurus(sharing_weights(plain), config)
        runs[clustering](images[0])
        ideal[clustering] = full / (full - batch * ailurus_status(runs[clustering]).saved_flops)

    def differs(eager: Any, other: Any) -> float:
        one, two = eager.last_hidden_state.float(), other.last_hidden_state.float()
        return ((one - two).abs().max() / one.abs().max()).item()

    rows: list[dict[str, Any]] = []
    for mode in modes:
        found = measured(runs, images, mode, repeats, backend, differs)
        for row in found.values():
            row |= {"speed_up": found["plain"]["ms"] / row["ms"], "ideal": ideal[row["clustering"]]}
            row["share_of_ideal"] = row["speed_up"] / row["ideal"]
        rows += [{"of": name, "batch": batch, **row} for row in found.values()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--models", nargs="*", default=["ViT-B/16 512"], choices=vit_speed.GEOMETRIES)
    parser.add_argument("--clusterings", nargs="+", default=["local_kmeans", "ward"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--name", default="launch_modes", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = {"device": args.device, "precision": args.dtype, "batch": args.batch}
    rows = []
    for measure, names in ((measure_clustering, args.shapes), (measure_vit, args.models)):
        for name in names:
            rows += measure(name, args.clusterings, args.modes, args.repeats, **options)
            log.info("%s done", name)
    save(args.name, rows, environment(args.device, args.dtype))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
