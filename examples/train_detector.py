"""Train Mask R-CNN, or Faster R-CNN where no masks are, on a plain ViT; measure AP with AiluRus off and on.

    python examples/train_detector.py --data COCO --encoder microsoft/beit-base-patch16-224 --output run
    python examples/train_detector.py --data COCO --output run --resume --epochs 24      # go on, or on for longer
    python examples/train_detector.py --data COCO --output run --evaluate 3,1296  # AP and time at L 3, M 1296

COCO holds a folder of images for each split and annotations/instances_SPLIT.json. The defaults are the 1x schedule of
the paper (section 4.2): 12 epochs, AdamW with a smaller step for earlier layers, 800-pixel inputs. A folder of a
Segmenter gives its encoder. Several devices: `accelerate launch examples/train_detector.py ...`. Every epoch writes
run/state, which --resume and --evaluate read, and run/detector.json says what its weights fit.
"""

import argparse
import io
import json
import re
import statistics
import time
from collections import Counter
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
from training import Stopwatch
from transformers import AutoConfig, AutoModel, PreTrainedModel, ViTConfig, ViTModel

from ailurus_hf import AiluRusConfig, SegmenterConfig, SegmenterForSemanticSegmentation, apply_ailurus, remove_ailurus
from ailurus_hf.detection.detector import faster_rcnn, mask_rcnn
from ailurus_hf.segmenter.modeling_segmenter import resize_position_embeddings

TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


class Coco(CocoDetection):
    """One split, without crowds, which are no instances."""

    def __init__(self, data: Path, split: str, transforms: list, only_annotated: bool):
        super().__init__(data / split, data / f"annotations/instances_{split}.json", transforms=v2.Compose(transforms))
        if only_annotated:
            self.ids = [image for image in self.ids if self._load_target(image)]

    def _load_target(self, id: int) -> list:
        return [each for each in super()._load_target(id) if not each.get("iscrowd")]


def training_data(args: argparse.Namespace, masks: bool) -> DataLoader:
    flips = [v2.RandomHorizontalFlip(), *([v2.RandomVerticalFlip()] if args.flip_vertically else [])]
    data = Coco(args.data, args.train, [*TENSOR, *flips, v2.SanitizeBoundingBoxes()], True)
    data = wrap_dataset_for_transforms_v2(data, target_keys=("boxes", "labels", *(["masks"] if masks else [])))
    return DataLoader(
        data, args.batch_size, shuffle=True, num_workers=args.workers, collate_fn=lambda samples: tuple(zip(*samples))
    )


def described(args: argparse.Namespace) -> dict:
    """What a detector for the data is made of: COCO's category numbers as classes, of which 0 is the background."""
    annotated = json.loads((args.data / f"annotations/instances_{args.train}.json").read_text())
    return {
        "num_classes": 1 + max(category["id"] for category in annotated["categories"]),
        "masks": any(each.get("segmentation") for each in annotated["annotations"]),
        "taps": args.taps,
        "out_channels": args.channels,
        "fields": args.fields,
    }


def make_detector(encoder: PreTrainedModel, about: dict) -> torch.nn.Module:
    make = mask_rcnn if about["masks"] else faster_rcnn
    return make(encoder, about["num_classes"], about["taps"], about["out_channels"], **about["fields"])


def new_encoder(source: str, pretrained: bool) -> PreTrainedModel:
    """The encoder of a folder or the Hub; a Segmenter's as a plain ViT."""
    config = AutoConfig.from_pretrained(source)
    if not isinstance(config, SegmenterConfig):
        return AutoModel.from_pretrained(source) if pretrained else AutoModel.from_config(config)
    segmenter = SegmenterForSemanticSegmentation.from_pretrained(source, dtype=torch.float32)
    # Transformers' own ViT resizes position embeddings of square grids alone.
    old, weights = segmenter.config.encoder_config, segmenter.encoder.state_dict()
    sides = (old.image_size,) * 2 if isinstance(old.image_size, int) else old.image_size
    grid = (sides[0] // old.patch_size, sides[1] // old.patch_size)
    encoder = ViTModel(ViTConfig(**{**old.to_dict(), "image_size": min(grid) * old.patch_size}))
    name = "embeddings.position_embeddings"
    weights[name] = resize_position_embeddings(weights[name], grid, (min(grid), min(grid)))
    if pretrained:
        left_out = encoder.load_state_dict(weights, strict=False)
        assert not left_out.unexpected_keys and all("pooler" in key for key in left_out.missing_keys), left_out
    return encoder


def saved_detector(output: Path) -> torch.nn.Module:
    """A detector that the weights in output/state fit, without them."""
    encoder = AutoModel.from_config(AutoConfig.from_pretrained(output))
    return make_detector(encoder, json.loads((output / "detector.json").read_text()))


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
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=args.precision, kwargs_handlers=[unused])
    set_seed(args.seed)
    output, state, about = Path(args.output), Path(args.output) / "state", described(args)
    if args.resume:
        detector = saved_detector(output)
    else:
        detector = make_detector(new_encoder(args.encoder, not args.from_config), about)
    if args.reduce:
        apply_ailurus(detector, AiluRusConfig(cluster_location=args.reduce[0], num_clusters=args.reduce[1]))
    optimizer = torch.optim.AdamW(parameter_groups(detector, args))
    loader = training_data(args, about["masks"])
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=args.warmup)
    drops = [round(len(loader) * args.epochs * share) for share in (0.75, 0.92)]
    drop = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warmup, drop], optimizer)
    detector, optimizer, loader, schedule = accelerator.prepare(detector, optimizer, loader, schedule)
    progress = {"epochs": 0, "minutes": 0.0}
    if args.resume:
        accelerator.load_state(state)
        drop.milestones = Counter(drops)  # of this many epochs, and not of those before
        progress = json.loads((output / "progress.json").read_text())
    clock = Stopwatch()
    for epoch in range(progress["epochs"], args.epochs):
        detector.train()
        losses = []
        for images, targets in tqdm(loader, desc=f"epoch {epoch + 1}", disable=not accelerator.is_main_process):
            started = time.time()
            loss = sum(detector(list(images), list(targets)).values())
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress["minutes"] += clock.counted(time.time() - started) / 60
        accelerator.save_state(state)
        if accelerator.is_main_process:
            accelerator.unwrap_model(detector).backbone.pyramid.config.save_pretrained(output)
            if not args.resume:
                (output / "detector.json").write_text(json.dumps(about) + "\n")
            progress |= {"epochs": epoch + 1, "loss": statistics.mean(losses)}
            (output / "progress.json").write_text(json.dumps(progress) + "\n")
            print(progress)


