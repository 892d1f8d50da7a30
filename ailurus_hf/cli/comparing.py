"""Plain beside reduced, image by image: times, agreement, a score where there are labels, and a verdict."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import load
from .batch import Batch

if TYPE_CHECKING:
    from ..evaluation.comparison import Add
    from ..evaluation.loading import LoadedModel
    from ..evaluation.predictions import Predictions
    from ..evaluation.report import Report

# From an image's path to its entry in the results.
Work = Callable[[Path], dict[str, Any]]
# The scores of all images, by the names that an entry has them under.
Scores = Callable[[], dict[str, float | None]]


def compare(args: argparse.Namespace, task: str, predictions: Predictions, metric: str | None) -> int:
    """Runs a command's --compare.

    Args:
        args: of the command.
        task: what the model is for.
        predictions: of an image.
        metric: what --labels are scored by; None: they are not.
    """

    def begin(loaded: LoadedModel, batch: Batch, report: Report | None) -> tuple[Work, Scores]:
        from ..evaluation.paired import run_pair
        from ..evaluation.scoring import scorer_for
        from ..visualization import side_by_side

        scorer = scorer_for(loaded, args.labels) if args.labels else None
        keys = [f"{kind}_{metric.lower()}" for kind in ("plain", "reduced")] if metric else []

        def work(path: Path) -> dict[str, Any]:
            image = batch.read(path)
            pair = run_pair(loaded, loaded.prepare(image), args.repeats)
            agreement, shown = predictions(loaded, image, pair)
            scores: dict[str, float | None] = dict.fromkeys(keys)
            if scorer is not None:
                for key, outputs in zip(keys, (pair.plain, pair.reduced), strict=True):
                    scores[key] = scorer.add(key, path, image, outputs)
            result = pair.to_dict(agreement, **scores)
            if shown.sides:
                (file,) = batch.result_folder.files(batch.names[path])
                sides = [[side.picture] for side in shown.sides]
                batch.result_folder.save(side_by_side(sides, pair.titles())[0], file)
                result["file"] = str(file)
            if add := adding(report, batch, path):
                add(image, pair, result, shown)
            return result

        return work, lambda: {key: None if scorer is None else scorer.score(key) for key in keys}

    return compare_images(args, task, metric, begin)


def compare_images(
    args: argparse.Namespace,
    task: str,
    metric: str | None,
    begin: Callable[[LoadedModel, Batch, Report | None], tuple[Work, Scores]],
    closing: str | None = None,
) -> int:
    """The loop of a comparison: a line an image, one for all, a verdict.

    Args:
        args, task, metric: as in `compare`.
        begin: makes what does the work for one image and puts it into the report (None: there is none), and what
            scores all of them.
        closing: a line where results are, for people.
    """
    from ..evaluation.paired import PairTable, summarize_pairs
    from ..evaluation.report import Report
    from ..evaluation.verdict import verdict

    batch = Batch(args, ("_comparison.png",) if task != "classify" else (), to_lines=task == "classify")
    if not batch.images:
        return batch.finish(None, images=[])
    loaded = load(args, task, batch.device)
    report = Report(loaded, Path(args.report), metric if args.labels else None) if args.report else None
    work, scores = begin(loaded, batch, report)
    table = PairTable([path.name for path in batch.todo], metric if args.labels else None)

    def row(result: dict[str, Any]) -> str:
        line = table.row(Path(result["image"]).name, result)
        return f"{table.header()}\n{line}" if len(batch.results) == 1 else line

    batch.run(work, row)
    if batch.gather({}) is None:
        return 0
    if not batch.results:
        return batch.finish(loaded, images=[], all=None, verdict=[])
    summary = summarize_pairs(batch.results, **scores())
    if len(batch.results) > 1:
        batch.say(table.row("all", summary))
    if closing is not None:
        batch.say(closing)
    told = verdict(max(result["tokens"][0] for result in batch.results), summary["speedup"])
    if report is not None:
        batch.say(f"report: {report.write(batch.results, summary, told)}")
    batch.advise(told)
    written = {"report": args.report} if report is not None else {}
    return batch.finish(loaded, images=batch.results, all=summary, verdict=told, **written)


def adding(report: Report | None, batch: Batch, path: Path) -> Add | None:
    """What puts an image into the report, under the name that tells it from the others; None without a report."""
    return None if report is None else partial(report.add, str(batch.names[path].with_name(path.name)))
