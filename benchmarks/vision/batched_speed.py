"""Images a second in batches, plain and reduced, with memory; and where a pipeline's time goes over a folder of images.

    python -m benchmarks.vision.batched_speed --images CAMVID/val/images     # batches of 1, 4, 8, 16, then the pipeline
    python -m benchmarks.vision.batched_speed --parts batches --batches 8 --models "ViT-B/16 512" --device cuda
    python -m benchmarks.vision.batched_speed --tiny                         # a dry run in seconds, saves nothing

Every image of a batch is another one. "Memory" is the most that a forward held beyond what was held before it: torch's
count on a GPU, Linux's on a CPU. The pipeline is transformers' own: it decodes, prepares, runs and post-processes one
image after the other; its parts are timed around its own functions, plain and reduced in turn. Random weights but for
the Segmenter.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from ailurus_hf import AiluRusConfig, SegmenterImageProcessor, ailurus_enabled, ailurus_status
from ailurus_hf.evaluation.timing import wait_for

from ..harness import ROOT, environment, interleaved, log, markdown, model_flops, peak_bytes, save
from .compiled_speed import Geometry
from .exported_speed import GEOMETRIES as ALL
from .exported_speed import TINY
from .segmenter_quality import SHIPPED

GEOMETRIES = {name: ALL[name] for name in ("ViT-B/16 512", "Segmenter, shipped, 720 × 960")}
COLUMNS = {
    "model": "model",
    "clustering": "clustering",
    "batch": "batch",
    "plain_images_per_s": "plain|{:.2f} images/s",
    "images_per_s": "reduced|{:.2f} images/s",
    "speed_up": "speed-up|{:.2f}×",
    "ideal": "FLOPs-ideal|{:.2f}×",
    "share_of_ideal": "share|{:.3f}",
    "plain_mib": "memory, plain|{:.0f} MiB",
    "mib": "reduced|{:.0f} MiB",
    "cosine": "cosine|{:.3f}",
}
STEPS = ("decode", "preprocess", "backbone", "head", "postprocess", "rest")
PIPELINE_COLUMNS = {
    "model": "model",
    "clustering": "clustering",
    "total_ms": "an image|{:.0f} ms",
    **{f"{step}_ms": f"{step}|{{:.1f}} ms" for step in STEPS},
    "speed_up": "speed-up|{:.2f}×",
    "backbone_speed_up": "of the backbone|{:.2f}×",
}


@torch.inference_mode()
def measure_batch(
    name: str, geometry: Geometry, clusterings: Sequence[str], batch: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row a clustering: one model, on which each is on for its turn alone."""
    torch.manual_seed(0)
    model = geometry.make().eval().to(device)
    images = torch.randn(2, batch, 3, *geometry.size, device=device)
    full = batch * model_flops(lambda: model(images[0, :1]))
    configs = {"plain": None, **{each: AiluRusConfig(**geometry.fields, clustering=each) for each in clusterings}}
    found: dict[str, dict[str, Any]] = {}
    for key, config in configs.items():
        with ailurus_enabled(model, config):
            output = geometry.prediction(model(images[0])).float()
            peak = peak_bytes(lambda: model(images[0]), device)
            found[key] = {"output": output.flatten(1), "mib": None if peak is None else peak / 2**20}
            found[key]["saved"] = batch * ailurus_status(model).saved_flops if config is not None else 0
    seconds = interleaved(
        {key: lambda n: model(images[n % len(images)]) for key in configs},
        repeats,
        warmup=1,
        device=device,
        around=lambda key: ailurus_enabled(model, configs[key]),
    )
    rows = []
    for key in clusterings:
        row = {"model": name, "clustering": key, **geometry.fields, "batch": batch}
        row |= {"plain_images_per_s": batch / seconds["plain"], "images_per_s": batch / seconds[key]}
        row |= {"speed_up": seconds["plain"] / seconds[key], "ideal": full / (full - found[key]["saved"])}
        row["share_of_ideal"] = row["speed_up"] / row["ideal"]
        row |= {"plain_mib": found["plain"]["mib"], "mib": found[key]["mib"]}
        row["cosine"] = F.cosine_similarity(found["plain"]["output"], found[key]["output"]).mean().item()
        rows.append(row)
    return rows


