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
from .report_tables import (
    equal_speed_table,
    load,
    pictures_of_transformer,
    pictures_table,
    presets_table,
    quality_table,
    rows_as_measured,
    source,
)
from .training import finetune_quality, finetune_speed, pretrain_quality, pretrain_speed, trained_models
from .video import controlvideo_generations, controlvideo_speed, video_quality
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
    **{
        f"generations{name}": rows_as_measured(f"cpu/diffusion_generations{file}", diffusion_speed.COLUMNS)
        for name, file in {
            "": "_sd15-bf16",
            " in single precision": "_sd15-fp32",
            " at 1024": "_1024_sd15-bf16",
        }.items()
    },
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
    "joint generations of Flux": rows_as_measured("cpu/joint_generations_flux-bf16", joint_generations.COLUMNS),
    "video flops": rows_as_measured("cpu/controlvideo_flops_sd15-bf16", controlvideo_speed.COLUMNS),
    "video steps of 8 frames": rows_as_measured("cpu/controlvideo_step_8x256-fp32", controlvideo_speed.COLUMNS),
    "video steps of 4 frames": rows_as_measured("cpu/controlvideo_step_4x512-bf16", controlvideo_speed.COLUMNS),
    "video generations": rows_as_measured("cpu/controlvideo_generations_sd15-bf16", controlvideo_generations.COLUMNS),
    "video quality with presets": rows_as_measured("cpu/video_quality_presets-fp32", video_quality.COLUMNS),
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
