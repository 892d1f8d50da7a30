"""Every row that needs a GPU and no weights, in one command: checks on the device first, then speed, then targets.

    python -m benchmarks.tables_gpu                              # on CUDA, in at most 28 minutes
    python -m benchmarks.tables_gpu --list                       # which rows there are, and about how long each takes
    python -m benchmarks.tables_gpu --resume                     # goes on where it was stopped; tries again what failed
    python -m benchmarks.tables_gpu --only gpu_training_vit-b-bf16
    python -m benchmarks.tables_gpu --device cpu --tiny          # a dry run: every row on tiny geometries

Each row is a result file in the device's folder of benchmarks/results, and tables_gpu-all.json there tells of all rows
what became of them, and of the targets. A row that fails is named and the next one is made; one whose library is not
there, or that does not fit into the minutes, is named and left out. Exit code 1: a row failed; 2: no such device.
`python -m benchmarks.report` then lists the new files in the index. Needs the package installed with [bench].
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from .gpu.rows import ROWS, Row
from .gpu.worker import Worker
from .harness import RESULTS, ROOT, device_folder, markdown, save

SUMMARY = "tables_gpu"
TARGET_COLUMNS = {
    "row": "row",
    "of": "of",
    "what": "what",
    "wanted": "wanted",
    "value": "reached|{:.3f}",
    "verdict": "holds",
}
Line = dict[str, Any]


def made_before(folder: Path, about: dict[str, Any]) -> dict[str, Line]:
    """What the summary there says, by row; nothing where it is of another device or other versions."""
    path = folder / device_folder(about["device"]) / f"{SUMMARY}-all.json"
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    if any(stored.get(key) != about[key] for key in ("device", "versions")):
        return {}
    return {line["row"]: line for line in stored["rows"]}


def make_all(rows: list[Row], worker: Worker, folder: Path, minutes: float, resume: bool) -> list[Line]:
    """A line a row, in their order. The summary is written after each; it keeps those of earlier runs that no row of
    this one replaced yet.
    """
    end, known = time.monotonic() + 60 * minutes, made_before(folder, worker.about)
    lines = []
    for row in rows:
        if resume and known.get(row.key, {}).get("state") == "done":
            print(f"-- {row.what}, {row.precision}: done before", flush=True)
        else:
            print(f"== {row.what}, {row.precision} (about {row.minutes:g} min)", flush=True)
            known[row.key] = told(row, made(row, worker, end - time.monotonic()), folder)
            save(SUMMARY, list(known.values()), worker.about, folder)
        lines.append(known[row.key])
    return lines


def made(row: Row, worker: Worker, seconds_left: float) -> dict[str, Any]:
    """As `Worker.make`, where there is time for the row."""
    if 60 * row.minutes > seconds_left:
        return {"state": "no time", "why": f"{max(seconds_left, 0) / 60:.1f} minutes are left", "seconds": 0.0}
    return worker.make(row, seconds_left)


def told(row: Row, result: dict[str, Any], folder: Path) -> Line:
    """Prints what became of a row and writes its result file; the line of the summary."""
    if result.get("rows"):
        print(result["table"])
        save(row.name, result["rows"], result["about"], folder)
    if result["state"] != "done":
        print(f"   {result['state']}: {result['why']}")
    print(f"   {result['seconds']:.0f} s", flush=True)
    targets = [line for target in row.targets for line in target.reached(result.get("rows", []))]
    return {
        "row": row.key,
        "what": row.what,
        "state": result["state"],
        "why": result["why"],
        "seconds": round(result["seconds"], 1),
        "targets": targets,
    }


def in_the_end(lines: list[Line]) -> str:
    """Targets, and the rows that are not there, in words."""
    targets = [
        {"row": line["row"], **target, "verdict": "yes" if target["holds"] else "NO"}
        for line in lines
        for target in line["targets"]
    ]
    texts = [markdown(targets, TARGET_COLUMNS), ""] if targets else []
    texts.append(f"{sum(target['holds'] for target in targets)} of {len(targets)} targets hold.")
    for state in ("left out", "no time", "failed"):
        texts += [f"{state}: {line['what']} ({line['row']}): {line['why']}" for line in lines if line["state"] == state]
    done = sum(line["state"] == "done" for line in lines)
    return "\n".join([*texts, f"{done} of {len(lines)} rows made."])


def parsed(arguments: list[str] | None, rows: dict[str, Row]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say which rows there are")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny geometries: tries the way and measures nothing")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows by their names in --list")
    parser.add_argument("--minutes", type=float, default=28, help="all of it takes no longer")
    parser.add_argument("--resume", action="store_true", help="keep what was made on this device with these versions")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results; of dry runs runs/tables-gpu)")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.only or [] if name not in rows]:
        parser.error(f"no row {', '.join(unknown)}: --list names them")
    return args


def main(arguments: list[str] | None = None, rows: dict[str, Row] | None = None, module: str | None = None) -> int:
    """rows, module: others than ROWS, and where the process finds them."""
    rows = rows or ROWS
    args = parsed(arguments, rows)
    chosen = [row for key, row in rows.items() if not args.only or key in args.only]
    if args.list:
        for row in chosen:
            print(f"{row.key}: {row.what} (about {row.minutes:g} min{', only CUDA' * row.cuda})")
        print(f"about {sum(row.minutes for row in chosen):.0f} minutes on an H100")
        return 0
    measures = not args.tiny and args.device != "cpu"
    folder = args.output or (RESULTS if measures else ROOT / "runs" / "tables-gpu")
    worker = Worker(args.device, args.tiny, *([module] if module else []))
    begun = time.monotonic()
    try:
        worker.start()
    except RuntimeError as error:
        print(f"no row can be made on {args.device}: {error}")
        return 2
    print(f"{worker.about['device']}, {worker.about['versions']}", flush=True)
    try:
        lines = make_all(chosen, worker, folder, args.minutes - (time.monotonic() - begun) / 60, args.resume)
    finally:
        worker.end()
    if not measures:
        print("A dry run: its times and targets mean nothing.")
    print(in_the_end(lines))
    return int(any(line["state"] == "failed" for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
