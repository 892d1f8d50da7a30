"""Tables of results that are more than the rows of one file: beside one another, over several files, by speed.

For report.py, which says where each stands.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .diffusion import diffusion_quality
from .harness import RESULTS, markdown, measured_columns
from .harness.bootstrap import BY_CHANCE
from .methods.diffusion_peers import peers_of

TARGETS = (1.5, 2.0, 2.5, 3.0)
# What presets of UNets are called in the benchmarks, and which result file has their pictures.
METHODS_OF_PRESETS = {
    "fast": ("keys 0.0625 at full size, k-means, inner layers every 5, first 3, extrapolated", "text_inner"),
    "balanced": (
        "keys 0.125 at full size, pairs, inner layers every 3, first 3, extrapolated",
        "text_inner_clusterings",
    ),
    "faithful": (
        "keys 0.125 at full size, pairs, inner layers every 2, first 5, extrapolated",
        "text_inner_clusterings",
    ),
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def source(result: dict[str, Any], name: str) -> str:
    """The line under a table: device, versions, date, file and command."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items() if version)
    return (
        f"\n{result['device']}, {result['precision']}, {versions}, {result['date']}; "
        f"benchmarks/results/{name}.json, "
        f"`{result['command']}`."
    )


def rows_as_measured(name: str, columns: dict[str, str]) -> Callable[[], str]:
    """A table of all rows of one result file, under its benchmark's own headings where anything was measured."""

    def table() -> str:
        result = load(name)
        rows = result["rows"]
        return measured_columns(rows, columns) + "\n" + source(result, name)

    return table


