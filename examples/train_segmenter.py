"""Train a small Segmenter (plain patch-16 ViT) on CamVid, from masked pretraining or from nothing.

    python examples/pretrain_masked.py --data CAMVID --output pretrained --minutes 15
    python examples/train_segmenter.py --data CAMVID --init pretrained --output run
    python examples/train_segmenter.py --data CAMVID --output run --max-minutes 120 --resume   # go on, or on for longer

On a CPU, one single-threaded process a core waits less than one process with many threads:

    torchrun --nproc-per-node 2 examples/train_segmenter.py ...

run/best is the averaged model of the best val mIoU so far (load it with AutoModelForSemanticSegmentation), run/state
what --resume reads, run/metrics.json every evaluation. Windows of photographs for most of the time, whole photographs
for the rest; the learning rate is held and falls to nothing at the end of the budget, in minutes or epochs.
finetune_segmentation.py trains the result to its end, export_segmenter.py writes it in half precision.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from camvid_data import (
    CLASSES,
    HEIGHT,
    PATCH,
    UNLABELED,
    CamVid,
    confusion_on_images,
    scores,
    training_batch,
    window_positions,
)  # fmt: skip
from pretrain_masked import small_segmenter, start_well
from torch import Tensor, nn
from torch.nn import functional as F
from training import add_arguments, add_stochastic_depth, data_folder, make_accelerator, running_mean, train
from transformers import AutoImageProcessor

from ailurus_hf.segmenter import SegmenterForSemanticSegmentation, SegmenterImageProcessor
from ailurus_hf.segmenter.modeling_segmenter import resize_position_embeddings

log = logging.getLogger("train")
CELLS = 4  # the auxiliary head tells 4 x 4 cells of every patch apart


class TrainedModel(nn.Module):
    """The Segmenter and what only training needs: window positions, stochastic depth and an auxiliary head."""

    def __init__(
        self,
        segmenter: SegmenterForSemanticSegmentation,
        whole: tuple[int, int],
        class_weights: Tensor,
        drop_path: float,
    ):
        super().__init__()
        self.segmenter, self.whole = segmenter, whole
        self.cells = nn.Linear(segmenter.config.hidden_size, len(CLASSES) * CELLS**2)
        self.register_buffer("class_weights", class_weights, persistent=False)
        layers = [*segmenter.encoder.layers, *segmenter.decoder.layers]
        add_stochastic_depth(self, [(layer.attention, layer.mlp) for layer in layers], drop_path)

    def forward(self, images: Tensor, labels: Tensor, corners: Tensor, grid: tuple[int, int]) -> Tensor:
        """Loss of windows Tensor[B, 3, h, w] that begin at patch `corners` of their canvas."""
        embeddings, seen = self.segmenter.encoder.embeddings, []
        embeddings.interpolate_pos_encoding = lambda *_: window_positions(
            embeddings.position_embeddings, corners, grid, self.whole
        )
        keep_tokens = self.segmenter.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        # Every other pixel: the logits are smooth, and the loss at full resolution would cost a quarter of a step.
        logits = self.segmenter(images).logits[..., 1::2, 1::2].float()
        keep_tokens.remove()
        loss = segmentation_loss(logits, labels[..., 1::2, 1::2], self.class_weights)
        return loss + 0.4 * self._cell_loss(seen[0], labels, grid)

    def _cell_loss(self, tokens: Tensor, labels: Tensor, grid: tuple[int, int]) -> Tensor:
        side = labels.shape[1] // (grid[0] * CELLS)
        middle = labels[:, side // 2 :: side, side // 2 :: side]
        logits = self.cells(tokens).float().transpose(1, 2).unflatten(2, grid)
        return F.cross_entropy(
            F.pixel_shuffle(logits, CELLS), middle, weight=self.class_weights, ignore_index=UNLABELED
        )


def segmentation_loss(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted cross entropy plus soft Dice over the classes in the batch; logits Tensor[B, 11, h, w]."""
    entropy = F.cross_entropy(logits, labels, weight=class_weights, ignore_index=UNLABELED)
    labeled = (labels != UNLABELED)[:, None]
    truth = F.one_hot(labels, len(CLASSES) + 1)[..., :-1].permute(0, 3, 1, 2)
    probability = logits.softmax(1) * labeled
    overlap = (probability * truth).sum((0, 2, 3))
    size = (probability + truth).sum((0, 2, 3))
    present = truth.sum((0, 2, 3)) > 0
    dice = 1 - (2 * overlap + 1) / (size + 1)
    return entropy + dice[present].mean()


