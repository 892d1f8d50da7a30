"""Train a small DeiT-like classifier (plain ViT, 14 x 14 patches of 16 pixels) on CIFAR-10, from nothing.

    python examples/train_classifier.py --data CIFAR10 --output run
    python examples/train_classifier.py --data CIFAR10 --output run --max-minutes 120 --resume   # go on, or for longer
    python examples/train_classifier.py --data CIFAR10 --output run --score                      # run/best, all images

On a CPU, one single-threaded process a core waits less than one process with many threads:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/train_classifier.py ...

(or set OMP_WAIT_POLICY=PASSIVE, so that threads beside other work do not spin).

run/best is the averaged model of the best accuracy on the validation split so far (load it with
AutoModelForImageClassification), run/state what --resume reads, run/metrics.json every evaluation. A 32 x 32 picture
enlarged to 224 x 224 says the same many times over, so the layers see a random third of the patches for most of the
time, then more and more of them, at last all; the learning rate is held and falls to nothing at the end of the budget.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from accelerate.utils import set_seed
from cifar_data import CLASSES, SIZE, Cifar10, correct_images, training_batch
from pretrain_masked import start_attention, start_embeddings
from torch import Tensor, nn
from torch.nn import functional as F
from training import add_arguments, add_stochastic_depth, data_folder, make_accelerator, running_mean, train
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

log = logging.getLogger("train")


class TrainedModel(nn.Module):
    """The classifier and what only training needs: layers that see a part of the patches, and stochastic depth."""

    def __init__(self, classifier: ViTForImageClassification, drop_path: float):
        super().__init__()
        self.classifier, self.visible = classifier, 1.0
        classifier.vit.embeddings.register_forward_hook(lambda _, args, tokens: self._visible_tokens(tokens))
        add_stochastic_depth(self, [(layer.attention, layer.mlp) for layer in classifier.vit.layers], drop_path)

    def _visible_tokens(self, tokens: Tensor) -> Tensor:
        """The class token and a random share of the others, each image its own."""
        batch, count = tokens.shape[0], tokens.shape[1] - 1
        chosen = torch.rand(batch, count).argsort(1)[:, : round(self.visible * count)] + 1
        chosen = torch.cat((chosen.new_zeros(batch, 1), chosen), dim=1)
        return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))

    def forward(self, images: Tensor, shares: Tensor, visible: float) -> Tensor:
        """Cross entropy with each image's share of the classes, Tensor[B, 10]."""
        self.visible = visible
        # On a CPU, in training, SDPA is the slower of the two at few tokens.
        self.classifier.set_attn_implementation("eager")
        return F.cross_entropy(self.classifier(images).logits.float(), shares, label_smoothing=0.05)


def small_classifier(width: int, layers: int) -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        image_size=SIZE,
        patch_size=16,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    return ViTForImageClassification(config)


def write(model: ViTForImageClassification, folder: Path) -> None:
    """The folder that from_pretrained and the `ailurus-hf` commands read."""
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    mean = [0.5, 0.5, 0.5]
    # Bilinear, as in training.
    ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, resample=2, image_mean=mean, image_std=mean
    ).save_pretrained(folder)


def score(folder: Path, data: Cifar10) -> None:
    """Accuracy of a finished model in float32, into its metrics.json."""
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    right = correct_images(model, data, range(len(data))).item()
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics |= {"float32_accuracy": 100 * right / len(data), "images_scored": len(data)}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    log.info("%d of %d right: %.2f %%, float32", right, len(data), metrics["float32_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="CIFAR-10 folder (default: $AILURUS_DATA/cifar10)")
    parser.add_argument("--split", default="validation", help="what to score on")
    parser.add_argument("--score", action="store_true", help="score run/best in float32 and stop")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--visible", type=float, default=0.3, help="share of the patches that layers see at first")
    parser.add_argument("--mix", type=float, default=0.3, help="probability of CutMix or Mixup, until the last fifth")
    parser.add_argument("--limit", type=int, help="only so many images of each split")
    add_arguments(parser, max_minutes=90, eval_minutes=5, drop_path=0.05)
    args = parser.parse_args()
    accelerator = make_accelerator()
    folder, output = data_folder(args.data, "cifar10"), Path(args.output)
    scored = Cifar10(folder, args.split, args.limit)
    if args.score:
        return score(output / "best", scored)

    set_seed(args.seed)
    data = Cifar10(folder, "train", args.limit)
    classifier = small_classifier(args.width, args.layers)
    start_embeddings(classifier.vit.embeddings, data.batch(range(0, min(len(data), 500))), (14, 14))
    start_attention(classifier.vit.layers)
    average = running_mean(classifier, args.ema)

    def loss_of(model, done, rng):
        indices = rng.integers(len(data), size=args.batch_size)
        images, shares = training_batch(data, indices, args.mix if done < 0.8 else 0.0, rng)
        visible = min(max(args.visible, args.visible + (1 - args.visible) * (done - 0.6) / 0.3), 1.0)
        return model(images, shares, visible), args.batch_size

    def evaluate():
        average.module.eval().set_attn_implementation("sdpa")
        mine = range(accelerator.process_index, len(scored), accelerator.num_processes)
        with torch.autocast("cpu", torch.bfloat16):
            right = accelerator.reduce(correct_images(average.module, scored, mine), "sum").item()
        return {"accuracy": round(100 * right / len(scored), 2)}

    model = TrainedModel(classifier, args.drop_path)
    train(
        accelerator, model, average, classifier, len(data), loss_of, evaluate, "accuracy",
        lambda folder: write(average.module, folder), args,
    )  # fmt: skip


if __name__ == "__main__":
    main()
