"""What `ailurus-hf doctor` reports: versions, missing extras, devices, attention kernels, and a self-check."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..versions import OLDEST, installed_version, too_old, torchvision_problem

# The distributions each extra of pyproject.toml names itself; the extras it includes are listed on their own.
EXTRAS: dict[str, tuple[str, ...]] = {
    "vision": ("transformers", "accelerate", "pillow", "safetensors", "pyyaml", "tqdm", "pycocotools", "shtab"),
    "diffusion": ("diffusers", "transformers", "accelerate"),
    "video": ("imageio", "imageio-ffmpeg", "opencv-python-headless", "pillow", "controlnet-aux", "torchvision"),
    "detection": ("torchvision", "scipy"),
    "datasets": ("datasets",),
    "app": ("gradio", "imageio-ffmpeg"),
    "export": ("onnxscript", "onnxruntime", "openvino"),
    "bench": ("matplotlib", "tomesd", "pyarrow", "scikit-image"),
    "triton": ("triton",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 1 where the self-check failed or a version does not fit."""
    found = report()
    print(json.dumps(found, indent=2) if args.json else format_report(found))
    return 1 if found["problems"] or found["self_check"]["ok"] is False else 0


def report() -> dict[str, Any]:
    """Everything at once, ready for JSON. `self_check["ok"]` is None where transformers is missing."""
    missing = {extra: [name for name in names if installed_version(name) is None] for extra, names in EXTRAS.items()}
    names = ["ailurus-hf", "torch", "numpy", *sorted({name for extra in EXTRAS.values() for name in extra})]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "versions": {name: installed_version(name) for name in names},
        "missing": missing,
        "problems": [problem for problem in (*map(too_old, OLDEST), torchvision_problem()) if problem],
        "devices": _devices(),
        "attention": {device: _attention_kernels(device) for device in _device_types()},
        "self_check": _self_check() if "transformers" not in missing["vision"] else {"ok": None, "detail": "no vision"},
    }


def format_report(found: dict[str, Any]) -> str:
    """The report for reading, one fact a line."""
    lines = [f"python {found['python']} on {found['platform']}", ""]
    lines += [f"{name:24} {version or '-'}" for name, version in found["versions"].items()]
    lines.append("")
    for extra, names in found["missing"].items():
        state = f'missing {", ".join(names)}: pip install "ailurus-hf[{extra}]"' if names else "complete"
        lines.append(f"extra {extra:18} {state}")
    lines += [f"PROBLEM {problem}" for problem in found["problems"]]
    lines.append("")
    lines += [f"device {device}" for device in found["devices"]]
    for device, kernels in found["attention"].items():
        for kernel, use in kernels.items():
            lines.append(f"attention on {device:11} {kernel:20} {use}")
    check = found["self_check"]
    state = {True: "passed", False: "FAILED", None: 'not run: pip install "ailurus-hf[vision]"'}[check["ok"]]
    lines += ["", f"self-check {state}" + (f": {check['detail']}" if check["ok"] is not None else "")]
    return "\n".join(lines)


def _device_types() -> list[str]:
    return ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


def _devices() -> list[str]:
    devices = [f"cpu, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return devices + ["mps"] * torch.backends.mps.is_available()


def _attention_kernels(device: str) -> dict[str, str]:
    """Which of PyTorch's attention kernels run here, and which of them take the counts as a mask."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    query = torch.zeros(1, 2, 64, 64, device=device, dtype=dtype)
    mask = torch.zeros(1, 1, 1, 64, device=device, dtype=dtype)
    found = {}
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        backend = getattr(SDPBackend, name)
        if not _runs(backend, query, None):
            found[name.lower()] = "not available"
        else:
            found[name.lower()] = "with counts as a mask" if _runs(backend, query, mask) else "without a mask only"
    return found


def _runs(backend: SDPBackend, query: torch.Tensor, mask: torch.Tensor | None) -> bool:
    try:
        with warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # PyTorch warns once for every reason a kernel does not fit
            scaled_dot_product_attention(query, query, query, attn_mask=mask)
    except RuntimeError:
        return False
    return True


def _self_check() -> dict[str, Any]:
    """A tiny ViT from a config: reduced in the middle, and exactly itself again after the undo."""
    from .. import AiluRusConfig, ailurus_status, apply_ailurus, remove_ailurus

    try:
        from transformers import ViTConfig, ViTModel

        config = ViTConfig(
            image_size=64,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=64,
        )
        model = ViTModel(config).eval()
        images = torch.linspace(-1, 1, 3 * 64 * 64).sin().reshape(1, 3, 64, 64)
        with torch.inference_mode():
            before = model(images).last_hidden_state
            apply_ailurus(model, AiluRusConfig(cluster_location=2, num_clusters=16))
            reduced = model(images).last_hidden_state
            clusters = ailurus_status(model).last_clusters
            remove_ailurus(model)
            after = model(images).last_hidden_state
    except Exception as error:  # whatever it is, the report has to say it
        return {"ok": False, "detail": f"{type(error).__name__}: {error}"}
    if clusters is None or clusters.num_clusters != 16 or reduced.shape != before.shape:
        return {"ok": False, "detail": "the layers after the merge did not run on 16 of 64 tokens"}
    if not torch.equal(before, after):
        return {"ok": False, "detail": "the output differs after remove_ailurus"}
    return {"ok": True, "detail": "a tiny ViT ran on 16 of 64 tokens, and was itself again after the undo"}
