"""Plain and reduced as files of other runtimes: the share of the FLOPs-ideal that each reaches, and what a file costs.

    python -m benchmarks.vision.exported_speed                     # all of GEOMETRIES, batch 1, fp32
    python -m benchmarks.vision.exported_speed --runtimes AOTInductor --name exported_speed_aoti  # minutes a file
    python -m benchmarks.vision.exported_speed --models "ViT-B/16 512" --clusterings local_kmeans
    python -m benchmarks.vision.exported_speed --tiny              # a dry run in seconds, saves nothing

Every file is what `ailurus-hf export` writes, for one image. The plain model's file and the reduced ones' of one
runtime take turns in one process, on as many threads as torch has. "Difference" is the most that an output of the file
is off the torch model's, RMS over RMS, on three images. Random weights but for the Segmenter, with queries and keys
made three times as large, so that attention is not uniform.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from ailurus_hf import (
    AiluRusConfig,
    SegmenterConfig,
    SegmenterForSemanticSegmentation,
    ailurus_status,
    apply_ailurus,
)
from ailurus_hf.cli.export import WRITERS
from ailurus_hf.versions import installed_version

from ..harness import SPEED_COLUMNS, environment, interleaved, log, markdown, model_flops, save
from .compiled_speed import Geometry, sharing_weights
from .families_speed import depth_anything
from .segmenter_quality import SHIPPED

COLUMNS = {
    "model": "model",
    "runtime": "runtime",
    "clustering": "clustering",
    **SPEED_COLUMNS,
    "difference": "difference|{:.0e}",
    "export_s": "export|{:.0f} s",
    "plain_export_s": "of plain|{:.0f} s",
    "megabytes": "file|{:.0f} MB",
    "plain_megabytes": "of plain|{:.0f} MB",
}
# From an image to the output of a file.
Run = Callable[[Tensor], Tensor]


def classifier(**sizes: Any) -> nn.Module:
    """A ViT-B with a head of 1000 classes, or of other sizes."""
    return ViTForImageClassification(ViTConfig(**{"image_size": 512, "num_labels": 1000, **sizes}))


BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
QUARTER = {"cluster_location": 2, "keep_ratio": 0.25}
GEOMETRIES = {
    "ViT-B/16 512": Geometry(classifier, (512, 512), lambda out: out.logits, QUARTER),
    "DINOv2-B + DPT head 518": Geometry(
        partial(depth_anything, 518, BASE, (96, 192, 384, 768), 128),
        (518, 518),
        lambda out: out.predicted_depth,
        QUARTER,
    ),
    "Segmenter, shipped, 720 × 960": Geometry(
        lambda: SegmenterForSemanticSegmentation.from_pretrained(SHIPPED, dtype=torch.float32),
        (720, 960),
        lambda out: out.logits,
        {**QUARTER, "restore": "smooth"},
    ),
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {"model_type": "vit", **SMALL, "intermediate_size": 64, "image_size": 64, "patch_size": 8}
EARLY = {"cluster_location": 1, "keep_ratio": 0.25}
TINY = {
    "ViT-B/16 512": Geometry(
        lambda: classifier(**SMALL, intermediate_size=64, image_size=64), (64, 64), lambda out: out.logits, EARLY
    ),
    "DINOv2-B + DPT head 518": Geometry(
        partial(depth_anything, 56, {**SMALL, "num_hidden_layers": 8}, (6, 12, 24, 48), 8),
        (56, 56),
        lambda out: out.predicted_depth,
        EARLY,
    ),
    "Segmenter, shipped, 720 × 960": Geometry(
        lambda: SegmenterForSemanticSegmentation(SegmenterConfig(encoder_config=ENCODER, num_labels=11)),
        (64, 64),
        lambda out: out.logits,
        {**EARLY, "restore": "smooth"},
    ),
}


class Prediction(nn.Module):
    """What exporters take: a tensor in, a tensor out."""

    def __init__(self, model: nn.Module, geometry: Geometry):
        super().__init__()
        self.model, self.prediction = model, geometry.prediction

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        return (self.prediction(self.model(pixel_values)),)


def sharpened(model: nn.Module, factor: float = 3.0) -> nn.Module:
    """The model with queries and keys so many times as large."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("q_proj", "k_proj"):
            module.weight.mul_(factor)
    return model