def class_weights(data: CamVid) -> Tensor:
    """One over the root of each class's share of the pixels; a labeled pixel weighs 1 on average."""
    counts = sum(torch.bincount(data.label(i).flatten(), minlength=UNLABELED + 1)[:-1] for i in range(len(data)))
    share = counts / counts.sum()
    weights = share.rsqrt()
    return (weights / (weights * share).sum()).float()


def evaluate(model: SegmenterForSemanticSegmentation, data: CamVid, accelerator: Accelerator) -> dict:
    """mIoU of whole images at native resolution, shared among the processes; bf16, as in training."""
    model.eval()
    mine = range(accelerator.process_index, len(data), accelerator.num_processes)
    with torch.autocast("cpu", torch.bfloat16):
        confusion = confusion_on_images(model, data, mine)
    return scores(accelerator.reduce(confusion, "sum"))


@torch.no_grad()
def set_position_grid(model: SegmenterForSemanticSegmentation, grid: tuple[int, int]) -> None:
    """Gives the model position embeddings for a grid of this size, resized from those it has."""
    embeddings, config = model.encoder.embeddings, model.config.encoder_config
    old = (config.image_size[0] // PATCH, config.image_size[1] // PATCH)
    embeddings.position_embeddings = nn.Parameter(resize_position_embeddings(embeddings.position_embeddings, old, grid))
    config.image_size = embeddings.image_size = [grid[0] * PATCH, grid[1] * PATCH]


def image_processor(enlarge: int) -> SegmenterImageProcessor:
    """Whole photographs, enlarged as in training."""
    size = {"shortest_edge": enlarge * HEIGHT}
    return SegmenterImageProcessor(label_pad_value=UNLABELED, do_resize=enlarge > 1, size=size)


def enlargement(folder: str | Path) -> int:
    """How many times larger the folder's image processor makes photographs."""
    size = AutoImageProcessor.from_pretrained(folder).size
    return max(round(size.get("shortest_edge", 0) / HEIGHT), 1)


def write(model: SegmenterForSemanticSegmentation, enlarge: int, folder: Path) -> None:
    """The folder that from_pretrained and the `ailurus-hf` commands read."""
    model.save_pretrained(folder)
    image_processor(enlarge).save_pretrained(folder)


def main() -> None:
    args = parse_arguments()
    accelerator = make_accelerator()
    folder = data_folder(args.data, "camvid")
    val = CamVid(folder, "val", args.enlarge)

    set_seed(args.seed)
    data = CamVid(folder, "train", args.enlarge)
    if args.init:
        segmenter = SegmenterForSemanticSegmentation.from_pretrained(args.init, dtype=torch.float32)
        set_position_grid(segmenter, data.grid)
    else:
        segmenter = small_segmenter(data.grid, args.width, args.layers, args.decoder_layers)
        start_well(segmenter, data)
    average = running_mean(segmenter, args.ema)
    model = TrainedModel(segmenter, data.grid, class_weights(data), args.drop_path)

    def loss_of(model: nn.Module, done: float, rng: np.random.Generator) -> tuple[Tensor, int]:
        whole = done >= 1 - args.whole_share
        grid = data.grid if whole else tuple(args.grid)
        # On a CPU, in training, SDPA is the slower of the two at few tokens.
        segmenter.set_attn_implementation("sdpa" if grid[0] * grid[1] > 1000 else "eager")
        as_many_tokens = args.batch_size * args.grid[0] * args.grid[1] / (grid[0] * grid[1])
        batch_size = max(args.min_batch_size, round(as_many_tokens))
        indices = rng.integers(len(data), size=batch_size).tolist()
        scales = (0.9, 1.5) if whole else (0.7, 1.8)
        images, labels, corners = training_batch(data, indices, grid, scales, args.paste, rng)
        return model(images, labels, corners, grid), batch_size

    train(
        accelerator, model, average, segmenter, len(data), loss_of, lambda: evaluate(average.module, val, accelerator),
        "miou", lambda folder: write(average.module, args.enlarge, folder), args,
    )  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="CamVid folder (default: $AILURUS_DATA/camvid)")
    parser.add_argument("--init", help="Segmenter folder to start from (default: from nothing)")
    parser.add_argument(
        "--enlarge", type=int, default=1, help="how many times larger than the photographs it sees them"
    )
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--decoder-layers", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=(12, 16), help="patches of a window")
    parser.add_argument("--whole-share", type=float, default=0.46, help="share of the budget spent on whole images")
    parser.add_argument("--batch-size", type=int, default=14, help="windows a process; as many tokens of whole images")
    parser.add_argument("--min-batch-size", type=int, default=2, help="whole images a process, at least")
    parser.add_argument("--paste", type=float, default=0.5, help="probability of pasting rare objects into a window")
    add_arguments(parser, max_minutes=72, eval_minutes=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
