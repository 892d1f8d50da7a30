"""Write a trained Segmenter in half precision, with its score on CamVid's validation photographs and a model card.

    python examples/export_segmenter.py --data CAMVID --model run/model --output segmenter-camvid
    python examples/export_segmenter.py --data CAMVID --model run2/best --average-with run/best --output averaged
    python examples/export_segmenter.py --data CAMVID --model a/model --average-with b/model c/best --output averaged

The model is a folder of train_segmenter.py (run/best) or of finetune_segmentation.py (run/model). It is scored in
float32 as it was written.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from camvid_data import PATCH, CamVid, confusion_on_images, scores
from torch.optim.swa_utils import AveragedModel
from train_segmenter import enlargement, image_processor, set_position_grid
from training import data_folder
from transformers import AutoModelForSemanticSegmentation

from ailurus_hf.segmenter import SegmenterForSemanticSegmentation

log = logging.getLogger("export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="CamVid folder (default: $AILURUS_DATA/camvid)")
    parser.add_argument("--model", required=True, type=Path, help="Segmenter folder")
    parser.add_argument("--average-with", type=Path, nargs="+", default=[], help="write the mean of all their weights")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = SegmenterForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32)
    others = [SegmenterForSemanticSegmentation.from_pretrained(each, dtype=torch.float32) for each in args.average_with]
    model = averaged(model, others)
    export(model, args.output, CamVid(data_folder(args.data, "camvid"), "val", enlargement(args.model)))


def averaged(
    model: SegmenterForSemanticSegmentation, others: list[SegmenterForSemanticSegmentation]
) -> SegmenterForSemanticSegmentation:
    """The mean of the weights of several runs or stages (Wortsman et al. 2022, "Model soups"), on the model's grid."""
    grid, mean = [side // PATCH for side in model.config.encoder_config.image_size], AveragedModel(model)
    for each in (model, *others):
        set_position_grid(each, (grid[0], grid[1]))
        mean.update_parameters(each)
    return mean.module


def export(model: SegmenterForSemanticSegmentation, folder: Path, val: CamVid) -> None:
    """Writes the model in half precision, then scores in float32 what was written."""
    model.half().save_pretrained(folder)
    # Half on disk, float32 when loaded: many CPUs compute half precision slowly or not at all.
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["encoder_config"], config["decoder_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    image_processor(val.enlarge).save_pretrained(folder)

    written = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    assert written.dtype == torch.float32
    result = scores(confusion_on_images(written, val, range(len(val))))
    (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(model, result, folder))
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
    log.info("%s: %.1f MB, val mIoU %.2f, %s", folder, size, result["miou"], result["iou"])


def model_card(model: SegmenterForSemanticSegmentation, result: dict, folder: Path) -> str:
    """What README.md of the folder says; `result` is of `scores`."""
    encoder, decoder = model.config.encoder_config, model.config.decoder_config
    table = "\n".join(f"| {name} | {value:.1f} |" for name, value in result["iou"].items())
    return f"""# A small Segmenter for street scenes

A plain ViT (patch {encoder.patch_size}, {encoder.num_hidden_layers} layers, {encoder.hidden_size} wide,
{encoder.num_attention_heads} heads) with a mask-transformer decoder of {decoder.num_hidden_layers} layers;
{model.num_parameters() / 1e6:.1f} M parameters in half precision. Trained from nothing on the 367 training photographs
of CamVid, for tests and demonstrations of token reduction: it is no competitor of models pretrained on ImageNet.

```python
import ailurus_hf.segmenter  # registers Segmenter with the Auto classes
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained("{folder.as_posix()}")
processor = AutoImageProcessor.from_pretrained("{folder.as_posix()}")
```

## How good it is

CamVid val, 101 photographs of 480 x 360 pixels, whole and at native resolution, all pixels but the unlabeled ones in
one confusion matrix, float32: **mIoU {result["miou"]:.1f}**, pixel accuracy {result["pixel_accuracy"]:.1f} %. The best
of the evaluations made during the first two runs was kept, on these same images.

| class | IoU |
| --- | --- |
{table}

## How it was made

    python examples/pretrain_masked.py --data CAMVID --output pretrained --minutes 14
    export OMP_NUM_THREADS=1
    torchrun --nproc-per-node 2 examples/train_segmenter.py --data CAMVID --init pretrained --output run
    torchrun --nproc-per-node 2 examples/train_segmenter.py --data CAMVID --init run/best --output run2 \\
        --enlarge 2 --grid 24 32 --batch-size 4 --min-batch-size 1 --lr 1e-3 --decay-share 0.5 --max-minutes 62
    python examples/export_segmenter.py --data CAMVID --model run2/best --average-with run/best --output mean
    python examples/finetune_segmentation.py --data CAMVID --model mean --output run3 --keep 1 --epochs 1 \\
        --batch-size 2 --lr 1e-4
    python examples/export_segmenter.py --data CAMVID --model run3/model --output {folder.as_posix()}

on two CPU cores; all seeds are 0. The photographs are seen twice enlarged (2700 tokens instead of 690: CamVid's poles,
signs and people are smaller than a patch); the image processor of this folder does that. The first two runs were
interrupted and resumed with other settings a few times before the scripts' defaults were what they are: a run of your
own will differ a little. Fine-tuning is plain, on all tokens.

## Origin and license

The weights are under this project's license. The data is CamVid, the Cambridge-driving Labeled Video Database
(University of Cambridge; 11 classes as in the SegNet release): G. J. Brostow, J. Fauqueur, R. Cipolla, "Semantic object
classes in video: a high-definition ground truth database", Pattern Recognition Letters 30(2), 2009; G. J. Brostow, J.
Shotton, J. Fauqueur, R. Cipolla, "Segmentation and recognition using structure from motion point clouds", ECCV 2008.
"""


if __name__ == "__main__":
    main()
