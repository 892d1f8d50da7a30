"""Quality and speed of every way to reduce a trained Segmenter, on real images it was not trained on.

    python -m benchmarks.segmenter_quality --data CAMVID                      # the shipped model, CamVid val
    python -m benchmarks.segmenter_quality --data CAMVID --model FOLDER --keep 0.5 0.25 --locations 2 3
    python -m benchmarks.segmenter_quality --dataset ade20k --data ADE --model CONVERTED --methods ToMe:r=40 Expedite

mIoU over whole images at native resolution, whatever size the model's image processor makes of them; agreement is the
share of pixels with the plain model's label; speed is that of the whole model on one image. Methods, controls and peers:
benchmarks/methods.py; "NAME:key=value" sets a peer's own settings, and without them its FLOPs are matched to ours at the
same L and keep ratio.
"""

from __future__ import annotations

import argparse
import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ailurus_hf import SegmenterForSemanticSegmentation, SegmenterImageProcessor
from ailurus_hf.comparison import confusion, mean_iou
from ailurus_hf.segmenter import first_window, windowed_outputs

from .datasets import DATASETS, SegmentationData
from .harness import environment, interleaved, markdown, model_flops, save
from .methods import METHODS, Reduction, Setting, apply_method, parsed

SHIPPED = Path(__file__).parent.parent / "examples" / "assets" / "segmenter-camvid"
COLUMNS = {
    "method": "method",
    "location": "L",
    "num_clusters": "M",
    "miou": "mIoU|{:.2f}",
    "lost": "lost|{:+.2f}",
    "agreement": "agreement|{:.1%}",
    "speed_up": "speed-up|{:.2f}×",
    "share_of_ideal": "share of ideal|{:.2f}",
}


def reduced_copy(model: nn.Module, method: str, setting: Setting, images: list[Tensor]) -> tuple[nn.Module, Reduction]:
    """A copy of the model with the method on, and the handle on it; images: to match FLOPs on.

    Copies share the model's weights: where in memory weights lie moves a ratio by several percent.
    """
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    return twin, apply_method(twin, method, setting, [lambda image=image: twin(image) for image in images])


def pixel_values(processor: SegmenterImageProcessor, data: SegmentationData, index: int) -> Tensor:
    return processor(images=data.image(index), return_tensors="pt")["pixel_values"]


@torch.inference_mode()
def label_maps(model: nn.Module, processor: SegmenterImageProcessor, data: SegmentationData) -> list[Tensor]:
    maps = []
    for i in range(len(data)):
        outputs = windowed_outputs(model, processor, pixel_values(processor, data, i))
        maps += processor.post_process_semantic_segmentation(outputs, target_sizes=[data.image(i).size[::-1]])
    return [labels.to(torch.uint8) for labels in maps]


def miou(maps: list[Tensor], data: SegmentationData) -> float:
    """Percent, over the labelled pixels of all images."""
    matrices = (confusion(m.numpy().astype(int), data.label(i).numpy(), data.num_classes) for i, m in enumerate(maps))
    return round(100 * mean_iou(np.sum(list(matrices), axis=0)), 2)


def measure(
    model: nn.Module,
    processor: SegmenterImageProcessor,
    data: SegmentationData,
    contenders: dict[str, tuple[str, int, float, int | None]],
    repeats: int,
) -> list[dict[str, Any]]:
    """One row a contender (method, L, keep ratio, restore_location), after one for the plain model."""
    image = first_window(processor, pixel_values(processor, data, 0))
    full = model_flops(lambda: model(image))
    plain_maps = label_maps(model, processor, data)
    plain = miou(plain_maps, data)
    chosen = range(0, len(data), max(len(data) // 2, 1))
    samples = [first_window(processor, pixel_values(processor, data, i)) for i in chosen]
    reduced = {
        name: reduced_copy(model, method, Setting(*fields), samples) for name, (method, *fields) in contenders.items()
    }
    twins = {name: twin for name, (twin, _) in reduced.items()}
    rows: list[dict[str, Any]] = [{"method": "plain", "miou": plain, "speed_up": 1.0, "agreement": 1.0}]
    for name, twin in tqdm(twins.items(), desc="quality"):
        maps = label_maps(twin, processor, data)
        reduction = reduced[name][1]
        same = sum((a == b).float().mean().item() for a, b in zip(maps, plain_maps, strict=True)) / len(maps)
        method, location, keep, restore_location = contenders[name]
        value = miou(maps, data)
        rows.append(
            {
                "method": method,
                "location": location,
                "keep_ratio": keep,
                "restore_location": restore_location,
                "settings": reduction.settings,
                "num_clusters": reduction.num_clusters(),
                "miou": value,
                "lost": plain - value,
                "agreement": same,
                "ideal": full / reduction.flops(full, lambda twin=twin: twin(image)),
            }
        )
    images = [pixel_values(processor, data, i) for i in range(0, len(data), 7)]
    with torch.inference_mode():
        runs = {
            name: (lambda n, m=m: windowed_outputs(m, processor, images[n % len(images)]))
            for name, m in {"plain": model, **twins}.items()
        }
        seconds = interleaved(runs, repeats, warmup=3)
    for row, name in zip(rows, ["plain", *twins], strict=True):
        row["ms"] = 1e3 * seconds[name]
        row["speed_up"] = seconds["plain"] / seconds[name]
        row["share_of_ideal"] = row["speed_up"] / row.get("ideal", 1.0)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="camvid", choices=DATASETS)
    parser.add_argument("--data", help="its folder (default: the one of its name in AILURUS_DATA)")
    parser.add_argument("--model", default=str(SHIPPED), help="Segmenter folder or Hub name (default: the shipped one)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25, 0.12])
    parser.add_argument("--locations", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--restore-locations", nargs="+", type=int, default=[], help="also these, with residual")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--limit", type=int, help="only so many images")
    parser.add_argument("--name", default="segmenter_quality", help="of the result file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = SegmenterForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = SegmenterImageProcessor.from_pretrained(args.model)
    data = SegmentationData(args.dataset, args.data, limit=args.limit)
    contenders = {}
    for location in args.locations:
        for keep in args.keep:
            for method in args.methods:
                places = [None] + (args.restore_locations if METHODS[parsed(method)[0]].takes_restore_location else [])
                for restore_location in places:
                    key = f"{method}, L={location}, keep={keep}, R={restore_location}"
                    contenders[key] = (method, location, keep, restore_location)
    rows = measure(model, processor, data, contenders, args.repeats)
    save(args.name, rows, {**environment(torch.device("cpu"), "fp32"), "dataset": args.dataset, "images": len(data)})
    print(markdown(rows, {**COLUMNS, **({"restore_location": "R"} if args.restore_locations else {})}))


if __name__ == "__main__":
    main()
