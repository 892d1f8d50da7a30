"""Train YOLOS, a detector of transformers on a plain ViT, on boxes in COCO's format; AP of every evaluation.

    python examples/train_yolos.py --data COCO --output run                    # from the shipped Segmenter's encoder
    python examples/train_yolos.py --data COCO --output run --resume           # go on after an interruption
    python examples/train_yolos.py --data COCO --output large --init run/best --rows 480

COCO holds a folder of images for each split and annotations/instances_SPLIT.json. run/best is a folder for
from_pretrained, and `ailurus-hf detect` reads it. The detector learns slowly from random matches, so each detection
token starts at a cell of a grid over the image, and learns the boxes that lie nearest to this cell, one each.
"""

import argparse
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from training import add_arguments, add_stochastic_depth, make_accelerator, running_mean, train
from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil
from transformers.loss.loss_for_object_detection import ImageLoss

from ailurus_hf import SegmenterForSemanticSegmentation
from ailurus_hf.evaluation.average_precision import matched_boxes, precision_of
from ailurus_hf.evaluation.boxes import Boxes, Truth
from ailurus_hf.segmenter.modeling_segmenter import resize_position_embeddings

SHIPPED = Path(__file__).parent / "assets/segmenter-camvid"
PATCH = 16
WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}  # DETR's
# YOLOS's names of a ViT's parts.
NAMES = {
    "layers.": "encoder.layer.", "attention.q_proj": "attention.attention.query", "attention.k_proj":
    "attention.attention.key", "attention.v_proj": "attention.attention.value", "attention.o_proj":
    "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip


class Coco:
    """One split; images of `rows` rows, columns to match the first image, both in whole patches."""

    def __init__(self, folder: Path, split: str, rows: int):
        listed = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        self.files = {each["id"]: folder / split / each["file_name"] for each in listed["images"]}
        self.sizes = {each["id"]: (each["width"], each["height"]) for each in listed["images"]}
        self.ids, self.categories = list(self.files), {each["id"]: each["name"] for each in listed["categories"]}
        self.boxes: dict[int, list[tuple[list[float], int]]] = {number: [] for number in self.ids}
        for each in listed["annotations"]:
            if not each.get("iscrowd"):
                self.boxes[each["image_id"]].append((each["bbox"], each["category_id"]))
        width, height = self.sizes[self.ids[0]]
        self.size = (rows // PATCH * PATCH, round(rows * width / height / PATCH) * PATCH)
        self.pixels = cache(self._pixels)

    def __len__(self) -> int:
        return len(self.ids)

    def _pixels(self, index: int) -> Tensor:
        image = (
            Image.open(self.files[self.ids[index]]).convert("RGB").resize(self.size[::-1], Image.Resampling.BILINEAR)
        )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def example(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image, -1 to 1, and boxes as YOLOS learns them: middle, width and height as shares of the image."""
        found = self.boxes[self.ids[index]]
        corner, side = torch.tensor([box for box, _ in found]).reshape(-1, 2, 2).unbind(1)
        boxes = torch.cat([corner + side / 2, side], 1) / torch.tensor(self.sizes[self.ids[index]] * 2)
        labels = torch.tensor([label for _, label in found], dtype=torch.long)
        return self.pixels(index) / 127.5 - 1, {"boxes": boxes, "class_labels": labels}

    def truth(self, index: int) -> Truth:
        boxes = self.boxes[self.ids[index]]
        corners = np.array([[x, y, x + w, y + h] for (x, y, w, h), _ in boxes]).reshape(-1, 4)
        return Truth(corners, np.array([label for _, label in boxes], int), np.zeros(len(boxes), bool))


class CellMatcher(nn.Module):
    """Matches true boxes with the detection tokens of the nearest cells, one each, whatever the tokens say so far."""

    def __init__(self, cells: tuple[int, int]):
        super().__init__()
        rows, columns = ((torch.arange(count) + 0.5) / count for count in cells)
        self.register_buffer("middles", torch.cartesian_prod(rows, columns).flip(1))

    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        distances = [torch.cdist(self.middles, each["boxes"][:, :2]).cpu() for each in targets]
        return [tuple(map(torch.as_tensor, linear_sum_assignment(each))) for each in distances]


def new_detector(folder: Path, data: Coco, cells: tuple[int, int]) -> YolosForObjectDetection:
    """A YOLOS of a Segmenter's encoder, whose detection tokens start at the positions of the cells' middles."""
    segmenter = SegmenterForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32)
    encoder, given = segmenter.encoder.config, segmenter.encoder.state_dict()
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    # COCO's numbers are the classes, and may leave some out.
    names = [data.categories.get(number, f"none {number}") for number in range(max(data.categories) + 1)]
    detector = YolosForObjectDetection(
        YolosConfig(
            **{name: getattr(encoder, name) for name in fields}, image_size=list(data.size), patch_size=PATCH,
            num_detection_tokens=cells[0] * cells[1], use_mid_position_embeddings=False,
            id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        )
    )  # fmt: skip
    sides = encoder.image_size if isinstance(encoder.image_size, (list, tuple)) else (encoder.image_size,) * 2
    old, new = (tuple(side // PATCH for side in each) for each in (sides, data.size))
    positions = given.pop("embeddings.position_embeddings")
    whole, of_cells = (resize_position_embeddings(positions, old, grid) for grid in (new, cells))
    weights = {renamed(name): weight for name, weight in given.items()}
    weights["embeddings.position_embeddings"] = torch.cat([whole, of_cells[:, 1:]], 1)
    left_out = detector.vit.load_state_dict(weights, strict=False)
    assert not left_out.unexpected_keys and left_out.missing_keys == ["embeddings.detection_tokens"], left_out
    return detector


def renamed(name: str) -> str:
    for vit, yolos in NAMES.items():
        name = name.replace(vit, yolos)
    return name


def optimizer_of(model: YolosForObjectDetection, weight_decay: float, encoder_lr: float) -> torch.optim.Optimizer:
    """AdamW; what was trained before learns at encoder_lr times the rate of the heads and the detection tokens."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = encoder_lr if name.startswith("vit.") and "detection_tokens" not in name else 1.0
        groups.setdefault((scale, weight_decay if parameter.ndim == 2 else 0.0), []).append(parameter)
    of_groups = [{"params": own, "lr_scale": s, "weight_decay": decay} for (s, decay), own in groups.items()]
    return torch.optim.AdamW(of_groups, lr=0.0, betas=(0.9, 0.98))


def flipped(image: Tensor, target: dict[str, Tensor], across: bool, down: bool) -> tuple[Tensor, dict[str, Tensor]]:
    boxes = target["boxes"].clone()
    for axis, flip in enumerate((across, down)):
        if flip:
            image, boxes[:, axis] = image.flip(2 - axis), 1 - boxes[:, axis]
    return image, {**target, "boxes": boxes}


@torch.no_grad()
def found_boxes(model: YolosForObjectDetection, image: Tensor, size: tuple[int, int]) -> Boxes:
    """What the detector says of one image of this width and height."""
    outputs = model(image[None])
    scores, labels = outputs.logits[0].float().softmax(-1)[:, :-1].max(-1)
    order = scores.argsort(descending=True)
    middle, side = outputs.pred_boxes[0].float()[order].split(2, 1)
    corners = torch.cat([middle - side / 2, middle + side / 2], 1).clamp(0, 1) * torch.tensor(size * 2)
    return Boxes(corners.numpy(), labels[order].numpy(), scores[order].numpy())


def evaluate(model: YolosForObjectDetection, data: Coco) -> dict[str, float]:
    """COCO's AP and AP50, in percent; bf16, as in training."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = [found_boxes(model, data.example(i)[0], data.sizes[number]) for i, number in enumerate(data.ids)]
    ap, ap50 = precision_of(matched_boxes(found, [data.truth(index) for index in range(len(data))]))
    return {"ap": round(100 * ap, 2), "ap50": round(100 * ap50, 2)}


def write(model: YolosForObjectDetection, data: Coco, folder: Path) -> None:
    """The folder that from_pretrained and the `ailurus-hf` commands read."""
    model.save_pretrained(folder)
    size = {"height": data.size[0], "width": data.size[1]}
    half = [0.5, 0.5, 0.5]
    YolosImageProcessorPil(size=size, do_pad=False, image_mean=half, image_std=half).save_pretrained(folder)


def main() -> None:
    args = parse_arguments()
    accelerator = make_accelerator()
    set_seed(args.seed)
    data, val = (Coco(args.data, split, args.rows) for split in (args.train, args.val))
    if json.loads((args.init / "config.json").read_text())["model_type"] == "yolos":
        model = YolosForObjectDetection.from_pretrained(args.init, dtype=torch.float32)
    else:
        model = new_detector(args.init, data, tuple(args.cells))
    average = running_mean(model, args.ema)
    layers = model.vit.encoder.layer
    add_stochastic_depth(model, [(layer.attention, layer.output.dropout) for layer in layers], args.drop_path)
    # Of a token without a box: the weight that makes all of them count as much as all with one, about.
    loss_of_boxes = ImageLoss(CellMatcher(tuple(args.cells)), model.config.num_labels, 0.4, ["labels", "boxes"])

    def loss_of(model: nn.Module, done: float, rng: np.random.Generator) -> tuple[Tensor, int]:
        examples = [data.example(index) for index in rng.integers(len(data), size=args.batch_size).tolist()]
        flips = (rng.random((len(examples), 2)) < (0.5, 0.5 * args.flip_vertically)).tolist()
        images, targets = zip(*(flipped(*example, *flip) for example, flip in zip(examples, flips)))
        outputs = model(torch.stack(images))
        losses = loss_of_boxes({"logits": outputs.logits, "pred_boxes": outputs.pred_boxes}, list(targets))
        return sum(WEIGHTS[name] * loss for name, loss in losses.items()), len(examples)

    train(
        accelerator, model, average, model, len(data), loss_of, lambda: evaluate(average.module, val), "ap",
        lambda folder: write(average.module, val, folder), args,
        [optimizer_of(model, args.weight_decay, args.encoder_lr)],
    )  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", default="train", help="the split that is trained on")
    parser.add_argument("--val", default="val")
    parser.add_argument("--init", type=Path, default=SHIPPED, help="a Segmenter's folder, or a YOLOS's of this script")
    parser.add_argument("--rows", type=int, default=240, help="of the images as the detector sees them")
    parser.add_argument("--cells", type=int, nargs=2, default=(6, 8), help="rows and columns of detection tokens")
    parser.add_argument("--flip-vertically", action="store_true", help="for images without an up and a down")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--encoder-lr", type=float, default=0.3, help="share of --lr for what was trained before")
    add_arguments(parser, max_minutes=15, eval_minutes=2, lr=1e-3, drop_path=0.0, ema=0.99)
    return parser.parse_args()


if __name__ == "__main__":
    main()
