"""AP and speed of every way to reduce a trained detector, on images it was not trained on (Tab. 3, 4, A-1, A-2).

    python -m benchmarks.vision.detection_quality --data COCO --model RUN
    python -m benchmarks.vision.detection_quality --data COCO --model RUN --settings 2,0.5 2,0.25 --methods ToMe
    python -m benchmarks.vision.detection_quality --data COCO --model RUN --ap-of RESULT.json   # times its rows alone
    python -m benchmarks.vision.detection_quality --tiny                # a dry run on made-up images, saves nothing

RUN is the output folder of examples/train_detector.py, or `best` in that of examples/train_yolos.py, on which the
peers of others do not run. L and the share of tokens are those of Tab. 4 unless said otherwise, at the same share of
the depth. AP (0.5 to 0.95) and AP50 are COCO's own code's. Intervals are over images, by bootstrap: resamples of the
images whose boxes were matched once. Speed is that of the encoder, read at the layers that the detector reads, without
pyramid and heads, which no method changes; GFLOPs are of the same part. "Detector" is the whole of it. A second table
holds of each method the row that is slowest of those that reach --at-speed. "Agreement" is the share of boxes above 0.5
that both have, of one class and overlapping. Methods as in segmenter_quality. AP takes long and needs no quiet machine,
so `--ap-of` takes it from a result that was measured before.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ailurus_hf.evaluation.average_precision import matched_boxes, precision_of
from ailurus_hf.evaluation.boxes import Boxes, box_agreement

from ..harness import environment, interleaved, measured_columns, model_flops, save
from ..harness.bootstrap import called, drawn_weights, interval
from ..harness.datasets import DetectionData, evenly
from ..methods import METHODS, PAPER, Amount, AppliedMethod
from ..methods.registry import Ours
from . import quality
from .detection_speed import SIZE, TABLE_4
from .detectors import (
    Yolos,
    depth_and_taps,
    encoder_alone,
    how_trained,
    load_detector,
    made_up_data,
    pixels,
    seen,
    tiny_detector,
    with_encoder,
)
from .quality import Contender, Resampling

DEPTH_OF_TABLE_4 = 12
# Images of which forwards are timed, evenly from the split.
TIMED = 15
CERTAIN = 0.5
CHOSEN = (
    PAPER, "density peaks, smooth", "local k-means, smooth", "Ward, copy", "Ward, smooth", "Ward, residual",
    "Expedite", "ToMe", "random centers, copy",
)  # fmt: skip
COLUMNS = {
    "method": "method",
    "location": "L",
    "num_clusters": "M",
    "gflops": "GFLOPs|{:.2f}",
    "ms": "encoder|{:.0f} ms",
    "ap": "AP|{:.2f}",
    "score_between": "AP, 95 %|{0[0]:.2f} to {0[1]:.2f}",
    "ap50": "AP50|{:.2f}",
    "lost": "lost|{:+.2f}",
    "lost_between": "lost, 95 %|{0[0]:+.2f} to {0[1]:+.2f}",
    "lost_is": "loss or chance",
    "lost50": "AP50 lost|{:+.2f}",
    "lost50_between": "AP50 lost, 95 %|{0[0]:+.2f} to {0[1]:+.2f}",
    "reference": "beside",
    "behind": "behind it|{:+.2f}",
    "behind_between": "behind, 95 %|{0[0]:+.2f} to {0[1]:+.2f}",
    "behind_is": "behind or chance",
    "agreement": "agreement|{:.1%}",
    "ideal": "FLOPs-ideal|{:.2f}×",
    "speed_up": "speed-up|{:.2f}×",
    "share_of_ideal": "share of ideal|{:.2f}",
    "detector_ms": "detector|{:.0f} ms",
    "detector_speed_up": "detector's speed-up|{:.2f}×",
}


def settings_of_table_4(depth: int) -> list[tuple[int, float]]:
    """L and keep ratio as in Tab. 4, at the same share of the depth and of the tokens."""
    tokens = (SIZE[0] // 16) * (SIZE[1] // 16)
    return [(round(location * depth / DEPTH_OF_TABLE_4), round(clusters / tokens, 3)) for location, clusters in TABLE_4]


def boxes_of(found: dict[str, Tensor]) -> Boxes:
    return Boxes(*(found[key].cpu().numpy() for key in ("boxes", "labels", "scores")))


@torch.no_grad()  # BEiT keeps tensors that it makes, and could not train on with those of inference mode
def found_boxes(detectors: dict[str, nn.Module], data: DetectionData, device: torch.device) -> dict[str, list[Boxes]]:
    """Of each detector, the boxes of every image; all see an image before the next one is read."""
    found: dict[str, list[Boxes]] = {name: [] for name in detectors}
    for index in tqdm(range(len(data)), desc="quality"):
        image = pixels(data.image(index)).to(device)
        for name, detector in detectors.items():
            found[name].append(boxes_of(detector([image])[0]))
    return found


def resampled(matched: Any, weights: np.ndarray) -> np.ndarray:
    """AP and AP50 in percent of every resample: [resamples, 2]. weights: how often each image is in each."""
    images = np.arange(weights.shape[1])
    return 100 * np.array([precision_of(matched, np.repeat(images, row.astype(int))) for row in weights])


def precision_rows(
    found: dict[str, list[Boxes]],
    data: DetectionData,
    contenders: dict[str, Contender],
    resampling: Resampling | None,
) -> dict[str, dict[str, Any]]:
    """What each row says of AP, AP50 and agreement with the plain model, by name."""
    truth = [data.truth(index) for index in range(len(data))]
    matched = {name: matched_boxes(boxes, truth) for name, boxes in found.items()}
    percent = {name: tuple(100 * each for each in precision_of(boxes)) for name, boxes in matched.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, boxes in found.items():
        certain = [(plain.above(CERTAIN), own.above(CERTAIN)) for plain, own in zip(found["plain"], boxes, strict=True)]
        agreement = statistics.fmean(box_agreement(*pair) for pair in certain)
        rows[name] = {"ap": percent[name][0], "ap50": percent[name][1], "agreement": agreement}
        if name != "plain":
            lost = (plain - own for plain, own in zip(percent["plain"], percent[name], strict=True))
            rows[name]["lost"], rows[name]["lost50"] = lost
    if resampling is not None:
        weights = drawn_weights(len(data), resampling.num_resamples, resampling.generator)
        values = {name: resampled(each, weights) for name, each in tqdm(matched.items(), desc="intervals")}
        scores, of_ap = {n: each[0] for n, each in percent.items()}, {n: each[:, 0] for n, each in values.items()}
        for name, chance in quality.chances(scores, of_ap, contenders, resampling.against).items():
            rows[name] |= chance
            if name != "plain":
                lost50 = interval(values["plain"][:, 1] - values[name][:, 1])
                rows[name] |= {"lost50_between": lost50, "lost50_is": called(lost50, "a loss", "a gain")}
    return rows


def measure(
    detector: nn.Module,
    data: DetectionData,
    contenders: dict[str, Contender],
    repeats: int,
    resampling: Resampling | None = None,
    known: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """One row a contender, after one for the plain detector. known: such rows with AP, which are only timed."""
    device = next(detector.parameters()).device
    shown = [pixels(data.image(index)).to(device) for index in evenly(range(len(data)), TIMED)]
    timed = [seen(detector, image) for image in shown]
    plain = encoder_alone(detector)
    encoders: dict[str, nn.Module] = {"plain": plain}
    reductions: dict[str, AppliedMethod] = {}
    with torch.no_grad():
        for name, (method, *amount) in contenders.items():
            encoders[name], reductions[name] = quality.reduced_copy(plain, method, Amount(*amount), timed[:2])
    detectors = {name: with_encoder(detector, each) for name, each in encoders.items()}
    if known is None:
        said = precision_rows(found_boxes(detectors, data, device), data, contenders, resampling)
    else:
        said = dict(zip(encoders, known, strict=True))
    with torch.no_grad():
        full = model_flops(lambda: plain(timed[0]))
        rows = [said["plain"] | {"method": "plain", "gflops": full / 1e9, "ideal": 1.0}]
        rows += [said[name] | reduced_row(contenders[name], each, full, encoders[name], timed[0])
                 for name, each in reductions.items()]  # fmt: skip
        if repeats:
            add_times(rows, encoders, timed, "", repeats)
            add_times(rows, detectors, [[image] for image in shown], "detector_", repeats)
    for row in rows if repeats else ():
        row["share_of_ideal"] = row["speed_up"] / row["ideal"]
    return rows


def add_times(
    rows: list[dict[str, Any]], models: dict[str, nn.Module], inputs: list[Any], part: str, repeats: int
) -> None:
    """Median time of each row's model, all in turn, and how many times as fast as the first it is."""
    device = next(models["plain"].parameters()).device
    runs = {name: (lambda n, model=model: model(inputs[n % len(inputs)])) for name, model in models.items()}
    bar = partial(tqdm, desc=f"time {part}".strip(" _"))
    seconds = list(interleaved(runs, repeats, warmup=3, device=device, progress=bar).values())
    for row, own in zip(rows, seconds, strict=True):
        row[f"{part}ms"], row[f"{part}speed_up"] = 1e3 * own, seconds[0] / own


