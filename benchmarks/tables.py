"""Every table and figure of the paper, and what is beside them: what makes it, what that needs, and about how long it takes.

    python -m benchmarks.tables --list                       # everything, and what is missing here for the rest
    python -m benchmarks.tables                              # makes what the data and weights here allow
    python -m benchmarks.tables --only "Tab. 7" "Fig. 7"     # by name
    python -m benchmarks.tables --minutes 60                 # leaves out what takes longer

Data: the folder AILURUS_DATA, with camvid/, ade20k/, cityscapes/, pascal_context/, cifar10/ and imagenet/ in it as far as
they are there. Weights beside the shipped Segmenter: the folder AILURUS_WEIGHTS, with the names below; `ailurus-hf
convert-segmenter` makes them from the official checkpoints, examples/train_classifier.py makes classifier-cifar10. Results
go to benchmarks/results as JSON, and plots to benchmarks/results/figures. Minutes are estimates for two CPU cores (for
what needs a GPU, none is given).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .harness import ROOT, device_folder
from .methods import METHODS, PAPER

SHIPPED = "examples/assets/segmenter-camvid"
BOTH = f"--methods '{PAPER}' Expedite"
ALL = "--methods " + " ".join(f"'{name}'" for name in METHODS)
# Tab. 1 on CamVid in two parts: ours and the peers that reach the same speeds, and the rest.
PEERS = f"--methods '{PAPER}' 'local k-means, smooth' 'Ward, smooth' Expedite ToMe ALGM CTM"
CLOSE = f"--methods '{PAPER}' 'local k-means, smooth' 'Ward, smooth' Expedite"
OTHERS = "--methods ACT EViT 'random centers, copy'"
QUALITY = "-m benchmarks.vision.segmenter_quality"
# Tab. 7: one setting at a time, around 0.9, 50 and 1.
ABLATION = [f"'{PAPER}:alpha={a}'" for a in (0.6, 0.7, 0.8, 0.9, 1.0)]
ABLATION += [f"'{PAPER}:num_spatial_neighbors={n}'" for n in (0, 20, 30, 70)]
ABLATION += [f"'{PAPER}:num_density_neighbors={k}'" for k in (2, 3, 4)]
# Tab. 8's nearest: several small steps of ours beside ToMe, at their FLOPs and at their speed.
STEPS = "'local k-means, copy' 'pairs, copy'"
STEPS += " 'pairs, copy:cluster_location=(1,3),keep_ratio=(0.65,0.37)'"
STEPS += " 'pairs, copy:cluster_location=(1,2,3,4),keep_ratio=(0.8,0.61,0.43,0.33)' ToMe ToMe:r=30 EViT"
# Spatial forms: by rank (the paper), by distance, a window alone, none, places as features.
FORMS = [f"'{name}'" for name in (PAPER, "by distance, copy", f"{PAPER}:alpha=1.0", f"{PAPER}:num_spatial_neighbors=0")]
FORMS += ["'places as features, copy'"]
CHOSEN = " ".join(f"'{name}'" for name in (PAPER, "local k-means, copy", "local k-means, smooth", "Ward, smooth"))


@dataclass(frozen=True)
class Entry:
    """names: tables and figures it makes. command: after `python`; {data} and {weights} are the folders.

    needs: files and folders ({data}/…, {weights}/…), or "gpu". minutes: about, on two cores; None: not said.
    """

    names: str
    what: str
    command: str
    needs: tuple[str, ...] = ()
    minutes: float | None = None

    def missing(self, folders: dict[str, str]) -> list[str]:
        """What is not here."""
        absent = [need for need in self.needs if need != "gpu" and not (ROOT / need.format(**folders)).exists()]
        if "gpu" in self.needs and not torch.cuda.is_available():
            absent.append("gpu")
        if (module := self.module) is not None and importlib.util.find_spec(module) is None:
            absent.append(module)
        return absent

    @property
    def module(self) -> str | None:
        words = self.command.split()
        return words[1] if words[0] == "-m" else None


CAMVID, CIFAR, IMAGENET = "{data}/camvid", "{data}/cifar10", "{data}/imagenet"
WARD = "--keep 0.25 --clustering ward --restore smooth"
# Ways of fine-tuning: what each is, the options of examples/finetune_segmentation.py, and how many seeds.
FINETUNED = {
    "plain": ("plain", "--keep 1", 3),
    **{f"{keep:g}": (f"{keep:g} of the tokens", f"--keep {keep}", 1) for keep in (0.25, 0.36, 0.5625)},
    "ward": ("0.25 of the tokens, Ward's clusters", WARD, 3),
    "local": ("0.25 of the tokens, local k-means", "--keep 0.25 --clustering local_kmeans --restore smooth", 1),
}
TINY = "{weights}/classifier-cifar10"
VIT_L, VIT_B = "segmenter-vit-l-ade20k", "segmenter-vit-b-ade20k"
# The paper's tables 1 and 2.
OFFICIAL = [
    ("Tab. 1", "ade20k", VIT_L),
    ("Tab. 1", "cityscapes", "segmenter-vit-l-cityscapes"),
    ("Tab. 1", "pascal_context", "segmenter-vit-l-pascal-context"),
    ("Tab. 2, 15", "ade20k", VIT_B),
]
# The paper's clusters as shares: 20² to 26² of ViT-L's 1600 tokens, 18² to 24² of ViT-B's 1024.
SHARES_L, SHARES_B = "0.25 0.3025 0.36 0.4225", "0.31640625 0.390625 0.47265625 0.5625"


def results(*names: str) -> tuple[str, ...]:
    return tuple(f"benchmarks/results/cpu/{name}-fp32.json" for name in names)


def plot(kind: str, *names: str) -> str:
    return f"-m benchmarks.harness.plots {kind} {' '.join(results(*names))}"


def finetuning_entries() -> list[Entry]:
    """Every way of fine-tuning with every seed, then all of them compared."""
    script = f"examples/finetune_segmentation.py --data {CAMVID} --model {SHIPPED} --batch-size 2 --epochs 1"
    entries, runs = [], []
    for name, (what, options, seeds) in FINETUNED.items():
        for seed in range(seeds):
            run, which = (f"finetune-{name}-{seed}", f", seed {seed}") if seed else (f"finetune-{name}", "")
            command = f"{script} --output runs/{run} {options} --seed {seed}"
            minutes = 11 if name == "plain" else 6
            entries.append(Entry("Tab. 5, 6", f"fine-tuning on CamVid, {what}{which}", command, (CAMVID,), minutes))
            runs.append(f"runs/{run}")
    compare = f"-m benchmarks.training.finetune_quality {' '.join(runs)} --name tab5_finetuning"
    needs = tuple(f"{run}/metrics.json" for run in runs)
    return [*entries, Entry("Tab. 5, 6", "fine-tuning on CamVid, compared", compare, needs, 1)]


def official(names: str, what: str, model: str, options: str, name: str, data: str = "ade20k") -> Entry:
    """mIoU of an official checkpoint on its data set."""
    command = f"{QUALITY} --dataset {data} --data {{data}}/{data} --model {{weights}}/{model} {options} --device cuda --name {name}"
    return Entry(names, f"{what}, {data}", command, (f"{{data}}/{data}", f"{{weights}}/{model}", "gpu"))


def official_similarity(names: str, what: str, model: str, options: str, name: str) -> Entry:
    """Similarity, pairs, latency and assignments of an official checkpoint on ADE20K."""
    folder = "{data}/ade20k/images/validation"
    command = f"-m benchmarks.vision.similarity --images {folder} --model {{weights}}/{model} {options} --device cuda --name {name}"
    return Entry(names, f"{what}, ade20k", command, (folder, f"{{weights}}/{model}", "gpu"))


# The plots follow what they are made of.
ENTRIES = [
    Entry("Tab. 1, 2, 15", "ours and peers at three levels, CamVid", f"{QUALITY} --data {CAMVID} {PEERS} --locations 2 --keep 0.45 0.22 0.12 --repeats 9 --name tab1_camvid", (CAMVID,), 15),
    Entry("Tab. 1, 2", "the other peers and random centers, CamVid", f"{QUALITY} --data {CAMVID} {OTHERS} --locations 2 --keep 0.45 0.22 0.12 --repeats 5 --name tab1_camvid_others", (CAMVID,), 10),
    *(official(names, "all methods at three levels", model, f"{ALL} --locations 2 --keep 0.5 0.36 0.2", f"tab{names[5]}_{data}", data) for names, data, model in OFFICIAL),
    Entry("Tab. 3, 4", "detectors' encoders at the paper's L and M", "-m benchmarks.vision.detection_speed --models ViT-L ViT-B", (), 15),
    Entry("Tab. 3", "an encoder like BEiT's, as CAE's is, ViT-L", "-m benchmarks.vision.detection_speed --models 'ViT-L (CAE)' --name detection_speed_cae", (), 30),
    Entry("Tab. 4", "the same of ViT-B, and YOLOS", "-m benchmarks.vision.detection_speed --models 'ViT-B (CAE)' YOLOS-B --name detection_speed_others", (), 10),
    Entry("Tab. 5", "a training step, Segmenter ViT-L", f"-m benchmarks.training.finetune_speed --models ViT-L {BOTH} --name tab5_training", (), 60),
    Entry("Tab. 6", "a training step, Segmenter ViT-B", f"-m benchmarks.training.finetune_speed --models ViT-B {BOTH} --name tab6_training", (), 20),
    Entry("Tab. 5, 6", "a training step of the shipped Segmenter", f"-m benchmarks.training.finetune_speed --models CamVid {CLOSE} --keep 0.25 --batch-size 2 --precision bf16 --name tab5_training_camvid", (), 3),
    *finetuning_entries(),
    Entry("Tab. 7", "alpha, lambda, k", f"{QUALITY} --data {CAMVID} --locations 2 --keep 0.25 --methods {' '.join(ABLATION)} --name tab7_ablation", (CAMVID,), 20),
    official("Tab. 7", "alpha, lambda, k", VIT_L, f"--locations 2 --keep 0.25 --methods {' '.join(ABLATION)}", "tab7_ade20k"),
    Entry("Tab. 8", "classification, CIFAR-10", f"-m benchmarks.vision.classification_quality --data {CIFAR} --model {TINY} --methods '{PAPER}' 'local k-means, copy' 'Ward, copy' 'random centers, copy' Expedite ToMe EViT --locations 1 2 --keep 0.5 0.35 --name tab8_cifar10", (CIFAR, TINY), 20),
    Entry("Tab. 8", "the nearest of them, all images of CIFAR-10's validation split", f"-m benchmarks.vision.classification_quality --data {CIFAR} --model {TINY} --methods {STEPS} --locations 1 --keep 0.5 --repeats 9 --name tab8_cifar10_all", (CIFAR, TINY), 8),
    Entry("Tab. 8", "classification, ImageNet and DeiT-B", f"-m benchmarks.vision.classification_quality --dataset imagenet --data {IMAGENET} --model {{weights}}/deit-base {BOTH} --locations 0 2 4 6 --keep 0.617 0.735 --device cuda --name tab8_imagenet", (IMAGENET, "{weights}/deit-base", "gpu")),
    Entry("Tab. 9, 10", "similarity by L and M", f"-m benchmarks.vision.similarity --images {CAMVID}/val/images {CLOSE} --locations 1 2 3 4 --keep 0.25 0.3 0.36 0.42 --name tab9_similarity", (CAMVID,), 60),
    Entry("Tab. 9, 10", "mIoU by L and M", f"{QUALITY} --data {CAMVID} {BOTH} --locations 1 2 3 4 --keep 0.25 0.3 0.36 0.42 --name tab9_miou", (CAMVID,), 50),
    official_similarity("Tab. 9", "similarity by L and M", VIT_L, f"{BOTH} --locations 4 6 8 --keep {SHARES_L}", "tab9_ade20k"),
    official_similarity("Tab. 10", "similarity by L and M", VIT_B, f"{BOTH} --locations 2 4 6 --keep {SHARES_B}", "tab10_ade20k"),
    official("Tab. 9", "mIoU by L and M", VIT_L, f"{BOTH} --locations 4 6 8 --keep {SHARES_L}", "tab9_miou_ade20k"),
    official("Tab. 10", "mIoU by L and M", VIT_B, f"{BOTH} --locations 2 4 6 --keep {SHARES_B}", "tab10_miou_ade20k"),
    official_similarity("Tab. 11, 12, 13, 14", "similarity by layer, pairs, latency split", VIT_B, f"--methods '{PAPER}' Expedite CTM --locations 2 --keep 0.390625", "tab11_ade20k"),
    official_similarity("Tab. 13", "latency split", VIT_L, f"{BOTH} --locations 4 --keep 0.36", "tab13_ade20k"),
    official_similarity("Fig. 7", "assignments", VIT_L, f"--methods '{PAPER}' --locations 2 --keep 0.25 0.36 0.5", "fig7_ade20k"),
    Entry("Tab. 11, 12, 13, 14, Fig. 7", "similarity by layer, pairs, latency split, assignments", f"-m benchmarks.vision.similarity --images {CAMVID}/val/images --methods '{PAPER}' Expedite CTM --locations 2 --keep 0.25 0.36 0.5 --name tab11_similarity", (CAMVID,), 30),
    Entry("Fig. 2", "assignments and reconstructed images", f"-m ailurus_hf.cli visualize --model {SHIPPED} --cluster-location 2 --keep-ratio 0.25 --clustering density_peaks --restore copy --fill mean --output runs/figure2 {CAMVID}/val/images", (CAMVID,), 5),
    Entry("Fig. 2", "the same of one picture, by ways of clustering", "-m benchmarks.clustering.cluster_pictures", (), 1),
    Entry("Fig. 3, 4, 5, 6", "mIoU and speed over L and M", f"{QUALITY} --data {CAMVID} {BOTH} --locations 1 2 3 4 5 6 --keep 0.12 0.18 0.25 0.36 0.5 --name curves", (CAMVID,), 70),
    official("Fig. 3, 4, 6", "mIoU and speed over L and M", VIT_L, f"{BOTH} --locations 2 4 6 8 10 --keep {SHARES_L}", "curves_vit_l"),
    official("Fig. 3, 4, 5, 6", "mIoU and speed over L and M", VIT_B, f"{BOTH} --locations 1 2 3 4 5 6 --keep {SHARES_B}", "curves_vit_b"),
    Entry("Fig. 3", "mIoU over M", plot("clusters", "curves"), results("curves"), 1),
    Entry("Fig. 4", "mIoU over L", plot("locations", "curves"), results("curves"), 1),
    Entry("Fig. 5", "images a second over M", plot("speed", "curves"), results("curves"), 1),
    Entry("Fig. 6", "the best mIoU at each speed", plot("tradeoff", "curves"), results("curves"), 1),
    Entry("Fig. 7", "tokens of a cluster", plot("sizes", "tab11_similarity"), results("tab11_similarity"), 1),
    *(Entry(f"Fig. {number}", f"the plot of {name}", f"-m benchmarks.harness.plots {kind} benchmarks/results/{{gpu}}/{name}-fp32.json", (f"benchmarks/results/{{gpu}}/{name}-fp32.json",), 1) for number, kind in ((3, "clusters"), (4, "locations"), (5, "speed"), (6, "tradeoff")) for name in ("curves_vit_l", "curves_vit_b")),
    Entry("Fig. 7", "tokens of a cluster, ViT-L", "-m benchmarks.harness.plots sizes benchmarks/results/{gpu}/fig7_ade20k-fp32.json", ("benchmarks/results/{gpu}/fig7_ade20k-fp32.json",), 1),
    Entry("settings", "spatial forms, CamVid", f"{QUALITY} --data {CAMVID} --locations 2 --keep 0.25 --methods {' '.join(FORMS)} --name forms_camvid", (CAMVID,), 8),
    Entry("settings", "alpha, lambda, k and spatial forms, CIFAR-10", f"-m benchmarks.vision.classification_quality --data {CIFAR} --model {TINY} --locations 1 --keep 0.35 --methods {' '.join([*ABLATION, *FORMS])} --name settings_cifar10", (CIFAR, TINY), 15),
    *(Entry("settings", f"photographs of {size} rows", f"{QUALITY} --data {CAMVID} --size {size} --locations 1 2 4 --keep 0.5 0.25 0.12 --methods {CHOSEN} --name size{size}", (CAMVID,), minutes) for size, minutes in ((480, 8), (720, 20), (960, 40))),
    Entry("settings", "the front over M, L and resolution", plot("pareto", "size480", "size720", "size960"), results("size480", "size720", "size960"), 1),
    Entry("settings", "the front over M and L, CIFAR-10", plot("pareto", "tab8_cifar10", "settings_cifar10"), results("tab8_cifar10", "settings_cifar10"), 1),
    Entry("settings", "cost of clustering, 256² to 2048² pixels", "-m benchmarks.clustering.clustering_overhead", (), 5),
    Entry("beyond", "what each way of choosing clusters keeps, CamVid", f"-m benchmarks.clustering.clusterings --data {CAMVID} --keep 0.25 0.12 --restore smooth --name clusterings_smooth", (CAMVID,), 30),
    Entry("beyond", "the same, as many tokens as a detector has", f"-m benchmarks.clustering.clusterings --data {CAMVID} --size 800 --restore smooth --limit 34 --name clusterings_detection", (CAMVID,), 12),
    Entry("beyond", "the same, classification", f"-m benchmarks.clustering.clusterings --dataset cifar10 --data {CIFAR} --model {TINY} --locations 1 --keep 0.5 0.25 --name clusterings_cifar10", (CIFAR, TINY), 20),
    Entry("Fig. 8", "a video, plain and reduced", "-m benchmarks.video.controlvideo_speed --whole --device cuda --dtype bf16 --frames 15 --size 512", ("gpu",)),
    Entry("Fig. 9", "predictions of ViT-L, ade20k", "-m ailurus_hf.cli segment {data}/ade20k/images/validation --model {weights}/" + VIT_L + " --cluster-location 2 --keep-ratio 0.36 --clustering density_peaks --restore copy --compare --output runs/figure9", ("{data}/ade20k/images/validation", "{weights}/" + VIT_L, "gpu")),
    Entry("Fig. 9", "predictions", "examples/segment_image.py --clustering density_peaks --restore copy --keep-ratio 0.36 --output runs/figure9.png", (), 1),
    Entry("speed", "share of the FLOPs' speed-up on ViT-B and ViT-L", "-m benchmarks.vision.vit_speed", (), 5),
    Entry("speed", "models in stages and with dense heads", "-m benchmarks.vision.families_speed", (), 30),
    Entry("speed", "clustering as the grid grows", "-m benchmarks.clustering.clustering_cost", (), 2),
    Entry("speed", "a step of Stable Diffusion 1.5", "-m benchmarks.diffusion.diffusion_speed", (), 20),
]  # fmt: skip


def chosen(only: list[str], minutes: float | None) -> list[Entry]:
    """The entries of those names that take no longer."""
    return [
        entry
        for entry in ENTRIES
        if (not only or any(name in entry.names for name in only))
        and (minutes is None or (entry.minutes is not None and entry.minutes <= minutes))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="only say what there is and what is missing")
    parser.add_argument("--only", nargs="+", default=[], help='names, such as "Tab. 7"')
    parser.add_argument("--minutes", type=float, help="leave out what takes longer")
    args = parser.parse_args()
    given = {"data": os.environ.get("AILURUS_DATA"), "weights": os.environ.get("AILURUS_WEIGHTS")}
    folders = {name: str(Path(path).absolute()) if path else f"AILURUS_{name.upper()}" for name, path in given.items()}
    folders["gpu"] = device_folder(torch.cuda.get_device_name()) if torch.cuda.is_available() else "GPU"
    failed = []
    for entry in chosen(args.only, args.minutes):
        title = f"{entry.names}: {entry.what}"
        if missing := entry.missing(folders):
            print(f"-- {title}: needs {', '.join(need.format(**folders) for need in missing)}")
            continue
        command = entry.command.format(**{name: shlex.quote(folder) for name, folder in folders.items()})
        print(f"== {title} ({entry.minutes or '?'} min)\n   python {command}", flush=True)
        if args.list:
            continue
        started = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, env=environment)
        print(f"   {(time.monotonic() - started) / 60:.1f} min", flush=True)
        if done.returncode != 0:
            failed.append(title)
    for title in failed:
        print(f"failed: {title}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
