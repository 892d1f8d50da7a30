"""What the training scripts share: optimizers, stochastic depth, averaged weights, and a loop that can be interrupted.

The loop counts minutes of training, not of the clock: a process that was paused, or had to wait for the machine, loses
nothing of its learning-rate schedule. Used by train_segmenter.py and train_classifier.py; train_text_to_image.py takes
the clock.
"""

import argparse
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

log = logging.getLogger("train")
# What a data set's folder holds.
CONTENTS = {"camvid": ("train/images", "train/labels"), "cifar10": ("train.parquet",)}


def data_folder(argument: str | None, name: str) -> Path:
    """The folder given on the command line, or the data set's in the folder named by AILURUS_DATA."""
    if argument is None and "AILURUS_DATA" not in os.environ:
        raise SystemExit(f"say where {name} is: --data FOLDER, or AILURUS_DATA=FOLDER holding {name}/")
    folder = Path(argument) if argument else Path(os.environ["AILURUS_DATA"]) / name
    if missing := [part for part in CONTENTS[name] if not (folder / part).exists()]:
        raise SystemExit(f"{folder} does not hold {' and '.join(missing)}")
    return folder


def make_accelerator() -> Accelerator:
    """bf16 on the CPU; where several processes share the work, all may be paused for a day."""
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", kwargs_handlers=[patience])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    log.disabled = not accelerator.is_main_process
    return accelerator


def add_stochastic_depth(model: nn.Module, layers: Iterable[Sequence[nn.Module]], drop_path: float) -> None:
    """Leaves residual branches of transformer layers out at random in training, the last layer's most often.

    layers: of each the modules that give its branches.
    """
    layers = list(layers)
    for depth, branches in enumerate(layers):
        rate = drop_path * depth / max(len(layers) - 1, 1)
        for branch in branches:
            branch.register_forward_hook(lambda _, args, out, rate=rate: drop_branch(out, rate, model))


def drop_branch(branch: Tensor | tuple, rate: float, model: nn.Module) -> Tensor | tuple:
    """Stochastic depth: leave a residual branch (or the first of a tuple) out for a random part of the batch."""
    if rate == 0 or not model.training:
        return branch
    if isinstance(branch, tuple):
        return (drop_branch(branch[0], rate, model), *branch[1:])
    kept = torch.rand(len(branch), 1, 1) >= rate
    return branch * (kept / (1 - rate)).to(branch.dtype)


def make_optimizers(model: nn.Module, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer layers, AdamW for the rest; both at AdamW's learning rates."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    known = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in known]
    decayed = [p for p in others if p.ndim in (2, 4)]
    plain = [p for p in others if p.ndim not in (2, 4)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)]


def process_rank() -> int:
    """Of this process among those that train together; 0 where it is alone."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def mean_decay(most: float, step: int) -> float:
    """How much a running mean of weights keeps at a step; little at first, so that the start is soon forgotten."""
    return min(most, (1 + step) / (10 + step))


def running_mean(model: nn.Module, decay: float) -> AveragedModel:
    """Of the model's weights, updated step by step; over few steps at first."""

    def mean(kept: Tensor, new: Tensor, steps_before: Tensor) -> Tensor:
        return torch.lerp(new, kept, mean_decay(decay, 1 + int(steps_before)))

    return AveragedModel(model, avg_fn=mean).requires_grad_(False)


class Stopwatch:
    """Time of training steps. A step counts for no more than a few typical ones, as it may have been paused."""

    def __init__(self):
        self.typical: float | None = None

    def counted(self, seconds: float) -> float:
        """How much of a step's seconds counts."""
        self.typical = seconds if self.typical is None else 0.9 * self.typical + 0.1 * min(seconds, 4 * self.typical)
        return min(seconds, 4 * self.typical)


