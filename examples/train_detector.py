"""Train Mask R-CNN on a plain ViT with data in COCO's format, and measure its AP with AiluRus off and on.

    python examples/train_detector.py --data COCO --encoder microsoft/beit-base-patch16-224 --output run
    python examples/train_detector.py --data COCO --output run --resume --epochs 24      # go on, or on for longer
    python examples/train_detector.py --data COCO --output run --evaluate 3,1296  # AP and time at L 3, M 1296

COCO holds a folder of images for each split and annotations/instances_SPLIT.json. The defaults are the 1x schedule of
the paper (section 4.2): 12 epochs, AdamW with a smaller step for earlier layers, 800-pixel inputs. Several devices:
`accelerate launch examples/train_detector.py ...`. Every epoch writes run/state, which --resume and --evaluate read.
"""

import argparse
import io
import json
import re
import statistics
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from pycocotools import mask as run_lengths
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_model
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import AutoConfig, AutoModel

from ailurus_hf import AiluRusConfig, apply_ailurus, remove_ailurus
from ailurus_hf.detection.detector import mask_rcnn

TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


class Coco(CocoDetection):
    """One split, without crowds, which are no instances."""

    def __init__(self, data: Path, split: str, transforms: list, only_annotated: bool):
        super().__init__(data / split, data / f"annotations/instances_{split}.json", transforms=v2.Compose(transforms))
        if only_annotated:
            self.ids = [image for image in self.ids if self._load_target(image)]

    def _load_target(self, id: int) -> list:
        return [each for each in super()._load_target(id) if not each.get("iscrowd")]


def training_data(args: argparse.Namespace) -> DataLoader:
    data = Coco(args.data, args.train, [*TENSOR, v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes()], True)
    data = wrap_dataset_for_transforms_v2(data, target_keys=("boxes", "labels", "masks"))
    return DataLoader(
        data, args.batch_size, shuffle=True, num_workers=args.workers, collate_fn=lambda samples: tuple(zip(*samples))
    )


def make_detector(args: argparse.Namespace, source: str, pretrained: bool) -> torch.nn.Module:
    """A detector for COCO's category numbers, of which 0 is the background."""
    categories = json.loads((args.data / f"annotations/instances_{args.train}.json").read_text())["categories"]
    made = (
        AutoModel.from_pretrained(source) if pretrained else AutoModel.from_config(AutoConfig.from_pretrained(source))
    )
    num_classes = 1 + max(category["id"] for category in categories)
    return mask_rcnn(made, num_classes, args.taps, **args.fields)


def parameter_groups(detector: torch.nn.Module, args: argparse.Namespace) -> list[dict]:
    """Each layer of the encoder learns slower than the next one by a factor; vectors do not decay."""
    depth, groups = detector.backbone.pyramid.config.num_hidden_layers, {}
    for name, parameter in detector.named_parameters():
        layer = re.search(r"\.encoder\..*layers?\.(\d+)\.", name)
        below = depth - int(layer[1]) if layer else (depth + 1 if ".encoder." in name else 0)
        decay = args.weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [], "lr": args.lr * args.layer_decay**below, "weight_decay": decay}
        groups.setdefault((below, decay), group)["params"].append(parameter)
    return list(groups.values())


def train(args: argparse.Namespace) -> None:
    # Without its pooler and last norm, which the pyramid does not read, an encoder is not all trained.
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    set_seed(args.seed)
    output, state = Path(args.output), Path(args.output) / "state"
    detector = make_detector(args, args.output if args.resume else args.encoder, not (args.resume or args.from_config))
    if args.reduce:
        apply_ailurus(detector, AiluRusConfig(cluster_location=args.reduce[0], num_clusters=args.reduce[1]))
    optimizer = torch.optim.AdamW(parameter_groups(detector, args))
    loader = training_data(args)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=args.warmup)
    drops = [round(len(loader) * args.epochs * share) for share in (0.75, 0.92)]
    drop = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warmup, drop], optimizer)
    detector, optimizer, loader, schedule = accelerator.prepare(detector, optimizer, loader, schedule)
    first = 0
    if args.resume:
        accelerator.load_state(state)
        first = json.loads((output / "progress.json").read_text())["epochs"]
    for epoch in range(first, args.epochs):
        detector.train()
        losses = []
        for images, targets in tqdm(loader, desc=f"epoch {epoch + 1}", disable=not accelerator.is_main_process):
            loss = sum(detector(list(images), list(targets)).values())
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.save_state(state)
        if accelerator.is_main_process:
            accelerator.unwrap_model(detector).backbone.pyramid.config.save_pretrained(output)
            progress = {"epochs": epoch + 1, "loss": statistics.mean(losses)}
            (output / "progress.json").write_text(json.dumps(progress) + "\n")
            print(progress)


