"""`ailurus-hf export`: a model, reduced or not, as one file for ONNX Runtime, OpenVINO or torch; and a check of it."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..errors import AiluRusError
from ..extras import require
from .arguments import add_ailurus, add_model, load
from .telling import print_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..evaluation.loading import LoadedModel

EXAMPLES = """
  ailurus-hf export --model my-segmenter --preset dense --output segmenter.onnx
  ailurus-hf export --model facebook/dinov2-base --keep-ratio 0.5 --output dinov2.pt2 --dynamic-batch
"""
FORMATS = {".onnx": "onnx", ".pt2": "torch-export", ".xml": "openvino"}
# The most that an output of the file may differ from the model's, RMS over RMS. More than rounding, which can send a
# token that is as near to two clusters to the other one.
TOLERANCE = 0.01
MOST_IMAGES = 64
# From a batch of images to the outputs of the file.
Run = Callable[["Tensor"], "list[Tensor]"]


class ExportError(AiluRusError):
    """The file does not do what the model does."""

    exit_code = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--output", required=True, help="file to write: .onnx, .pt2 (torch.export) or .xml (OpenVINO)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there (default: refuse)")
    parser.add_argument("--image", help="image whose size the file is for (default: the model's size)")
    parser.add_argument(
        "--dynamic-batch", action="store_true", help=f"the file takes 1 to {MOST_IMAGES} images (default: one)"
    )
    add_ailurus(parser)


def run(args: argparse.Namespace) -> int:
    from ..evaluation.bad_input import BadInputError
    from ..evaluation.loading import noise_image
    from ..evaluation.writing import make_folder
    from ..images import read_image

    output = Path(args.output)
    if output.suffix not in FORMATS:
        raise BadInputError(f"--output must end in {', '.join(FORMATS)}, got {args.output}")
    if output.exists() and not args.overwrite:
        raise BadInputError(f"{output} is there already: --overwrite replaces it, --output names another file")
    kind = FORMATS[output.suffix]
    make_folder(output.parent)
    image = read_image(args.image) if args.image else None
    loaded = load(args, None)
    if loaded.ailurus is not None and loaded.ailurus.min_keep_ratio is not None:
        raise BadInputError("--min-keep-ratio keeps another number of tokens for each image: a file has one number")
    loaded.switch_on()
    example = _pixels(loaded, image or noise_image(loaded))
    module, names = _tensors_only(loaded.model, example)
    details: dict[str, Any] = {"format": kind, "file": str(output), "input": list(example.shape), "outputs": names}
    # Beside the output, which is made or replaced by a file that was checked, and by no other.
    with TemporaryDirectory(prefix=".ailurus-", dir=output.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn of their own code
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        file = Path(folder) / output.name
        details |= WRITERS[kind](module, example, file, names, args.dynamic_batch)
        details["difference"] = _difference(module, example, READERS[kind](file), args.dynamic_batch)
        if not details["difference"] <= TOLERANCE:
            raise ExportError(
                f"what was made for {output} gives other outputs than the model: they differ by "
                f"{details['difference']:.2g} of their size, and {TOLERANCE:g} at most would be rounding"
            )
        parts = list(Path(folder).iterdir())  # large weights lie in files of their own
        details["megabytes"] = round(sum(part.stat().st_size for part in parts) / 1e6, 1)
        for part in parts:
            part.replace(output.with_name(part.name))
    if args.json:
        print_json(loaded, export=details)
        return 0
    shape = " × ".join([f"1 to {MOST_IMAGES}" if args.dynamic_batch else "1", *map(str, example.shape[1:])])
    print(f"{output}: {kind}{details.get('opset', '')}, {details['megabytes']} MB, {loaded.setting()}")
    print(f"takes {shape}, gives {', '.join(names)}")
    print(f"on other images its outputs differ from the model's by {details['difference']:.1e} of their size")
    return 0


def _pixels(loaded: LoadedModel, image: Any) -> Tensor:
    inputs = loaded.one_sequence(loaded.prepare(image))
    if others := sorted(set(inputs) - {"pixel_values"}):
        raise AiluRusError(
            f"{type(loaded.model).__name__} takes {', '.join(others)} beside pixel_values: export its vision tower"
        )
    pixels: Tensor = inputs["pixel_values"]
    return pixels


def _tensors_only(model: nn.Module, example: Tensor) -> tuple[nn.Module, list[str]]:
    """A module from a batch of images to a tuple of the model's outputs that are tensors, and their names."""
    import torch

    with torch.no_grad():
        outputs = model(pixel_values=example)
    names = [name for name, value in outputs.items() if isinstance(value, torch.Tensor)]

    class TensorsOnly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
            found = self.model(pixel_values=pixel_values)
            return tuple(found[name] for name in names)

    return TensorsOnly().eval(), names


