"""Fine-tune a Segmenter with AiluRus on: the later layers train on a quarter of the tokens (section 4.3 of the paper).

    python examples/finetune_segmentation.py --data CAMVID --model examples/assets/segmenter-camvid --output run
    python examples/finetune_segmentation.py --data CAMVID --model FOLDER --output run --keep 1     # plain, to compare
    python examples/finetune_segmentation.py --data CAMVID --model FOLDER --output run --clustering ward
    python examples/finetune_segmentation.py --data CAMVID --model FOLDER --output run --loop accelerate --resume
    python examples/finetune_segmentation.py --data CAMVID --model FOLDER --output run --keep 1 --epochs 12 --patience 3
    python examples/finetune_segmentation.py --data CAMVID --model FOLDER --output run --keep 1 --average 0.99
    torchrun --nproc-per-node 2 examples/finetune_segmentation.py …     # or accelerate launch

Any of transformers' segmentation models would do instead of the Segmenter: AiluRus is one call before training starts.
--loop trainer is transformers' Trainer, --loop accelerate a training loop of one's own; mixed precision, gradient
accumulation, gradient checkpointing and --resume are the same in both. Whole photographs, mirrored and scaled at
random. run/model is the result with its AiluRus settings in config.json (AiluRusModelForSemanticSegmentation switches
them on again; plain AutoModelForSemanticSegmentation does not); run/metrics.json holds seconds an epoch and the mIoU on
val with the reduction on and off. With --patience every epoch is scored on val and the best one is kept. With --average
a running mean of the weights is what is scored and written: small batches make the weights themselves jump.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from camvid_data import CamVid, confusion_on_images, normalize, random_window, scores
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from train_segmenter import enlargement, set_position_grid, write
from training import data_folder, process_rank, running_mean
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_utils import get_last_checkpoint

from ailurus_hf import AiluRusConfig, apply_ailurus, remove_ailurus
from ailurus_hf.config import RESTORES, clustering_names
from ailurus_hf.segmenter import SegmenterForSemanticSegmentation

log = logging.getLogger("finetune")


class Photographs(Dataset):
    """Whole photographs, mirrored and scaled: {"pixel_values": Tensor[3, H, W], "labels": LongTensor[H, W]}."""

    def __init__(self, data: CamVid, scales: tuple[float, float] = (0.9, 1.5)):
        self.data, self.scales = data, scales

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # Drawn from torch's generator, whose state both loops save and restore.
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        pixels, classes = random_window(self.data, index, 0, 0, self.data.grid, self.scales, rng)
        return {"pixel_values": normalize(pixels), "labels": classes}


class Keeper:
    """What of a training is kept: its last weights, their running mean (--average) or the best epoch (--patience).

    Both loops call `step` after each change of the weights and `epoch` after each epoch.
    """

    def __init__(self, model: nn.Module, val: CamVid, args: argparse.Namespace):
        self.model, self.val, self.args, self.path = model, val, args, Path(args.output) / "kept.pt"
        self.mean = running_mean(model, args.average) if args.average else None
        self.state = {"miou": []}
        if args.resume and self.path.exists():
            self.state = torch.load(self.path)
            if self.mean is not None and "mean" in self.state:
                self.mean.load_state_dict(self.state["mean"])

    def step(self) -> None:
        """After an optimizer's step."""
        if self.mean is not None:
            self.mean.update_parameters(self.model)

    def epoch(self) -> bool:
        """After an epoch. Returns whether training has stopped gaining."""
        if self.mean is not None:
            self.state["mean"] = self.mean.state_dict()
        stop = bool(self.args.patience) and self._scored()
        if not process_rank() and (self.args.patience or self.mean is not None):
            torch.save(self.state, self.path)
        return stop

    def _scored(self) -> bool:
        """Scores what is kept so far. Returns whether the best epoch was `patience` epochs ago."""
        kept, earlier = self.kept(), self.state["miou"]
        score = evaluated(kept, self.val, self.args)["miou"]
        if score > max(earlier, default=0.0):
            self.state["weights"] = {name: w.detach().cpu().clone() for name, w in kept.state_dict().items()}
        miou = self.state["miou"] = [*earlier, score]
        log.info("mIoU %.2f, the best %.2f", score, max(miou))
        return len(earlier) - miou.index(max(miou)) >= self.args.patience

    def kept(self) -> nn.Module:
        """The model as it would be written now."""
        return self.model if self.mean is None else self.mean.module

    def restore(self) -> None:
        """Puts what is kept into the model: the best epoch's weights, where any was scored, or the mean."""
        if self.args.patience and "weights" in self.state:
            self.model.load_state_dict(self.state["weights"])
        elif self.mean is not None:
            self.model.load_state_dict(self.mean.module.state_dict())


class EpochClock(TrainerCallback):
    """Seconds of every epoch; tells `keeper` of steps and epochs."""

    def __init__(self, keeper: Keeper | None):
        self.seconds: list[float] = []
        self.keeper = keeper

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.keeper:
            self.keeper.step()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)
        control.should_training_stop |= bool(self.keeper and self.keeper.epoch())


