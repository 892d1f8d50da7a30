"""A model of transformers with its image processor, loaded for a task, ready to run reduced or plain."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import socket
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch

from ..apply import ailurus_status, apply_ailurus, remove_ailurus
from ..clustering import get_clustering
from ..config import AiluRusConfig, AiluRusDiffusionConfig
from ..extras import needs_extra, require
from ..presets import HALF
from ..visualization import Panel, draw_assignment, draw_token_counts, reconstruct_image, token_count_legend
from .bad_input import BadInputError
from .image_size import check_processed_size
from .tasks import has_text_tower, model_class, task_of
from .tuned_models import label_of
from .zero_shot import ZeroShotClassifier

with needs_extra("vision", "Loading a model"):
    from PIL import Image

AnyConfig = TypeVar("AnyConfig", AiluRusConfig, AiluRusDiffusionConfig)


def noise_image(loaded: LoadedModel) -> Image.Image:
    """An image of the size the model was made for, for commands that need some image."""
    config = loaded.model.config
    parts = [config, *(getattr(config, name, None) for name in ("encoder_config", "vision_config", "backbone_config"))]
    size = next((found for part in reversed(parts) if (found := getattr(part, "image_size", None))), 224)
    height, width = (size, size) if isinstance(size, int) else size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def choose_device(name: str) -> torch.device:
    """The device of that name; for "auto" the first accelerator that is there, else the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInputError(f"device {name} cannot be used here: {first_line(error)}") from error
    return device


