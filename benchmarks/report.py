"""Writes the tables of README.md, docs/ and the index of results/ from the result files, never by hand.

    python -m benchmarks.report            # rewrites what stands between the markers
    python -m benchmarks.report --check    # exit code 1 where a table is not what the result files say

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; the names are the keys of TABLES. An empty one
whose result file is not there yet stays empty.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from collections.abc import Callable
from typing import Any

from ailurus_hf.diffusion.model_table import supported_networks
from ailurus_hf.vision.model_table import supported_models

from . import tables, tables_gpu
from .clustering import clustering_cost, clustering_overhead, clusterings
from .diffusion import diffusion_quality, diffusion_speed, joint_generations, joint_speed
from .gpu.rows import ROWS
from .gpu.worker import finer
from .harness import RESULTS, ROOT, markdown, measured_columns
from .harness.bootstrap import BY_CHANCE
from .methods.diffusion_peers import peers_of
from .training import finetune_quality, finetune_speed, pretrain_quality, pretrain_speed, trained_models
from .video import controlvideo_speed, video_quality
from .vision import (
    autotune_sweep,
    batched_speed,
    classification_quality,
    compiled_speed,
    detection_quality,
    detection_speed,
    exported_speed,
    families_speed,
    segmenter_quality,
    similarity,
    vit_speed,
)

DOCUMENTS = (
    "README.md",
    "benchmarks/results/README.md",
    "docs/evidence.md",
    "docs/method.md",
    "docs/results.md",
    "docs/supported-models.md",
    "docs/tables.md",
    "docs/training.md",
)
TARGETS = (1.5, 2.0, 2.5, 3.0)


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


def parts_table() -> str:
    """Every table and figure: what makes it, what that needs, and about how long it takes."""
    folders = {"data": "DATA", "weights": "WEIGHTS", "gpu": "GPU"}
    lines = [
        {
            "names": entry.title,
            "what": entry.what,
            "needs": ", ".join(need.format(**folders) for need in entry.needs),
            "minutes": entry.minutes,
        }
        for entry in tables.ENTRIES
    ]
    return markdown(lines, {"names": "for", "what": "what", "needs": "needs", "minutes": "minutes|{:g}"})


def measured_tables() -> str:
    """What result files there are of those that `make tables` writes, each as its benchmark prints it."""
    blocks = []
    for entry in tables.ENTRIES:
        name = "".join(entry.options.get("name", []))
        for path in sorted(RESULTS.glob(f"*/{name}-*.json")) if name else []:
            result = load(stem := f"{path.parent.name}/{path.stem}")
            blocks.append(f"### {entry.title}: {entry.what}\n\n{as_printed(entry, result)}\n{source(result, stem)}")
    return "\n\n".join(blocks) or "No result file of these is here yet."


def as_printed(entry: tables.Entry, result: dict[str, Any]) -> str:
    """A result's rows as the benchmark that made them has them."""
    rows = result["rows"]
    if entry.module == "benchmarks.vision.similarity":
        return similarity.tables(rows, result["pairs"])
    columns = importlib.import_module(str(entry.module)).COLUMNS
    return measured_columns(rows, columns)


def gpu_tables() -> str:
    """By device what `make tables-gpu` made: targets, and each row as its benchmark prints it."""
    blocks = []
    for path in sorted(RESULTS.glob(f"*/{tables_gpu.SUMMARY}-all.json")):
        summary = json.loads(path.read_text())
        blocks.append(f"### {summary['device']}\n\n{tables_gpu.in_the_end(summary['rows'])}")
        for line in summary["rows"]:
            if line["state"] == "done":
                result = load(stem := f"{path.parent.name}/{line['row']}")
                columns = {key: finer(head) for key, head in ROWS[line["row"]].columns.items()}
                table = measured_columns(result["rows"], columns)
                blocks.append(f"#### {line['what']}\n\n{table}\n{source(result, stem)}")
    if not blocks:
        raise FileNotFoundError("no GPU was measured")
    return "\n\n".join(blocks)