def with_trainer(
    model: nn.Module, data: Dataset, args: argparse.Namespace, keeper: Keeper | None = None
) -> list[float]:
    """Trains with transformers' Trainer, until `keeper` says so; returns the seconds of each epoch."""
    clock = EpochClock(keeper)
    settings = TrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        warmup_steps=args.warmup_steps,
        max_grad_norm=args.max_grad_norm,
        lr_scheduler_type="cosine",
        bf16=args.precision == "bf16",
        fp16=args.precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        seed=args.seed,
    )
    if args.resume:
        # Trainer itself does not know that save_pretrained gives a ViT's weights other names (transformers 5.23): it
        # would warn of missing keys and go on with the weights of the start.
        saved = type(model).from_pretrained(get_last_checkpoint(args.output), dtype=torch.float32)
        model.load_state_dict(saved.state_dict())
    trainer = Trainer(model=model, args=settings, train_dataset=data, callbacks=[clock])
    trainer.train(resume_from_checkpoint=args.resume)
    return clock.seconds


def with_accelerate(
    model: nn.Module, data: Dataset, args: argparse.Namespace, keeper: Keeper | None = None
) -> list[float]:
    """Trains in a loop of one's own, until `keeper` says so; returns the seconds of each epoch."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision={"fp32": "no"}.get(args.precision, args.precision),
        gradient_accumulation_steps=args.accumulate,
    )
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = math.ceil(args.epochs * len(loader))
    steps = math.ceil(args.epochs * -(-len(loader) // args.accumulate))
    scheduler = get_scheduler("cosine", optimizer, args.warmup_steps, steps)
    accelerator.register_for_checkpointing(scheduler)
    state, first, seconds = Path(args.output) / "state", 0, []
    if args.resume:
        accelerator.load_state(state)
        first = json.loads((state / "epoch.json").read_text())
    for epoch in range(first, math.ceil(args.epochs)):
        started = time.perf_counter()
        model.train()
        for number, batch in enumerate(loader):
            if epoch * len(loader) + number >= batches:
                break
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    scheduler.step()
                    if keeper:
                        keeper.step()
        seconds.append(time.perf_counter() - started)
        accelerator.save_state(state)
        if accelerator.is_main_process:
            (state / "epoch.json").write_text(json.dumps(epoch + 1))
            log.info("epoch %d: %.1f s, loss %.4f", epoch + 1, seconds[-1], loss.item())
        if keeper and keeper.epoch():
            break
    return seconds


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    set_seed(args.seed)
    folder, output = data_folder(args.data, "camvid"), Path(args.output)
    model = SegmenterForSemanticSegmentation.from_pretrained(args.model, dtype=torch.float32)
    enlarge = args.enlarge or enlargement(args.model)
    data, val = CamVid(folder, "train", enlarge), CamVid(folder, "val", enlarge)
    set_position_grid(model, data.grid)
    reduction = AiluRusConfig(
        cluster_location=args.location, keep_ratio=args.keep, clustering=args.clustering, restore=args.restore
    )
    if args.keep < 1:
        apply_ailurus(model, reduction)
    if args.checkpointing:
        # transformers 5.17 has only the older name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    run = {"trainer": with_trainer, "accelerate": with_accelerate}[args.loop]
    keeper = Keeper(model, val, args)
    seconds = run(model, Photographs(data), args, keeper)
    keeper.restore()

    if process_rank():
        return
    result = {"seconds_per_epoch": seconds, "miou_per_epoch": keeper.state["miou"], "reduced": None}
    write(model, enlarge, output / "model")
    if args.keep < 1:
        result["reduced"] = evaluated(model, val, args)
        remove_ailurus(model)
    result |= {"plain": evaluated(model, val, args), "args": vars(args)}
    (output / "metrics.json").write_text(json.dumps(result, indent=2))
    for name in ("reduced", "plain"):
        if result[name]:
            log.info("mIoU %.2f, %s", result[name]["miou"], name)
    if seconds:
        log.info("%.1f s an epoch", np.median(seconds))


def evaluated(model: nn.Module, val: CamVid, args: argparse.Namespace) -> dict:
    """mIoU over whole val photographs at native resolution, as the model is now."""
    model.eval()
    device = model.device
    model.to("cpu")
    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
        found = scores(confusion_on_images(model, val, range(len(val))))
    model.to(device)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="CamVid folder (default: $AILURUS_DATA/camvid)")
    parser.add_argument("--model", required=True, help="Segmenter folder to start from")
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--loop", choices=("trainer", "accelerate"), default="trainer")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last whole epoch")
    parser.add_argument("--location", type=int, default=2, help="L")
    parser.add_argument("--keep", type=float, default=0.25, help="M / N; 1 trains without AiluRus")
    parser.add_argument("--clustering", default="density_peaks", choices=clustering_names())
    parser.add_argument("--restore", default="copy", choices=RESTORES, help="copy is the paper's")
    parser.add_argument("--enlarge", type=int, help="of the photographs (default: as the model's processor does)")
    parser.add_argument("--epochs", type=float, default=3, help="1.5 stops half way through the second")
    parser.add_argument("--patience", type=int, help="stop after so many epochs without gain on val, and keep the best")
    parser.add_argument("--average", type=float, help="decay a step of the weights' running mean, which is kept then")
    parser.add_argument("--batch-size", type=int, default=4, help="photographs a process and step")
    parser.add_argument("--accumulate", type=int, default=1, help="steps whose gradients are added up")
    parser.add_argument(
        "--checkpointing", action="store_true", help="compute activations again instead of keeping them"
    )
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
