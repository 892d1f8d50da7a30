"""Segments a street image with AiluRus off and on: how fast, how well, how equal, and one picture of it.

python examples/segment_image.py
python examples/segment_image.py --image photo.jpg --model my-segmenter --keep-ratio 0.25 --output out/photo.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ailurus_hf import (
    AiluRusConfig,
    SegmenterForSemanticSegmentation,
    SegmenterImageProcessor,
    ailurus_enabled,
    ailurus_status,
    apply_ailurus,
)
from ailurus_hf.evaluation.comparison import confusion, format_table, mean_iou
from ailurus_hf.evaluation.timing import interleaved
from ailurus_hf.visualization import Panel, class_legend, class_palette, colorize_labels, draw_assignment, draw_sheet

ASSETS = Path(__file__).parent / "assets"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--image", type=Path, default=ASSETS / "street.jpg")
parser.add_argument("--labels", type=Path, help="ground truth, a PNG of class ids (default: that of the default image)")
parser.add_argument("--model", default=str(ASSETS / "segmenter-camvid"), help="Segmenter folder or Hub name")
parser.add_argument("--cluster-location", type=int, help="merge at the output of this layer (preset: 2)")
parser.add_argument("--keep-ratio", type=float, help="share of the tokens to keep (preset: 0.25)")
parser.add_argument("--clustering", help="ward, local_kmeans or density_peaks (preset: ward)")
parser.add_argument("--restore", help="copy, residual or smooth: what a token gets back (preset: smooth)")
parser.add_argument("--repeats", type=int, default=11, help="timed runs of each")
parser.add_argument("--output", type=Path, default=Path("demo/street_comparison.png"))
args = parser.parse_args()
if args.labels is None and args.image == ASSETS / "street.jpg":
    args.labels = ASSETS / "street_label.png"

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The shipped weights are in half precision, which a CPU computes slowly: widened here.
model = SegmenterForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
processor = SegmenterImageProcessor.from_pretrained(args.model)
image = Image.open(args.image).convert("RGB")
labels = np.asarray(Image.open(args.labels)).astype(int) if args.labels else None
class_names = [model.config.id2label[i] for i in range(model.config.num_labels)]
inputs = processor(images=image, return_tensors="pt").to(device)
fields = ("cluster_location", "keep_ratio", "clustering", "restore")
given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
reduction = AiluRusConfig.preset("dense", **given)


@torch.inference_mode()
def run() -> np.ndarray:
    outputs = model(**inputs)
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0].cpu().numpy()


seconds = interleaved(
    {"off": lambda _: run(), "on": lambda _: run()},
    args.repeats,
    device=device,
    around=lambda name: ailurus_enabled(model, reduction if name == "on" else None),
)
off_ms, on_ms = 1e3 * seconds["off"], 1e3 * seconds["on"]
plain = run()
apply_ailurus(model, reduction)
reduced = run()
status = ailurus_status(model)
clusters, grid = status.last_clusters, status.last_grid

# Drawn on the image as the model sees it: resized by the processor, and padded by the model on the right and at the
# bottom to whole patches, which `patch_size` undoes.
seen = image.resize(inputs["pixel_values"].shape[:1:-1])
assignment = draw_assignment(seen, clusters, grid, patch_size=model.config.patch_size)
agreement = (plain == reduced).mean()
rows = [
    ["milliseconds", f"{off_ms:.1f}", f"{on_ms:.1f}"],
    ["speed-up", "", f"{off_ms / on_ms:.2f}x"],
    [f"tokens after layer {reduction.cluster_location}", str(clusters.num_tokens), str(clusters.num_clusters)],
    ["pixels that agree", "", f"{agreement:.2%}"],
]
notes = [f"{clusters.num_tokens} tokens in every layer", f"{agreement:.1%} of the pixels as before"]
if labels is not None:
    scores = [mean_iou(confusion(prediction, labels, len(class_names))) for prediction in (plain, reduced)]
    rows.append(["mIoU on this image", *(f"{score:.2%}" for score in scores)])
    notes = [f"{note}, mIoU {score:.1%}" for note, score in zip(notes, scores, strict=True)]

# On the left what the layers get, on the right what they make of it; above without AiluRus, below with it.
palette = class_palette(class_names)
sheet = draw_sheet(
    [
        Panel("A photograph", image, f"{clusters.num_tokens} patches, each a token"),
        Panel(f"AiluRus off: {off_ms:.0f} ms", colorize_labels(plain, palette), notes[0]),
        Panel(
            f"{clusters.num_tokens} tokens in {clusters.num_clusters} clusters",
            assignment,
            f"after layer {reduction.cluster_location} each cluster is one token",
        ),
        Panel(
            f"AiluRus on: {on_ms:.0f} ms, {off_ms / on_ms:.1f}x as fast", colorize_labels(reduced, palette), notes[1]
        ),
    ],
    legend=class_legend([plain, reduced], class_names),
    panel_width=600,
)
args.output.parent.mkdir(parents=True, exist_ok=True)
sheet.save(args.output)
print(format_table([f"{args.image.name} on {device}", "off", "on"], rows))
print(f"picture: {args.output}")