def index() -> str:
    """Every result file: what it shows, on which device, when, and the command that made it."""
    what = {name: f"{entry.title}: {entry.what}" for entry in tables.ENTRIES for name in entry.options.get("name", [])}
    lines = []
    for path in sorted(RESULTS.glob("*/*.json")):
        result, name = json.loads(path.read_text()), path.stem.rpartition("-")[0]
        module = importlib.import_module(shlex.split(result["command"])[2])
        # A short name's commands are those of the module whose main it takes.
        first = str(importlib.import_module(module.main.__module__).__doc__).partition("\n")[0]
        lines.append(
            {
                "file": f"[{path.parent.name}/{path.name}]({path.parent.name}/{path.name})",
                "what": what.get(name) or first.rstrip("."),
                "device": f"{result['device']}, {result['precision']}",
                "date": result["date"],
                "command": f"`{result['command']}`",
            }
        )
    return markdown(lines, {key: key for key in ("file", "what", "device", "date", "command")})


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
    for preset, every in {"fast": "5, first 3", "balanced": "3, first 3", "faithful": "2, first 5"}.items():
        method = f"keys 0.0625 at full size, k-means, inner layers every {every}, extrapolated"
        row = row_of("cpu/diffusion_quality_text_inner-fp32", method)
        speed, psnr = row["fewer_flops"], row["psnr"]
        lines.append(
            (f'`"{preset}"`', "Stable Diffusion, by FLOPs ¹", speed, f"PSNR {psnr:.1f} dB to the plain pictures ¹")
        )
    heads = ("preset, tokens kept", "measured on", "speed-up", "without → with")
    rows = [dict(zip(heads, (*line[:2], f"{line[2]:.2f}×", line[3]))) for line in lines]
    result = load(ours)
    note = (
        f"\n{result['device']}, fp32. ¹ Of generations of 20 steps of a small one that was trained here, too small to "
        "be timed; a higher PSNR is nearer."
    )
    return markdown(rows, {head: head for head in heads}) + "\n" + note


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets_table,
    "index": index,
    "parts": parts_table,
    "measured": measured_tables,
    "families": supported_models,
    "networks": supported_networks,
    "peers": rows_as_measured("cpu/tab1_camvid-fp32", segmenter_quality.COLUMNS),
    "speed": rows_as_measured("cpu/vit_speed-fp32", vit_speed.COLUMNS),
    "compiled": rows_as_measured("cpu/compiled_speed-fp32", compiled_speed.COLUMNS),
    "a compiled ViT-L again": rows_as_measured("cpu/compiled_speed_vitl-fp32", compiled_speed.COLUMNS),
    "compiled in half precision": rows_as_measured("cpu/compiled_speed-bf16", compiled_speed.COLUMNS),
    "exported": rows_as_measured("cpu/exported_speed-fp32", exported_speed.COLUMNS),
    "an exported Segmenter": rows_as_measured("cpu/exported_speed_segmenter-fp32", exported_speed.COLUMNS),
    "compiled ahead": rows_as_measured("cpu/exported_speed_aoti-fp32", exported_speed.COLUMNS),
    "batches": rows_as_measured("cpu/batched_speed-fp32", batched_speed.COLUMNS),
    "more batches": rows_as_measured("cpu/batched_speed_more-fp32", batched_speed.COLUMNS),
    "pipeline": rows_as_measured("cpu/pipeline_parts-fp32", batched_speed.PIPELINE_COLUMNS),
    "autotune": rows_as_measured("cpu/autotune_sweep-fp32", autotune_sweep.COLUMNS),
    "on a GPU": gpu_tables,
    "dense heads": rows_as_measured("cpu/families_speed-fp32", families_speed.COLUMNS),
    "depth": rows_as_measured("cpu/families_speed_dpt-fp32", families_speed.COLUMNS),
    "stages": rows_as_measured("cpu/families_speed_stages-fp32", families_speed.COLUMNS),
    "stages of SegFormer": rows_as_measured("cpu/families_speed_segformer_stages-fp32", families_speed.COLUMNS),
    "detection in AP": rows_as_measured("cpu/detection_quality-fp32", detection_quality.COLUMNS),
    "a YOLOS in AP": rows_as_measured("cpu/detection_quality_yolos-fp32", detection_quality.COLUMNS),
    "detection": rows_as_measured("cpu/detection_speed-fp32", detection_speed.COLUMNS),
    "detection with relative positions": rows_as_measured("cpu/detection_speed_cae-fp32", detection_speed.COLUMNS),
    "other detectors": rows_as_measured("cpu/detection_speed_others-fp32", detection_speed.COLUMNS),
    "diffusion": rows_as_measured("cpu/diffusion_speed_sd15-fp32", diffusion_speed.COLUMNS),
    "diffusion in half precision": rows_as_measured("cpu/diffusion_speed_sd15-bf16", diffusion_speed.COLUMNS),
    "settings in half precision": rows_as_measured("cpu/diffusion_speed_methods_sd15-bf16", diffusion_speed.COLUMNS),
    "large ones compiled in half precision": rows_as_measured("cpu/compiled_speed_large-bf16", compiled_speed.COLUMNS),
    "compiled diffusion": rows_as_measured("cpu/diffusion_speed_sd15_compiled-fp32", diffusion_speed.COLUMNS),
    "compiled diffusion in half precision": rows_as_measured(
        "cpu/diffusion_speed_sd15_compiled-bf16", diffusion_speed.COLUMNS
    ),
    "diffusion at 1024": rows_as_measured("cpu/diffusion_speed_1024_sd15-fp32", diffusion_speed.COLUMNS),
    "SDXL": rows_as_measured("cpu/diffusion_speed_sdxl-bf16", diffusion_speed.COLUMNS),
    "pictures from text": pictures_table("text"),
    "pictures from text and edges": pictures_table("control"),
    "pictures of a transformer over steps": pictures_of_transformer,
    **{
        name: rows_as_measured(f"cpu/diffusion_quality_{task}-fp32", diffusion_quality.COLUMNS)
        for name, task in {
            "pictures from text over steps": "text_steps",
            "pictures from text, inner layers": "text_inner",
            "pictures from text, other clusterings": "text_clusterings",
            "pictures from text, inner layers and other clusterings": "text_inner_clusterings",
            "pictures of a transformer": "sd3_text",
            "pictures of a transformer, first steps whole": "sd3_text_first_steps",
            "pictures of a transformer, few tokens": "sd3_text_first_steps_of_few",
        }.items()
    },
    "joint generations": rows_as_measured("cpu/joint_generations-bf16", joint_generations.COLUMNS),
    "video flops": rows_as_measured("cpu/controlvideo_flops_sd15-bf16", controlvideo_speed.COLUMNS),
    "video steps of 8 frames": rows_as_measured("cpu/controlvideo_step_8x256-fp32", controlvideo_speed.COLUMNS),
    "video steps of 4 frames": rows_as_measured("cpu/controlvideo_step_4x512-bf16", controlvideo_speed.COLUMNS),
    "video quality": rows_as_measured("cpu/video_quality-fp32", video_quality.COLUMNS),
    "joint flops": rows_as_measured("cpu/joint_flops-fp32", joint_speed.COLUMNS),
    "cost": rows_as_measured("cpu/clustering_cost-fp32", clustering_cost.COLUMNS),
    "overhead": rows_as_measured("cpu/clustering_overhead-fp32", clustering_overhead.COLUMNS),
    "Ward now": rows_as_measured("cpu/ward_moving-fp32", clusterings.COLUMNS),
    "levels": rows_as_measured("cpu/ward_levels_camvid-fp32", segmenter_quality.COLUMNS),
    "Ward in time": rows_as_measured("cpu/presets_camvid-fp32", segmenter_quality.COLUMNS),
    "clusters of CamVid": rows_as_measured("cpu/clusterings_smooth-fp32", clusterings.COLUMNS),
    "clusters at the size of detection": rows_as_measured("cpu/clusterings_detection-fp32", clusterings.COLUMNS),
    "clusters of CIFAR": rows_as_measured("cpu/clusterings_cifar10-fp32", clusterings.COLUMNS),
    "classification in steps": rows_as_measured("cpu/tab8_cifar10_all-fp32", classification_quality.COLUMNS),
    "classification": rows_as_measured("cpu/tab8_cifar10-fp32", classification_quality.COLUMNS),
    "trained models": rows_as_measured("cpu/trained_models-fp32", trained_models.COLUMNS),
    "a wider Segmenter": rows_as_measured("cpu/segmenter_quality_s_like-fp32", segmenter_quality.COLUMNS),
    "fine tuning in turns": rows_as_measured("cpu/tab5_training_camvid-bf16", finetune_speed.COLUMNS),
    "fine tuning": rows_as_measured("cpu/tab5_finetuning-bf16", finetune_quality.COLUMNS),
    "pretraining in turns": rows_as_measured("cpu/pretrain_speed-bf16", pretrain_speed.COLUMNS),
    "pretraining": rows_as_measured("cpu/pretrain_quality-bf16", pretrain_quality.COLUMNS),
    "quality": quality_table,
    "equal speed": equal_speed_table,
}


def rewritten(text: str) -> str:
    """The document with every marked table made anew; one that nobody measured yet stays empty."""

    def table(match: re.Match[str]) -> str:
        try:
            made = TABLES[match[1]]()
        except FileNotFoundError:
            if match[2].strip():
                raise
            return match[0]
        return f"<!-- table: {match[1]} -->\n\n{made}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (.+?) -->(.*?)<!-- end -->", table, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say whether something would change")
    args = parser.parse_args()
    stale = []
    for document in DOCUMENTS:
        path = ROOT / document
        before = path.read_text()
        after = rewritten(before)
        if after != before:
            stale.append(document)
            if not args.check:
                path.write_text(after)
    print(f"{'out of date' if args.check else 'rewrote'}: {', '.join(stale)}" if stale else "nothing to change")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