def _shapes(example: Tensor, dynamic: bool) -> tuple[Tensor, Any]:
    """What to export with: an example batch, and which of its sizes may change."""
    import torch

    if not dynamic:
        return example, None
    # A size of 1 would be taken for fixed.
    return example.expand(2, -1, -1, -1).clone(), ({0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)},)


def _write_torch(module: nn.Module, example: Tensor, output: Path, names: list[str], dynamic: bool) -> dict[str, Any]:
    import torch

    batch, shapes = _shapes(example, dynamic)
    with torch.no_grad():  # without it the graph switches gradients off around the clustering, and does not load again
        torch.export.save(torch.export.export(module, (batch,), dynamic_shapes=shapes), output)
    return {}


def _write_onnx(module: nn.Module, example: Tensor, output: Path, names: list[str], dynamic: bool) -> dict[str, Any]:
    import torch

    require("onnxscript", "export")
    batch, shapes = _shapes(example, dynamic)
    options: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": names, "dynamic_shapes": shapes}
    with torch.no_grad():
        program = torch.onnx.export(module, (batch,), output, dynamo=True, verbose=False, **options)
    assert program is not None
    return {"opset": f" of opset {program.model.opset_imports['']}"}


def _write_openvino(
    module: nn.Module, example: Tensor, output: Path, names: list[str], dynamic: bool
) -> dict[str, Any]:
    import torch

    openvino = require("openvino", "export")
    batch, shapes = _shapes(example, dynamic)
    with torch.no_grad():
        program = torch.export.export(module, (batch,), dynamic_shapes=shapes)
    try:
        model = openvino.convert_model(program, extension=_openvino_extensions())
    except Exception as error:
        reason = str(error).strip().splitlines()[-1].strip(" -")
        raise AiluRusError(f"OpenVINO cannot convert it: {reason}") from error
    for given, name in zip(model.outputs, names, strict=True):
        given.get_tensor().set_names({name})
    openvino.save_model(model, output, compress_to_fp16=False)
    return {}


def _openvino_extensions() -> list[Any]:
    """What OpenVINO has an operator for, and reads in no torch.export program (2026.4)."""
    from openvino import opset15
    from openvino.frontend.pytorch import ConversionExtension

    def scatter_least(context: Any) -> Any:
        data, axis, index, source = (context.get_input(number) for number in range(4))
        # Which reduction it is cannot be asked for. Clustering takes the least; were it another, the check would fail.
        return opset15.scatter_elements_update(data, index, source, axis, "min").outputs()

    return [ConversionExtension("aten.scatter_reduce.two", scatter_least)]


def _read_torch(path: Path) -> Run:
    import torch

    program = torch.export.load(path).module()
    return lambda images: list(program(images))


def _read_onnx(path: Path) -> Run:
    import torch

    session = require("onnxruntime", "export").InferenceSession(path)
    (given,) = session.get_inputs()
    return lambda images: [torch.from_numpy(each) for each in session.run(None, {given.name: images.cpu().numpy()})]


def _read_openvino(path: Path) -> Run:
    import torch

    # On a CPU with bf16 it would compute in bf16.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = require("openvino", "export").Core().compile_model(path, "CPU", exact)
    return lambda images: [torch.from_numpy(each.copy()) for each in compiled(images.cpu().numpy()).values()]


WRITERS = {"onnx": _write_onnx, "torch-export": _write_torch, "openvino": _write_openvino}
READERS: dict[str, Callable[[Path], Run]] = {
    "onnx": _read_onnx,
    "torch-export": _read_torch,
    "openvino": _read_openvino,
}


def _difference(module: nn.Module, example: Tensor, run_file: Run, dynamic: bool) -> float:
    """The most that an output of the file is off, RMS over the model's RMS, on noise that was not exported with."""
    import torch

    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for count in (1, 3) if dynamic else (1, 1):
        noise = torch.randn(count, *example.shape[1:], generator=generator).to(example)
        with torch.no_grad():
            pairs = zip(module(noise), run_file(noise), strict=True)
            for want, got in pairs:
                off = (got.to(want) - want).norm() / want.norm().clamp_min(1e-12)
                largest = max(largest, float(off))
    return largest