class Progress:
    """Where training is; saved with the state."""

    def __init__(self):
        self.step, self.minutes, self.images, self.best, self.history = 0, 0.0, 0, -np.inf, []

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    average: AveragedModel,
    learner: nn.Module,
    epoch: int,
    loss_of: Callable[[nn.Module, float, np.random.Generator], tuple[Tensor, int]],
    evaluate: Callable[[], dict[str, Any]],
    score: str,
    save: Callable[[Path], None],
    args: argparse.Namespace,
    optimizers: list[torch.optim.Optimizer] | None = None,
) -> None:
    """Trains `model`, which is prepared here, and `average`, the running mean of its part `learner`'s weights.

    loss_of(model, share of the budget that is spent, generator): a batch's loss and its number of images.
    evaluate() of `average`, and save(folder) for the best by result[score]. epoch: images in one.
    optimizers: others than make_optimizers'; a group of theirs learns at its own "lr_scale" times the learning rate.
    """
    output = Path(args.output)
    model, *optimizers = accelerator.prepare(model, *(optimizers or make_optimizers(model, args.weight_decay)))
    progress = Progress()
    accelerator.register_for_checkpointing(progress, average)
    if args.resume:
        accelerator.load_state(output / "state")
        log.info("resumed at step %d, %.1f minutes, best %.2f", progress.step, progress.minutes, progress.best)

    clock, next_evaluation, recent = Stopwatch(), progress.minutes + args.eval_minutes, []
    while (done := max(progress.minutes / args.max_minutes, progress.images / (args.epochs * epoch))) < 1:
        started = time.time()
        draw = (args.seed, progress.step, accelerator.process_index)
        torch.manual_seed(hash(draw))
        lr = args.lr * min(1.0, (progress.step + 1) / args.warmup_steps, (1 - done) / args.decay_share)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
        model.train()
        loss, batch_size = loss_of(model, done, np.random.default_rng(draw))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 2.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress.step += 1
        progress.images += batch_size * accelerator.num_processes
        average.update_parameters(learner)

        taken = accelerator.reduce(torch.tensor(time.time() - started), "mean").item()
        progress.minutes += clock.counted(taken) / 60
        recent = [*recent[-99:], loss.item()]
        if progress.step % 50 == 0:
            rate = batch_size * accelerator.num_processes / clock.typical
            log.info(
                "step %d  %.1f min  epoch %.1f  loss %.4f  lr %.2e  %.1f images/s",
                progress.step, progress.minutes, progress.images / epoch, np.mean(recent), lr, rate,
            )  # fmt: skip
        last = max(progress.minutes / args.max_minutes, progress.images / (args.epochs * epoch)) >= 1
        if progress.minutes >= next_evaluation or last:
            next_evaluation = progress.minutes + args.eval_minutes
            result = evaluate() | {k: round(getattr(progress, k), 2) for k in ("step", "minutes", "images")}
            progress.history.append(result | {"loss": round(float(np.mean(recent)), 4)})
            log.info("%s (best %.2f)", result, progress.best)
            if result[score] > progress.best:
                progress.best = result[score]
                if accelerator.is_main_process:
                    write_folder(output / "best", result, save)
            accelerator.save_state(output / "state")
            report = {"args": vars(args), "best": progress.best, "history": progress.history}
            (output / "metrics.json").write_text(json.dumps(report, indent=2, default=str))


def write_folder(folder: Path, result: dict, save: Callable[[Path], None]) -> None:
    """A folder for from_pretrained, replaced in one move: whoever reads it sees the old or the new one, whole."""
    fresh = folder.with_name(f"{folder.name}.new-{os.getpid()}")
    save(fresh)
    (fresh / "metrics.json").write_text(json.dumps(result, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The options that `train` reads; defaults: of those that differ between scripts."""
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last saved state")
    parser.add_argument("--max-minutes", type=float, help="of training, evaluations not counted")
    parser.add_argument("--epochs", type=float, default=1e9, help="stop after so many, if that comes first")
    parser.add_argument("--eval-minutes", type=float, help="of training between evaluations")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup-steps", type=int, default=150)
    parser.add_argument("--decay-share", type=float, default=0.4, help="share of the budget in which lr falls to 0")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(**defaults)