def write_aoti(module: nn.Module, image: Tensor, path: Path, names: Sequence[str], dynamic: bool) -> dict[str, Any]:
    """Compiled ahead of time by torch's own compiler, which needs one for C++."""
    program = torch.export.export(module, (image,))
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return {}


def open_onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"pixel_values": image.numpy()})[0])


def open_openvino(path: Path) -> Run:
    import openvino

    how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", {**how, "PERFORMANCE_HINT": "LATENCY"})
    return lambda image: torch.from_numpy(compiled(image.numpy())[0])


def open_aoti(path: Path) -> Run:
    program = torch._inductor.aoti_load_package(str(path))
    return lambda image: program(image)[0]


RUNTIMES = {
    "onnxruntime": (".onnx", WRITERS["onnx"], open_onnxruntime),
    "OpenVINO": (".xml", WRITERS["openvino"], open_openvino),
    "AOTInductor": (".pt2", write_aoti, open_aoti),
}


@torch.no_grad()
def measure(
    name: str, geometry: Geometry, runtime: str, clusterings: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """A row a clustering; the files of one runtime in turn."""
    torch.manual_seed(0)
    plain = geometry.make().eval()
    if not isinstance(plain, SegmenterForSemanticSegmentation):
        sharpened(plain)
    images = torch.randn(3, 1, 3, *geometry.size)
    full = model_flops(lambda: plain(images[0]))
    contenders: dict[str, Run] = {}
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        common = _file(plain, geometry, images, runtime, Path(folder, "plain"), contenders)
        for clustering in clusterings:
            reduced = apply_ailurus(sharing_weights(plain), AiluRusConfig(**geometry.fields, clustering=clustering))
            reduced(images[0])
            row = {"model": name, "runtime": runtime, "clustering": clustering, **geometry.fields}
            row["ideal"] = full / (full - ailurus_status(reduced).saved_flops)
            row |= {f"plain_{key}": value for key, value in common.items() if key != "opset"}
            row |= _file(reduced, geometry, images, runtime, Path(folder, clustering), contenders)
            rows.append(row)
            log.info("%s, %s, %s: exported in %.0f s", name, runtime, clustering, row["export_s"])
        turns = {key: lambda n, run=run: run(images[n % len(images)]) for key, run in contenders.items()}
        seconds = interleaved(turns, repeats, warmup=2)
    for row in rows:
        row |= {"plain_ms": 1e3 * seconds["plain"], "reduced_ms": 1e3 * seconds[row["clustering"]]}
        row["speed_up"] = row["plain_ms"] / row["reduced_ms"]
        row["share_of_ideal"] = row["speed_up"] / row["ideal"]
    return rows


def _file(
    model: nn.Module, geometry: Geometry, images: Tensor, runtime: str, path: Path, contenders: dict[str, Run]
) -> dict[str, Any]:
    """Writes a model's file and opens it as a contender: what it cost, and how far its outputs are off."""
    suffix, write, open_file = RUNTIMES[runtime]
    path.mkdir()  # large weights lie in files of their own
    module, file = Prediction(model, geometry), path / f"model{suffix}"
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn of their own code
        details = write(module, images[0], file, ["prediction"], False)
    seconds = time.perf_counter() - start
    contenders[path.name] = run = open_file(file)
    return {
        "export_s": seconds,
        "megabytes": sum(part.stat().st_size for part in path.iterdir()) / 1e6,
        "difference": max(_off(module, run, image) for image in images),
        **{key: str(value).split()[-1] for key, value in details.items()},
    }


def _off(module: nn.Module, run: Run, image: Tensor) -> float:
    (want,) = module(image)
    return float((run(image) - want).norm() / want.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(GEOMETRIES), choices=GEOMETRIES)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "OpenVINO"], choices=RUNTIMES)
    parser.add_argument("--clusterings", nargs="+", default=["local_kmeans", "density_peaks", "ward"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="tiny models, and no result file: does everything run?")
    parser.add_argument("--name", default="exported_speed", help="of the result file (default: %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for exporter in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(exporter).setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for runtime in args.runtimes:
            geometry = (TINY if args.tiny else GEOMETRIES)[name]
            rows += measure(name, geometry, runtime, args.clusterings, args.repeats)
            print(markdown(rows[-len(args.clusterings) :], COLUMNS), flush=True)
            if not args.tiny:
                about = environment(torch.device("cpu"), "fp32")
                about["versions"] |= {each: installed_version(each) for each in ("onnxruntime", "openvino")}
                save(args.name, rows, about)


if __name__ == "__main__":
    main()