def quality_table() -> str:
    """mIoU of each method, and the speed-up in brackets, by location and number of clusters."""
    result = load("cpu/segmenter_quality-fp32")
    plain, *rows = result["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    settings = sorted({(row["location"], -row["num_clusters"]) for row in rows})
    lines = []
    for location, negative in settings:
        cells = {r["method"]: r for r in rows if (r["location"], -r["num_clusters"]) == (location, negative)}
        best = max(cells.values(), key=lambda row: row["miou"])
        line = {"setting": f"{location}, {-negative}"}
        for method in methods:
            text = f"{cells[method]['miou']:.1f}" + (" ≈" if cells[method].get("lost_is") == BY_CHANCE else "")
            line[method] = f"{f'**{text}**' if cells[method] is best else text} ({cells[method]['speed_up']:.2f}×)"
        lines.append(line)
    head = f"Unreduced: {plain['miou']:.1f} mIoU, {plain['ms']:.0f} ms an image, {result['images']} images."
    head += " ≈: the loss may be chance.\n\n" if any("lost_is" in row for row in rows) else "\n\n"
    table = markdown(lines, {"setting": "L, M", **{method: method for method in methods}})
    return head + table + "\n" + source(result, "cpu/segmenter_quality-fp32")


def between(row: dict[str, Any]) -> str:
    """The interval of what a row lost, and whether that may be chance; nothing where it was not measured."""
    if "lost_between" not in row:
        return ""
    low, high = row["lost_between"]
    return f" [{low:+.2f}, {high:+.2f}]" + (f", {BY_CHANCE}," if row["lost_is"] == BY_CHANCE else "")


def equal_speed_table() -> str:
    """The least mIoU that each method loses at a speed-up, over all L and M that were measured."""
    result = load("cpu/segmenter_quality-fp32")
    plain, *rows = result["rows"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        line: dict[str, Any] = {"method": method}
        for target in TARGETS:
            fast_enough = [r for r in rows if r["method"] == method and r["speed_up"] >= target]
            if fast_enough:
                best = min(fast_enough, key=lambda row: row["lost"])
                setting = f"L {best['location']}, M {best['num_clusters']}"
                if best["restore_location"]:
                    setting += f", R {best['restore_location']}"
                line[str(target)] = f"{best['lost']:+.2f}{between(best)} ({setting}, {best['speed_up']:.2f}×)"
        lines.append(line)
    heads = {str(target): f"lost at ≥ {target}×" for target in TARGETS}
    head = f"Unreduced: {plain['miou']:.2f} mIoU.\n\n"
    return head + markdown(lines, {"method": "method", **heads}) + "\n" + source(result, "cpu/segmenter_quality-fp32")


def pictures_table(task: str) -> Callable[[], str]:
    """How each method changes the pictures of the small Stable Diffusion, and ours beside each setting of tomesd."""

    def table() -> str:
        rows, speeds = load(f"cpu/diffusion_quality_{task}-fp32")["rows"], load("cpu/diffusion_speed_methods_sd15-bf16")
        against = diffusion_quality.against_tomesd(rows, diffusion_quality.speeds_of(speeds))
        line = (
            "Each setting of tomesd beside ours that is nearest to the plain pictures at no more cost, by FLOPs of "
            "this model and by the time of a step of SD 1.5 at 512² in half precision:"
        )
        return pictures(task, line, markdown(against, diffusion_quality.AGAINST))

    return table


def pictures_of_transformer() -> str:
    """How methods that change between steps change the pictures of the small transformer; ours beside each peer."""
    endings = ("", "_steps", "_first_steps", "_first_steps_of_few")
    rows = [row for ending in endings for row in load(f"cpu/diffusion_quality_sd3_text{ending}-fp32")["rows"]]
    peers = [row["method"] for row in rows if row["method"] in peers_of("transformers")]
    timed = ("full_size", "by_speed")
    columns = {key: head for key, head in diffusion_quality.AGAINST.items() if not key.startswith(timed)}
    line = "Each peer beside ours, of all these tables, that is nearest to the plain pictures at no more FLOPs:"
    compared = diffusion_quality.against(peers, rows, {})
    return pictures("sd3_text_steps", line, markdown(compared, {**columns, "method": "peer"}))


def pictures(task: str, line: str, against: str) -> str:
    """A table of all methods, and, under a line that says what it is, one of ours against others."""
    result = load(f"cpu/diffusion_quality_{task}-fp32")
    head = f"{result['prompts']} prompts, {result['seeds']} seed(s) each, {result['steps']} steps."
    table = measured_columns(result["rows"], diffusion_quality.COLUMNS)
    return "\n\n".join([head, table, line, against]) + "\n" + source(result, f"cpu/diffusion_quality_{task}-fp32")


def row_of(name: str, method: str, **fields: Any) -> dict[str, Any]:
    """The one row of a result file that is of a method, with these values."""
    rows = [row for row in load(name)["rows"] if row["method"] == method]
    (row,) = (row for row in rows if all(row.get(key) == value for key, value in fields.items()))
    return row


def presets_table() -> str:
    """What each preset gains and loses, where it was measured: one line each."""
    ours, wider, small = "cpu/tab1_camvid-fp32", "cpu/segmenter_quality_s_like-fp32", "cpu/tab8_cifar10_all-fp32"
    pairs = "pairs, copy:cluster_location=(1,3),keep_ratio=(0.65,0.37)"
    lines = []
    for preset, keep, name, where in (
        ("dense", 0.22, ours, "shipped Segmenter, CamVid"),
        ("dense", 0.45, wider, "twice as wide, CamVid"),
        ("dense", 0.12, wider, "twice as wide, CamVid"),
        ("paper", 0.22, ours, "shipped Segmenter, CamVid"),
    ):
        method = {"dense": "Ward, smooth", "paper": "density peaks, copy (the paper)"}[preset]
        row, plain = row_of(name, method, location=2, keep_ratio=keep), row_of(name, "plain")["miou"]
        lines.append((f'`"{preset}"`, {keep:.0%}', where, row["speed_up"], f"{plain:.2f} → {row['miou']:.2f} mIoU"))
    row, plain = row_of(small, pairs), row_of(small, "plain")["accuracy"]
    where = "6-layer classifier, CIFAR-10"
    lines.append(('`"classification"`', where, row["speed_up"], f"{plain:.2f} → {row['accuracy']:.2f} % accuracy"))
    timed = "cpu/diffusion_generations_sd15-bf16"
    for preset, (method, pictures) in METHODS_OF_PRESETS.items():
        psnr = row_of(f"cpu/diffusion_quality_{pictures}-fp32", method)["psnr"]
        speed = row_of(timed, method)["speed_up"]
        lines.append((f'`"{preset}"`', "Stable Diffusion 1.5 ¹", speed, f"PSNR {psnr:.1f} dB to the plain pictures ²"))
    heads = ("preset, tokens kept", "measured on", "speed-up", "without → with")
    rows = [dict(zip(heads, (*line[:2], f"{line[2]:.2f}×", line[3]))) for line in lines]
    note = (
        f"\n{load(ours)['device']}, fp32. ¹ Whole generations of 20 steps at 512², bf16, {load(timed)['device']}. ² Of "
        "a small Stable Diffusion that was trained here; a higher PSNR is nearer."
    )
    return markdown(rows, {head: head for head in heads}) + "\n" + note