@dataclass
class LoadedModel:
    """A model in eval mode with the image processor saved beside it, and how it is to be reduced (None: not at all)."""

    name: str
    model: Any
    processor: Any
    device: torch.device
    dtype: torch.dtype
    ailurus: AiluRusConfig | None
    task: str | None = None

    def switch_on(self) -> None:
        if self.ailurus is not None:
            apply_ailurus(self.model, self.ailurus)

    def switch_off(self) -> None:
        if self.ailurus is not None:
            remove_ailurus(self.model)

    def prepare(self, image: Image.Image) -> dict[str, Any]:
        """The model's inputs for one RGB image, on the model's device and in its precision.

        Raises:
            ImageError: an image that the processor would enlarge without measure.
        """
        check_processed_size(self.processor, image.size)
        inputs = self.processor(images=image, return_tensors="pt")
        if "pixel_mask" not in inspect.signature(self.model.forward).parameters:  # DETR's processors make one
            inputs.pop("pixel_mask", None)
        return {name: self._placed(value) for name, value in inputs.items()}

    def _placed(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self.device, self.dtype if value.is_floating_point() else None)
        return [self._placed(each) for each in value] if isinstance(value, list | tuple) else value

    # Not inference_mode: tables that a model makes once, as BEiT's, would be of no use to a training in this process.
    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> Any:
        """The model's output; of a Segmenter whose processor names a window, the windows' averaged logits."""
        if getattr(self.processor, "window_size", None) is None:
            return self.model(**inputs)
        from ..segmenter import windowed_outputs

        return windowed_outputs(self.model, self.processor, inputs["pixel_values"])

    def one_sequence(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs as the encoder gets them: of an image that is seen in windows or patches, the first one."""
        if "patch_offsets" in inputs:
            return {"pixel_values": inputs["pixel_values"][:1]}
        if getattr(self.processor, "window_size", None) is None:
            return inputs
        from ..segmenter import first_window

        return inputs | {"pixel_values": first_window(self.processor, inputs["pixel_values"])}

    def setting(self) -> str:
        """How it is reduced, in words."""
        return "not reduced" if self.ailurus is None else label_of(self.ailurus)

    def class_names(self) -> list[str]:
        if isinstance(self.model, ZeroShotClassifier):
            return self.model.labels
        labels = self.model.config.id2label
        return [str(labels[i]) for i in sorted(labels)]

    @torch.no_grad()
    def draw_clusters(self, inputs: dict[str, Any], fill: str = "mean") -> ClusterPictures:
        """Runs the image, or of one seen in windows the first window, and draws its clusters on the pixels seen."""
        inputs = self.one_sequence(inputs)
        self.model(**inputs)
        status = ailurus_status(self.model)
        location, clusters, grid = status.locations[0], status.last_clusters, status.last_grid
        if clusters is None or grid is None:  # the image has no more tokens than are kept
            return ClusterPictures(None, None, None, None, location.num_tokens or 0, location.num_clusters or 0)
        seen = self._seen_image(inputs["pixel_values"])
        patch = getattr(self.model.config, "patch_size", None)
        # A model that pads inside has the last tokens reach past the image; otherwise the tokens span it.
        padded = isinstance(patch, int) and tuple(grid) == (-(-seen.height // patch), -(-seen.width // patch))
        side = patch if padded else None
        return ClusterPictures(
            seen,
            draw_assignment(seen, clusters, grid, fill=fill, patch_size=side),
            draw_token_counts(seen, clusters, grid, patch_size=side),
            reconstruct_image(seen, clusters, grid, patch_size=side),
            clusters.num_tokens,
            clusters.num_clusters,
        )

    def _seen_image(self, pixel_values: torch.Tensor) -> Image.Image:
        """The pixels the model sees, resized and cropped, brought back from their normalization."""
        pixels = pixel_values[0].float().cpu()
        if getattr(self.processor, "do_normalize", True):
            mean, std = torch.tensor(self.processor.image_mean), torch.tensor(self.processor.image_std)
            pixels = pixels * std[:, None, None] + mean[:, None, None]
        if getattr(self.processor, "do_rescale", True):
            pixels = pixels * 255
        return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


class ClusterPictures(NamedTuple):
    """One image as the model sees it, its clusters, how many tokens each stands for, and what is left of it; None where
    it had too few tokens to be reduced."""

    seen: Image.Image | None
    assignment: Image.Image | None
    counts: Image.Image | None
    rebuilt: Image.Image | None
    num_tokens: int
    num_clusters: int

    def panels(self) -> list[Panel]:
        """The pictures with titles; none where there are none."""
        if self.seen is None or self.assignment is None or self.counts is None or self.rebuilt is None:
            return []
        return [
            Panel("image", self.seen, f"{self.num_tokens} tokens"),
            Panel(
                f"{self.num_tokens} tokens in {self.num_clusters} clusters", self.assignment, "each is one token later"
            ),
            Panel(
                "tokens that a cluster stands for",
                self.counts,
                "dark: kept as they are; bright: one for many",
                token_count_legend(),
            ),
            Panel("what is left", self.rebuilt, "each patch is the mean of its cluster"),
        ]


def load_model(
    name: str,
    task: str | None,
    device: str,
    dtype: str,
    ailurus: dict[str, Any] | None,
    preset: str | None = None,
    clustering: dict[str, Any] | None = None,
    labels_text: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Loads a model folder or Hub name.

    Args:
        task: "segment", "classify", "depth" or "detect"; None takes what the model's architecture is for. The model's
            class is its own architecture.
        device, dtype: "auto" is the first accelerator that is there; "float32", "float16" or "bfloat16".
        ailurus: fields of AiluRusConfig that replace those of the preset, or of the settings saved with the model; None
            runs it unreduced.
        preset: a name of `AiluRusConfig.preset`.
        clustering: settings that replace the clustering's own.
        labels_text: classes in words, for models that compare images with texts (CLIP, SigLIP); without them such a
            model is its vision tower.
        settings: fields of AiluRusConfig as they are saved, in place of those saved with the model.

    Raises:
        BadInputError: no such model, one of another task, or a device that cannot be used.
        AiluRusError: settings that are wrong, or that the model cannot be reduced with.
    """
    target = choose_device(device)  # what can be wrong at once is told before anything slow
    transformers = require("transformers", "vision")
    # Importing segmenter registers Segmenter with the Auto classes.
    from ..segmenter.image_processing_segmenter import AutoImageProcessor

    # Errors are told in one line; the libraries' own warnings, and bars nobody watches, would stand around it.
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    check_name(name)
    config = read_pretrained(name, transformers.AutoConfig.from_pretrained)
    reduced = None
    if ailurus is not None:
        saved = getattr(config, "ailurus_config", None) if preset is None and settings is None else settings
        reduced = with_clustering(_ailurus_config(saved, preset, ailurus), clustering or {})
    texts = has_text_tower(config)
    if labels_text and not texts:
        raise BadInputError(
            f"--labels-text is for models that compare images with texts (CLIP, SigLIP), not for {name}"
        )
    if texts and task == "classify" and not labels_text:
        raise BadInputError(f"{name} has no classes of its own: --labels-text gives them, as words")
    cls = transformers.AutoModel if texts and task in (None, "classify") else model_class(config, name, task)
    processor = read_pretrained(name, AutoImageProcessor.from_pretrained)
    model = read_pretrained(name, cls.from_pretrained, dtype=getattr(torch, dtype)).to(target).eval()
    if labels_text:
        model = ZeroShotClassifier(
            model, read_pretrained(name, transformers.AutoTokenizer.from_pretrained), labels_text
        )
    elif texts:
        model = model.vision_model
    task = "classify" if labels_text else task or task_of(config)
    loaded = LoadedModel(name, model, processor, target, getattr(torch, dtype), reduced, task)
    loaded.switch_on()  # a model or a location that cannot be reduced is refused before the first image
    loaded.switch_off()
    return loaded


def read_pretrained(name: str, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    try:
        return from_pretrained(name, **options)
    except Exception as error:  # a folder can be wrong in as many ways as there are parsers behind this call
        raise BadInputError(f"cannot load model {name}: {first_line(error)}") from error


def _ailurus_config(saved: Mapping[str, Any] | None, preset: str | None, given: dict[str, Any]) -> AiluRusConfig:
    if preset is not None:
        return AiluRusConfig.preset(preset, **given)  # type: ignore[arg-type]
    fields = dict(saved or HALF)
    if "keep_ratio" in given or "num_clusters" in given:  # they exclude each other: the given one replaces both
        fields |= {"keep_ratio": None, "num_clusters": None}
    return AiluRusConfig.from_dict(fields | given)


def with_clustering(config: AnyConfig, settings: Mapping[str, Any]) -> AnyConfig:
    """The config with other settings of its clustering.

    Raises:
        BadInputError: a setting that this clustering does not have.
    """
    if not settings:
        return config
    clustering = get_clustering(config.clustering)
    known = [field.name for field in dataclasses.fields(clustering)]
    for name in settings:
        if name not in known:
            raise BadInputError(
                f"{name} is no setting of {clustering.name or type(clustering).__name__}, which has "
                f"{', '.join(known) or 'none'}: choose the clustering that has it"
            )
    return dataclasses.replace(config, clustering=dataclasses.replace(clustering, **settings))


def check_name(name: str, file: str = "config.json") -> None:
    """Refuses at once what the Hub client would retry for half a minute: a folder that is not there.

    file: what a folder of that kind has in it.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / file).is_file():
            raise BadInputError(f"{name} is no model folder: it has no {file}")
        return
    if path.is_file():
        raise BadInputError(f"{name} is a file; a model is a folder with {file}, or a name on the Hub")
    from huggingface_hub import constants, try_to_load_from_cache

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise BadInputError(f"no model folder {name}, and no name on the Hub looks like that")
    if isinstance(try_to_load_from_cache(name, file), str) or urllib.request.getproxies():
        return
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise BadInputError(f"no model folder {name}, and {host} cannot be reached to look for it there") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