@torch.no_grad()  # BEiT keeps tensors that it makes, and could not train on with those of inference mode
def average_precision(detector: torch.nn.Module, data: Coco, device: torch.device) -> dict:
    """COCO's AP of boxes and masks, in percent, and the median time of an image."""
    found, seconds = [], []
    for number in tqdm(range(len(data)), desc="evaluation"):
        image = data[number][0].to(device)
        start = time.perf_counter()
        result = {key: value.cpu() for key, value in detector([image])[0].items()}
        seconds.append(time.perf_counter() - start)
        corners = result["boxes"]
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        masks = (result["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
        for box, label, score, mask in zip(boxes, result["labels"].tolist(), result["scores"].tolist(), masks):
            about = {"image_id": data.ids[number], "category_id": label, "score": score}
            found.append({**about, "bbox": box, "segmentation": run_lengths.encode(np.asfortranarray(mask))})
    row = {"box_ap": 0.0, "mask_ap": 0.0, "ms": 1e3 * statistics.median(seconds)}
    if found:
        with redirect_stdout(io.StringIO()):  # its tables
            for kind, key in (("bbox", "box_ap"), ("segm", "mask_ap")):
                # A box has the area of its mask otherwise.
                given = [{k: v for k, v in each.items() if kind == "segm" or k != "segmentation"} for each in found]
                scores = COCOeval(data.coco, data.coco.loadRes(given), kind)
                scores.evaluate(), scores.accumulate(), scores.summarize()
                row[key] = 100 * float(scores.stats[0])
    return row


def evaluate(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = make_detector(args, args.output, pretrained=False)
    load_model(detector, Path(args.output) / "state/model.safetensors")
    detector.eval().to(device)
    data = Coco(args.data, args.val, TENSOR, False)
    rows = []
    for setting in ["plain", *args.evaluate]:
        if setting != "plain":
            # The paper's form (copied back) and hyperparameters.
            apply_ailurus(detector, AiluRusConfig.paper(*map(int, setting.split(","))))
        rows.append({"setting": setting, **average_precision(detector, data, device)})
        print(json.dumps(rows[-1]))
    remove_ailurus(detector)
    (Path(args.output) / "evaluation.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", default="train2017", help="the split that is trained on")
    parser.add_argument("--val", default="val2017")
    parser.add_argument("--output", required=True)
    parser.add_argument("--encoder", help="a plain ViT or BEiT, from the Hub or a folder")
    parser.add_argument(
        "--from-config", action="store_true", help="take the encoder's configuration only, not its weights"
    )
    parser.add_argument("--taps", type=int, nargs="+", help="layers that are read: four (default: each quarter) or one")
    parser.add_argument("--reduce", type=int, nargs=2, metavar=("L", "M"), help="train with AiluRus on")
    parser.add_argument("--evaluate", nargs="*", metavar="L,M", help="measure AP, plain and at these settings")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2, help="of each device")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--layer-decay", type=float, default=0.75)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=500, help="steps")
    parser.add_argument(
        "--fields", type=json.loads, default={}, help='of torchvision\'s MaskRCNN, as JSON: {"min_size": 640, ...}'
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.evaluate is not None:
        evaluate(args)
    elif not (args.encoder or args.resume):
        parser.error("--encoder is needed, unless --resume goes on with the one in --output")
    else:
        train(args)


if __name__ == "__main__":
    main()
