"""The rows of `make tables-gpu`, in the order in which they are made: what measures each, and what it shall reach.

Each calls the functions of the benchmarks, which say what a number means. Modules are imported where a row runs, so
that a library that is missing leaves out its rows alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ailurus_hf.extras import require

Rows = list[dict[str, Any]]
# Clusterings of every vision row: the paper's, the default, and the one of the preset "dense".
CLUSTERINGS = ("density_peaks", "local_kmeans", "ward")


@dataclass(frozen=True)
class Machine:
    """Where a row is made. tiny: geometries of a dry run, one repeat, nothing compiled to kernels."""

    device: torch.device
    tiny: bool = False

    def repeats(self, full: int) -> int:
        return 1 if self.tiny else full

    def some(self, names: Sequence[str]) -> list[str]:
        """Of what takes long to compile only the first."""
        return list(names[:1] if self.tiny else names)

    def of_size(self, full: int) -> int:
        """The side of a diffusion model's pictures."""
        return 256 if self.tiny else full

    @property
    def backend(self) -> str:
        return "eager" if self.tiny else "inductor"


@dataclass(frozen=True)
class Target:
    """`key` of the rows whose other values are these is to be at least `least`, or at most `most`."""

    key: str
    where: dict[str, Any] = field(default_factory=dict)
    least: float | None = None
    most: float | None = None

    @property
    def wanted(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"

    def reached(self, rows: Rows) -> Rows:
        """A line for each row it is about: which, the value, and whether it holds."""
        found = [row for row in rows if all(row.get(key) == value for key, value in self.where.items())]
        return [self._line(row, row[self.key]) for row in found if row.get(self.key) is not None]

    def _line(self, row: dict[str, Any], value: float) -> dict[str, Any]:
        holds = value >= self.least if self.least is not None else value <= (self.most or 0.0)
        names = [str(row[key]) for key in ("model", "of", "shape", "clustering", "method", "mode") if key in row]
        about = ", ".join(dict.fromkeys(names))
        return {"of": about, "what": self.key, "wanted": self.wanted, "value": value, "holds": holds}


@dataclass(frozen=True)
class Row:
    """measure: in a benchmark's module, which it is given. minutes: about, on an H100, compiling included.

    cuda: nothing else can run it.
    """

    name: str
    what: str
    module: str
    measure: Callable[[Any, Machine], Rows]
    precision: str = "bf16"
    minutes: float = 0.3
    targets: tuple[Target, ...] = ()
    cuda: bool = False

    @property
    def key(self) -> str:
        """Its name beside other rows, and its result file's."""
        return f"{self.name}-{self.precision}"

    @property
    def columns(self) -> dict[str, str]:
        return importlib.import_module(self.module).COLUMNS

    @staticmethod
    def wrong(rows: Rows) -> str | None:
        """The checks among the rows that do not hold, in words."""
        return "; ".join(f"{row['check']}: {row['note']}" for row in rows if row.get("holds") is False) or None


def _check(name: str, what: str, measure: str) -> Row:
    def run(module: Any, on: Machine) -> Rows:
        return getattr(module, measure)(on.device, on.tiny)

    return Row(name, what, "benchmarks.gpu.checks", run, "fp32", 0.5)


def _vit(name: str, short: str, precision: str, batch: int, *targets: Target) -> Row:
    def run(module: Any, on: Machine) -> Rows:
        options = {"device": on.device, "precision": precision, "batch": batch}
        return module.measure(name, CLUSTERINGS, on.repeats(21), **options)

    what = f"{name}, {batch} image{'s' * (batch > 1)}"
    return Row(f"gpu_{short}_{batch}", what, "benchmarks.vision.vit_speed", run, precision, targets=targets)


def _family(name: str, short: str, *targets: Target, batch: int = 1) -> Row:
    def run(module: Any, on: Machine) -> Rows:
        options = {"device": on.device, "precision": "bf16", "batch": batch}
        return module.measure(name, CLUSTERINGS, on.repeats(11), **options)

    return Row(f"gpu_{short}", name, "benchmarks.vision.families_speed", run, targets=targets)


def _compiled(name: str, short: str, minutes: float) -> Row:
    def run(module: Any, on: Machine) -> Rows:
        return module.measure(name, on.some(CLUSTERINGS[1:]), "bf16", on.repeats(11), on.backend, device=on.device)

    targets = (Target("share_of_ideal", {"clustering": "local_kmeans"}, least=0.95), Target("compile_s", most=40))
    return Row(
        f"gpu_compiled_{short}", f"{name}, compiled", "benchmarks.vision.compiled_speed", run, "bf16", minutes, targets
    )


def _modes(what: str, function: str, short: str, modes: tuple[str, ...], minutes: float, *targets: Target) -> Row:
    cuda = any("CUDA" in mode for mode in modes)

    def run(module: Any, on: Machine) -> Rows:
        options = {"device": on.device, "precision": "bf16", "backend": on.backend}
        return getattr(module, function)(what, on.some(CLUSTERINGS[1:]), modes, on.repeats(21), **options)

    title = f"{what}, {' and '.join(modes)}"
    module = "benchmarks.clustering.launch_modes"
    return Row(f"gpu_modes_{short}", title, module, run, "bf16", minutes, targets, cuda=cuda)


def _kernels(what: str) -> Row:
    """Local k-means by both kernels; only CUDA runs Triton's, and a torch without Triton leaves the row out."""

    def run(module: Any, on: Machine) -> Rows:
        require("triton", "triton")
        options = {"device": on.device, "precision": "bf16", "backend": on.backend}
        names = ["local_kmeans", *module.WITH_SETTINGS]
        return module.measure_clustering(what, names, MODES_OF_KERNELS, on.repeats(21), **options)

    title = f"{what}, local k-means by torch's and by Triton's kernel"
    return Row("gpu_kernels_1024", title, "benchmarks.clustering.launch_modes", run, "bf16", 0.5, cuda=True)


def _attention(precision: str) -> Row:
    def run(module: Any, on: Machine) -> Rows:
        found = [module.measure(name, on.repeats(21), device=on.device, precision=precision) for name in module.SHAPES]
        return [row for rows in found for row in rows]

    what = "attention, channel against mask"
    targets = (Target("chosen_over_other", most=1.05),)
    return Row("gpu_attention_forms", what, "benchmarks.vision.attention_forms", run, precision, 0.2, targets)


def _detector(name: str, short: str, *targets: Target) -> Row:
    def run(module: Any, on: Machine) -> Rows:
        options = {"size": module.SIZE, "device": on.device, "precision": "bf16"}
        return module.measure(name, module.ROWS[name], on.repeats(7), **options)

    return Row(
        f"gpu_detection_{short}", f"a detector's {name}", "benchmarks.vision.detection_speed", run, targets=targets
    )


# The presets by the names of benchmarks.methods.diffusion, and what they are held against.
FAST, BALANCED, FAITHFUL = (
    "blocks of each stack 0.25",
    "keys 0.0625 at full size, blocks 0.35 at half, halves apart",
    "keys 0.0625 at full size, k-means",
)
SD15 = ("blocks 0.25", "blocks 0.25, merged projections", FAST, BALANCED, FAITHFUL, "ToDo 2")
SDXL = ("blocks 0.5", "blocks 0.25", "blocks 0.25, merged projections", "ToDo 2")
TOMESD = ("tomesd 0.5, max_downsample 1",)


def _diffusion(
    model: str,
    size: int,
    methods: tuple[str, ...],
    minutes: float,
    *targets: Target,
    steps: int | None = None,
    compiled: bool = False,
) -> Row:
    def run(module: Any, on: Machine) -> Rows:
        known = importlib.util.find_spec("tomesd") is not None and not compiled
        unet = module.make_unet(model, on.device, torch.float32 if on.device.type == "cpu" else torch.bfloat16)
        names, count = [*methods, *TOMESD * known], min(steps, 2) if steps and on.tiny else steps
        if compiled:
            return module.measure_compiled(
                model,
                on.of_size(size),
                on.some(names),
                on.repeats(5),
                unet=unet,
                batch=2,
                steps=count,
                backend=on.backend,
            )
        repeats = on.repeats(3 if steps else 9)
        return module.measure(model, on.of_size(size), names, repeats, unet=unet, batch=1 if steps else 2, steps=count)

    way = f"a generation of {steps} steps" if steps else "a step"
    name = f"gpu_{model}_{size}" + "_whole" * bool(steps) + "_compiled" * compiled
    what = f"{model} {size}², {way}" + ", compiled" * compiled
    return Row(name, what, "benchmarks.diffusion.diffusion_speed", run, "bf16", minutes, targets)


def _video(whole: bool, methods: tuple[str, ...], minutes: float, *targets: Target) -> Row:
    def run(module: Any, on: Machine) -> Rows:
        frames, dtype = (3, torch.float32) if on.tiny else (15, torch.bfloat16)
        pipe = module.make_pipeline(on.device, dtype, module.UNET, module.CONTROLNET, module.VAE if whole else None)
        options = {"whole": whole, "steps": 2 if on.tiny else 50}
        return module.measure(
            pipe, frames, on.of_size(512), ["plain", *methods], on.repeats(1 if whole else 3), **options
        )

    name, what = ("video", "50 steps and decoding") if whole else ("step", "a step")
    title = f"ControlVideo, 15 frames of 512², {what}"
    return Row(f"gpu_controlvideo_{name}", title, "benchmarks.video.controlvideo_speed", run, "bf16", minutes, targets)


def _training(name: str, batch_size: int) -> Row:
    def run(module: Any, on: Machine) -> Rows:
        methods = ["density peaks, copy (the paper)", "local k-means, copy", "Ward, smooth"]
        options = {"batch_size": 2 if on.tiny else batch_size, "precision": "bf16", "device": on.device}
        return module.measure(name, methods, [0.25], on.repeats(7), **options)

    target = Target("share_of_plain", {"method": "local k-means, copy"}, most=0.5)
    title = f"a training step, Segmenter {name}, {batch_size} images"
    return Row(f"gpu_training_{name.lower()}", title, "benchmarks.training.finetune_speed", run, "bf16", 0.5, (target,))


SHARE = Target("share_of_ideal", {"clustering": "local_kmeans"}, least=0.95)
EAGER, GRAPHS = ("eager", "compiled"), ("CUDA graph", "compiled, CUDA graph")
MODES_OF_KERNELS = (EAGER[0], GRAPHS[0])

# What matters most comes first, and what compiles for minutes last.
ROWS: dict[str, Row] = {
    row.key: row
    for row in (
        _check("gpu_checks_clustering", "clusters, merging, attention", "measure_clustering"),
        _check("gpu_checks_models", "a reduced ViT: identity, undo, no waiting, one graph", "measure_models"),
        _check("gpu_checks_diffusion", "a reduced UNet: the same", "measure_diffusion"),
        _vit("ViT-L/16 640", "vit_l", "bf16", 1),
        _vit("ViT-L/16 640", "vit_l", "bf16", 16, SHARE),
        _vit("ViT-L/16 640", "vit_l", "fp32", 4, SHARE),
        _vit("ViT-B/16 512", "vit_b", "bf16", 1),
        _vit("ViT-B/16 512", "vit_b", "bf16", 16, SHARE),
        _vit("ViT-B/16 512", "vit_b", "fp32", 4, SHARE),
        _family("DINOv2-L + DPT head 518", "dinov2_dpt", SHARE),
        _family("EoMT-L 640", "eomt", SHARE),
        _attention("bf16"),
        _attention("fp32"),
        _training("ViT-B", 8),
        _diffusion("sd15", 512, SD15, 0.5, Target("speed_up", {"method": "blocks 0.25"}, least=1.52)),
        _diffusion("sd15", 1024, SD15, 0.7, Target("speed_up", {"method": "blocks 0.25"}, least=2.8)),
        _diffusion("sdxl", 1024, SDXL, 0.7, Target("speed_up", {"method": "blocks 0.25"}, least=1.8)),
        _diffusion("sd15", 512, (FAST, BALANCED, FAITHFUL), 1.2, steps=50),
        _video(False, ("each 0.25", "joint 0.25", "VidToMe"), 0.7),
        _video(True, ("each 0.25",), 2, Target("speed_up", {"method": "each 0.25"}, least=2.5)),
        _modes("1024 tokens of 768", "measure_clustering", "1024_eager", EAGER, 1),
        _modes("1024 tokens of 768", "measure_clustering", "1024_graph", GRAPHS, 1),
        _modes("4096 tokens of 320", "measure_clustering", "4096", (EAGER[0], GRAPHS[0]), 0.3),
        _kernels("1024 tokens of 768"),
        _modes("ViT-B/16 512", "measure_vit", "vit_b_eager", EAGER, 2),
        _modes("ViT-B/16 512", "measure_vit", "vit_b_graph", GRAPHS, 2, SHARE),
        _detector("ViT-L", "vit_l", Target("speed_up", {"location": 7}, least=1.53)),
        _detector("ViT-B", "vit_b"),
        _diffusion("sdxl", 1024, SDXL[1:3], 1.5, steps=30),
        _compiled("DINOv2-L + DPT head 518", "dinov2_dpt", 2.5),
        _compiled("ViT-L/16 640", "vit_l", 2.5),
        _diffusion("sd15", 512, (FAST, BALANCED), 3.5, compiled=True),
    )
}