@torch.no_grad()  # BEiT keeps tensors that it makes, and could not train on with those of inference mode
def average_precision(detector: torch.nn.Module, data: Coco, device: torch.device) -> dict:
    """COCO's AP of boxes, and of masks where there are any, in percent, and the median time of an image."""
    found, seconds = [], []
    for number in tqdm(range(len(data)), desc="evaluation"):
        image = data[number][0].to(device)
        start = time.perf_counter()
        result = {key: value.cpu() for key, value in detector([image])[0].items()}
        seconds.append(time.perf_counter() - start)
        corners = result["boxes"]
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        masks = (result["masks"][:, 0] > 0.5).numpy().astype(np.uint8) if "masks" in result else [None] * len(boxes)
        for box, label, score, mask in zip(boxes, result["labels"].tolist(), result["scores"].tolist(), masks):
            about = {"image_id": data.ids[number], "category_id": label, "score": score, "bbox": box}
            outline = {} if mask is None else {"segmentation": run_lengths.encode(np.asfortranarray(mask))}
            found.append({**about, **outline})
    kinds = {"bbox": "box_ap", **({"segm": "mask_ap"} if detector.roi_heads.has_mask() else {})}
    row = {**dict.fromkeys(kinds.values(), 0.0), "box_ap50": 0.0, "ms": 1e3 * statistics.median(seconds)}
    if found:
        with redirect_stdout(io.StringIO()):  # its tables
            for kind, key in kinds.items():
                # A box has the area of its mask otherwise.
                given = [{k: v for k, v in each.items() if kind == "segm" or k != "segmentation"} for each in found]
                scores = COCOeval(data.coco, data.coco.loadRes(given), kind)
                scores.evaluate(), scores.accumulate(), scores.summarize()
                row[key] = 100 * float(scores.stats[0])
                if kind == "bbox":
                    row["box_ap50"] = 100 * float(scores.stats[1])
    return row


def evaluate(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = saved_detector(Path(args.output))
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
    parser.add_argument("--encoder", help="a plain ViT or BEiT, from the Hub or a folder, or a Segmenter's folder")
    parser.add_argument(
        "--from-config", action="store_true", help="take the encoder's configuration only, not its weights"
    )
    parser.add_argument("--taps", type=int, nargs="+", help="layers that are read: four (default: each quarter) or one")
    parser.add_argument("--channels", type=int, default=256, help="of the maps that the heads see")
    parser.add_argument("--reduce", type=int, nargs=2, metavar=("L", "M"), help="train with AiluRus on")
    parser.add_argument("--evaluate", nargs="*", metavar="L,M", help="measure AP, plain and at these settings")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2, help="of each device")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--layer-decay", type=float, default=0.75)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=500, help="steps")
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"], help="mixed with single, or not")
    parser.add_argument("--flip-vertically", action="store_true", help="for images without an up and a down")
    parser.add_argument(
        "--fields",
        type=json.loads,
        nargs="+",
        default=[],
        help="of torchvision's detector, as JSON: '{\"min_size\": 640}' …",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.fields = {name: value for fields in args.fields for name, value in fields.items()}
    if args.evaluate is not None:
        evaluate(args)
    elif not (args.encoder or args.resume):
        parser.error("--encoder is needed, unless --resume goes on with the one in --output")
    else:
        train(args)


if __name__ == "__main__":
    main()