def rows_at(rows: list[dict[str, Any]], speed_up: float) -> list[dict[str, Any]]:
    """The plain row, and of each method the slowest row that is at least that many times as fast, if there is one."""
    fast = sorted((row for row in rows[1:] if row["speed_up"] >= speed_up), key=lambda row: -row["speed_up"])
    last = {row["method"]: row for row in fast}
    return rows[:1] + [last[name] for name in dict.fromkeys(row["method"] for row in rows) if name in last]


def reduced_row(
    contender: Contender, reduction: AppliedMethod, full: int, encoder: nn.Module, image: Tensor
) -> dict[str, Any]:
    """What a row says of its method: settings, tokens that are left, FLOPs."""
    method, location, keep, _ = contender
    flops = reduction.flops(full, lambda: encoder(image))
    return {
        "method": method,
        "location": location,
        "keep_ratio": keep,
        "settings": reduction.settings,
        "num_clusters": reduction.num_clusters(),
        "gflops": flops / 1e9,
        "ideal": full / flops,
    }


def setting(text: str) -> tuple[int, float]:
    location, keep = text.split(",")
    return int(location), float(keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="bccd", help="its folder's name in AILURUS_DATA")
    parser.add_argument("--data", help="a folder in COCO's format (default: the data set's)")
    parser.add_argument("--split", default="val")
    parser.add_argument("--model", type=Path, help="output folder of a training script")
    parser.add_argument("--methods", nargs="+", help=", ".join(METHODS))
    parser.add_argument("--settings", nargs="+", type=setting, metavar="L,KEEP", help="instead of Tab. 4's")
    parser.add_argument("--repeats", type=int, default=15, help="of the timing (0: AP and FLOPs alone)")
    parser.add_argument("--limit", type=int, help="only so many images, evenly from the whole split")
    parser.add_argument("--resamples", type=int, default=1000, help="of the images, for intervals (0: no intervals)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--against", help="one of the methods, with which the others are compared")
    parser.add_argument("--ap-of", type=Path, metavar="RESULT.json", help="take AP from its rows, and only time them")
    parser.add_argument("--at-speed", type=float, default=1.5, help="of the second table: times the plain encoder's")
    parser.add_argument("--tiny", action="store_true", help="a tiny random detector, and no result file")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--name", default="detection_quality", help="of the result file")
    args = parser.parse_args()
    if args.against not in (None, *(args.methods or CHOSEN)):
        parser.error(f"--against must be one of --methods, got {args.against!r}")
    if not (args.model or args.tiny):
        parser.error("--model is needed, unless --tiny makes one up")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with TemporaryDirectory() as folder:
        if args.tiny:
            args.data = made_up_data(Path(folder))
        detector = (tiny_detector() if args.tiny else load_detector(args.model)).to(args.device)
        data = DetectionData(args.dataset, args.data, args.split, args.limit)
        known = json.loads(args.ap_of.read_text()) if args.ap_of else None
        contenders = chosen(args, detector) if known is None else contenders_of(known["rows"])
        resampling = None
        if args.resamples:
            resampling = Resampling(np.random.default_rng(args.seed), args.resamples, args.against)
        rows = measure(detector, data, contenders, args.repeats, resampling, known and known["rows"])
    about = {
        "dataset": args.dataset,
        "images": len(data),
        "taps": depth_and_taps(detector)[1],
        "resamples": args.resamples,
        "seed": args.seed,
    }
    if known is not None:
        about |= {name: known[name] for name in ("images", "resamples", "seed")}
        about["ap_of"] = {name: known[name] for name in ("device", "date", "command")}
    if not args.tiny:
        about["training"] = how_trained(args.model)
        save(args.name, rows, {**environment(args.device, "fp32"), **about})
    print(measured_columns(rows, COLUMNS))
    if args.repeats:
        print(f"\nAt {args.at_speed} times the plain encoder's speed, or the next that is faster:\n")
        print(measured_columns(rows_at(rows, args.at_speed), COLUMNS))


def chosen(args: argparse.Namespace, detector: nn.Module) -> dict[str, Contender]:
    """Every combination of the options."""
    settings = args.settings or settings_of_table_4(depth_and_taps(detector)[0])
    runs = [name for name in CHOSEN if isinstance(METHODS[name], Ours) or not isinstance(detector, Yolos)]
    return named((m, location, keep, None) for location, keep in settings for m in args.methods or runs)


def contenders_of(rows: list[dict[str, Any]]) -> dict[str, Contender]:
    """The methods and settings of a result's rows, after the plain one."""
    return named((row["method"], row["location"], row["keep_ratio"], None) for row in rows[1:])


def named(contenders: Iterable[Contender]) -> dict[str, Contender]:
    return {f"{each[0]}, L={each[1]}, keep={each[2]}": each for each in contenders}


if __name__ == "__main__":
    main()
