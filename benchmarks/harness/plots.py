"""Plots of the paper's figures 3 to 7 from result files.

    python -m benchmarks.harness.plots tradeoff benchmarks/results/cpu/segmenter_quality-fp32.json
    python -m benchmarks.harness.plots sizes benchmarks/results/cpu/similarity-fp32.json
    python -m benchmarks.harness.plots pareto benchmarks/results/cpu/size480-fp32.json

clusters (Fig. 3): quality over M at one L. locations (Fig. 4): quality over L at one keep ratio. speed (Fig. 5): images
a second over M at one L. tradeoff (Fig. 6): the best quality that each method has at every speed. sizes (Fig. 7): how
many clusters have so many tokens, and which share of them that is. pareto: quality over images a second of all settings
in all files, and the front of those that no other one surpasses in both. Those over M and L read segmenter_quality's
and classification_quality's files; sizes reads similarity's. Pictures go to the folder figures/ beside the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ailurus_hf import AiluRusError

matplotlib.use("Agg")
Row = dict[str, Any]


def score_of(rows: list[Row]) -> str:
    """The key of the quality that the rows hold."""
    return "miou" if "miou" in rows[0] else "accuracy"


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of every method but the plain model."""
    names = dict.fromkeys(row["method"] for row in rows if row["method"] != "plain")
    return {name: [row for row in rows if row["method"] == name] for name in names}


def best_at_each_speed(rows: list[Row], score: str, speed: str = "speed_up") -> list[Row]:
    """The Pareto front, fastest first: rows that no other row equals in speed and surpasses in quality."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row[speed], -row[score])):
        if not front or row[score] > front[-1][score]:
            front.append(row)
    return front


def clusters(axes: Axes, rows: list[Row], location: int, keep: float) -> None:
    score = score_of(rows)
    _lines(axes, [row for row in rows if row.get("location") == location], "num_clusters", lambda row: row[score])
    _plain(axes, rows[0][score], f"clusters (L = {location})", score)


def locations(axes: Axes, rows: list[Row], location: int, keep: float) -> None:
    score = score_of(rows)
    _lines(axes, [row for row in rows if row.get("keep_ratio") == keep], "location", lambda row: row[score])
    _plain(axes, rows[0][score], f"location (keep {keep:g})", score)


def speed(axes: Axes, rows: list[Row], location: int, keep: float) -> None:
    at = [row for row in rows if row.get("location") == location]
    _lines(axes, at, "num_clusters", lambda row: 1e3 / row["ms"])
    _plain(axes, 1e3 / rows[0]["ms"], f"clusters (L = {location})", "runs a second")


def tradeoff(axes: Axes, rows: list[Row], location: int, keep: float) -> None:
    score = score_of(rows)
    for name, own in by_method(rows).items():
        front = best_at_each_speed(own, score)
        line = axes.plot([row["speed_up"] for row in front], [row[score] for row in front], "o-", label=name)[0]
        axes.plot([row["speed_up"] for row in own], [row[score] for row in own], ".", color=line.get_color(), alpha=0.4)
    _plain(axes, rows[0][score], "speed-up", score)


def sizes(axes: Axes, rows: list[Row], location: int, keep: float) -> None:
    """Share of the clusters with so many tokens, for each M (Fig. 7a); dotted, their number in an image (7b)."""
    numbers = axes.twinx()
    for row in rows:
        if row["sizes"] and row["location"] == location:
            counts = {int(size): number for size, number in row["sizes"].items()}
            total, upto = sum(counts.values()), range(1, 21)
            shares = [100 * counts.get(size, 0) / total for size in upto]
            line = axes.plot(upto, shares, "o-", label=f"{row['method']}, M = {row['num_clusters']}")[0]
            an_image = [share / 100 * row["num_clusters"] for share in shares]
            numbers.plot(upto, an_image, ":", color=line.get_color())
    axes.set(xlabel="tokens of a cluster", ylabel="% of the clusters")
    numbers.set(ylabel="clusters of an image (dotted)")
    axes.legend(fontsize=7)


def pareto(axes: Axes, rows: list[Row], location: int, keep: float) -> None:
    """Methods by color; the front over all of them in black, plain models included."""
    score = score_of(rows)
    axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for name, own in by_method(rows).items():
        axes.plot([row["images_per_second"] for row in own], [row[score] for row in own], ".", label=name)
    plain = [row for row in rows if row["method"] == "plain"]
    axes.plot([row["images_per_second"] for row in plain], [row[score] for row in plain], "k*", label="plain")
    front = best_at_each_speed(rows, score, "images_per_second")
    axes.plot([row["images_per_second"] for row in front], [row[score] for row in front], "k-", linewidth=0.7)
    axes.set(xlabel="images a second", ylabel={"miou": "mIoU"}.get(score, "accuracy (%)"))
    axes.legend(fontsize=5)


def _lines(axes: Axes, rows: list[Row], x: str, y: Callable[[Row], float]) -> None:
    for name, own in by_method(rows).items():
        own = sorted(own, key=lambda row: row[x])
        axes.plot([row[x] for row in own], [y(row) for row in own], "o-", label=name)


def _plain(axes: Axes, value: float, x: str, y: str) -> None:
    axes.axhline(value, color="gray", linestyle=":", label="plain")
    axes.set(xlabel=x, ylabel={"miou": "mIoU", "accuracy": "accuracy (%)"}.get(y, y))
    axes.legend(fontsize=7)


KINDS = {
    "clusters": clusters,
    "locations": locations,
    "speed": speed,
    "tradeoff": tradeoff,
    "sizes": sizes,
    "pareto": pareto,
}


def draw(kind: str, files: Sequence[Path], location: int = 2, keep: float = 0.25) -> Path:
    """Writes one plot of the rows of result files, named as the first; returns its path."""
    results, file = [json.loads(each.read_text()) for each in files], files[0]
    result = results[0]
    scored_on = {(each.get("dataset"), each.get("images")) for each in results}
    if len(scored_on) > 1:
        raise AiluRusError(f"results on different images cannot share a plot, got {sorted(scored_on, key=str)}")
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    KINDS[kind](axes, [row for each in results for row in each["rows"]], location, keep)
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items() if version)
    axes.set_title(f"{result['device']}, {result['precision']}, {versions}", fontsize=7)
    axes.grid(alpha=0.3)
    path = file.parent / "figures" / f"{file.stem}-{kind}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("files", type=Path, nargs="+", help="result files, of one device and precision")
    parser.add_argument("--location", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.25)
    args = parser.parse_args()
    print(f"wrote {draw(args.kind, args.files, args.location, args.keep)}")


if __name__ == "__main__":
    main()
