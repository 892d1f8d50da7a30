"""Time and peak memory of clustering as the grid grows: it should grow with N · λ.

    python -m benchmarks.clustering.clustering_cost           # 64 x 64 and 128 x 128 tokens of 320 channels

Peak memory is what one clustering adds to the process, measured in a fresh process each.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from typing import Any

import torch

from ailurus_hf.clustering import get_clustering

from ..harness import environment, high_water_mark, interleaved, log, markdown, save

COLUMNS = {
    "clustering": "clustering",
    "num_tokens": "tokens",
    "ms": "time|{:.1f} ms",
    "times_previous": "× the previous|{:.2f}",
    "peak_mb": "peak memory|{:.0f} MB",
}


def cluster_once(clustering: str, side: int, channels: int) -> None:
    tokens = torch.randn(1, side * side, channels)
    get_clustering(clustering)(tokens, (side, side), side * side // 4)


def peak_megabytes(clustering: str, side: int, channels: int) -> float:
    """What a clustering adds to a fresh process's peak, its input and tables included."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_report_peak, args=(queue, clustering, side, channels))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def _report_peak(queue: Any, clustering: str, side: int, channels: int) -> None:
    # The first product loads the math library; that is nobody's memory here.
    cluster_once(clustering, 16, channels)
    before = high_water_mark()
    cluster_once(clustering, side, channels)
    queue.put((high_water_mark() - before) / 2**20)


@torch.inference_mode()
def measure(clustering: str, sides: list[int], channels: int, repeats: int) -> list[dict[str, Any]]:
    def contender(side: int) -> Any:
        tokens = torch.randn(4, 1, side * side, channels)
        cluster = get_clustering(clustering)
        return lambda n: cluster(tokens[n % 4], (side, side), side * side // 4)

    seconds = interleaved({str(side): contender(side) for side in sides}, repeats)
    rows: list[dict[str, Any]] = []
    for side in sides:
        now = 1e3 * seconds[str(side)]
        rows.append(
            {
                "clustering": clustering,
                "num_tokens": side * side,
                "channels": channels,
                "ms": now,
                "times_previous": now / rows[-1]["ms"] if rows else None,
                "peak_mb": peak_megabytes(clustering, side, channels),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 64, 128])
    parser.add_argument("--channels", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    for clustering in ("density_peaks", "local_kmeans", "ward"):
        rows += measure(clustering, args.sides, args.channels, args.repeats)
        log.info(markdown(rows[-len(args.sides) :], COLUMNS))
    save("clustering_cost", rows, environment(torch.device("cpu"), "fp32"))
    print(markdown(rows, COLUMNS))


if __name__ == "__main__":
    main()