class Steps:
    """Seconds of a pipeline by step; a step inside another counts for itself alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._begun: list[tuple[str, float]] = []

    def begin(self, step: str) -> None:
        wait_for(self.device)
        self._begun.append((step, time.perf_counter()))

    def end(self) -> None:
        wait_for(self.device)
        step, start = self._begun.pop()
        taken = time.perf_counter() - start
        self.seconds[step] += taken
        if self._begun:
            self.seconds[self._begun[-1][0]] -= taken

    def around(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin(step)
            try:
                return function(*args, **kwargs)
            finally:
                self.end()

        return timed

    @contextmanager
    def watching(self, pipe: transformers.Pipeline) -> Iterator[None]:
        """Times the pipeline's own functions, and its model's forwards."""
        module = sys.modules[type(pipe).__module__]
        load_image = module.load_image
        backbone = pipe.model.base_model
        handles = []
        for part, step in ((pipe.model, "head"), (backbone, "backbone")):
            handles.append(part.register_forward_pre_hook(lambda *_, step=step: self.begin(step), prepend=True))
            handles.append(part.register_forward_hook(lambda *_: self.end()))
        module.load_image = self.around("decode", load_image)
        pipe.preprocess = self.around("preprocess", pipe.preprocess)
        pipe.postprocess = self.around("postprocess", pipe.postprocess)
        try:
            yield
        finally:
            module.load_image = load_image
            del pipe.preprocess, pipe.postprocess
            for handle in handles:
                handle.remove()


def make_pipeline(geometry: Geometry, device: torch.device) -> transformers.Pipeline:
    """Of a geometry's model, which classifies or segments."""
    torch.manual_seed(0)
    model: nn.Module = geometry.make().eval()
    if type(model).__name__.endswith("ForImageClassification"):
        size = {"height": geometry.size[0], "width": geometry.size[1]}
        processor: Any = transformers.ViTImageProcessor(size=size)
        return transformers.pipeline("image-classification", model=model, image_processor=processor, device=device)
    processor = SegmenterImageProcessor.from_pretrained(SHIPPED)
    return transformers.pipeline("image-segmentation", model=model, image_processor=processor, device=device)


def measure_pipeline(
    name: str, geometry: Geometry, clusterings: Sequence[str], files: Sequence[str], repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for the plain model and for each clustering: medians over runs through the files, in turn."""
    pipe = make_pipeline(geometry, device)
    configs = {"–": None, **{each: AiluRusConfig(**geometry.fields, clustering=each) for each in clusterings}}
    taken: dict[str, list[dict[str, float]]] = defaultdict(list)

    def once(key: str) -> None:
        steps = Steps(device)
        with steps.watching(pipe):
            steps.begin("rest")
            for _ in pipe(list(files)):
                pass
            steps.end()
        taken[key].append(dict(steps.seconds))

    interleaved(
        {key: lambda n, key=key: once(key) for key in configs},
        repeats,
        warmup=1,
        around=lambda key: ailurus_enabled(pipe.model, configs[key]),
    )
    rows: list[dict[str, Any]] = []
    for key, runs in taken.items():
        row: dict[str, Any] = {"model": name, "clustering": key, **geometry.fields, "images": len(files)}
        for step in STEPS:
            row[f"{step}_ms"] = 1e3 * statistics.median(run.get(step, 0.0) for run in runs[1:]) / len(files)
        row["total_ms"] = 1e3 * statistics.median(sum(run.values()) for run in runs[1:]) / len(files)
        row["speed_up"] = (rows[0] if rows else row)["total_ms"] / row["total_ms"]
        row["backbone_speed_up"] = (rows[0] if rows else row)["backbone_ms"] / row["backbone_ms"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--clusterings", nargs="+", default=["local_kmeans", "ward"])
    parser.add_argument("--parts", nargs="+", default=["batches", "pipeline"], choices=["batches", "pipeline"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--images", type=Path, default=ROOT / "examples" / "assets", help="folder for the pipeline")
    parser.add_argument("--limit", type=int, default=15, help="images of the folder (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny models, and no result file: does everything run?")
    parser.add_argument("--name", default="batched_speed", help="of the batches' result file (default: %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    files = [str(path) for path in sorted(args.images.iterdir()) if path.suffix == ".jpg"][: args.limit]
    about = environment(args.device, "fp32")
    batched: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for name in args.models:
        geometry = (TINY if args.tiny else GEOMETRIES)[name]
        for batch in args.batches if "batches" in args.parts else ():
            batched += measure_batch(name, geometry, args.clusterings, batch, args.repeats, args.device)
            log.info("%s", markdown(batched[-len(args.clusterings) :], COLUMNS))
            if not args.tiny:
                save(args.name, batched, about)
        if "pipeline" in args.parts:
            parts += measure_pipeline(name, geometry, args.clusterings, files, args.repeats, args.device)
            if not args.tiny:
                save("pipeline_parts", parts, about)
    for rows, columns in ((batched, COLUMNS), (parts, PIPELINE_COLUMNS)):
        if rows:
            print(markdown(rows, columns) + "\n")


if __name__ == "__main__":
    main()
