"""The frame half way between two others: optical flow of OpenCV, which needs no weights, or a network of the user's.

An interpolator is any callable (before, after) -> frames, each Tensor[B, 3, H, W] in [0, 1]: the interleaved-frame
smoother of ControlVideo takes one. Its own is RIFE, which `NetworkInterpolator.from_file("flownet.pkl")` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad

from ..errors import AiluRusError
from ..extras import require
from .rife import load_rife

# From the frames before and after, Tensor[B, 3, H, W] in [0, 1] each, to those half way.
Interpolator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Shorter sides than this are enlarged before DIS, whose patches of 8 pixels need several to a side.
SMALLEST_SIDE = 64
# Disagreement of the two directions, in pixels, at which a pixel counts as half hidden.
OCCLUSION = 1.0


class FlowInterpolator:
    """Frames half way by dense inverse search (Kroeger et al. 2016), warped both ways, blended by what each side sees.

    The two flows are carried to the middle frame, where several arrive the one whose colors agree best stays (Baker et
    al. 2011, section 3.3.2); holes take the flow of their nearest neighbor. Raises AiluRusError without OpenCV.

    Example:
        middle = FlowInterpolator()(before, after)  # Tensor[B, 3, H, W] in [0, 1] each
    """

    def __init__(self) -> None:
        require("cv2", "video")  # now, and not in the middle of a video

    def __call__(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Tensor[B, 3, H, W] in [0, 1], twice, to the same; computed on the CPU, returned on `before`'s device."""
        _check(before, after)
        pairs = [x.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy() for x in (before, after)]
        middle = np.stack([_half_way(first, second) for first, second in zip(*pairs)])
        return torch.from_numpy(middle).permute(0, 3, 1, 2).to(before.device, before.dtype)


class NetworkInterpolator:
    """A network (before, after) -> middle, such as RIFE, run pair by pair on sides that it can halve.

    Args:
        network: a module or callable on Tensor[1, 3, H, W] in [0, 1], twice.
        device: where the network is.
        multiple: sides are padded to multiples of this, and the result is cropped.

    Example:
        middle = NetworkInterpolator.from_file("flownet.pkl")(before, after)
    """

    def __init__(self, network: Interpolator, device: str | torch.device = "cpu", multiple: int = 32) -> None:
        self.network, self.device, self.multiple = network, torch.device(device), multiple

    @classmethod
    def from_file(cls, path: str | Path, device: str | torch.device = "cpu", multiple: int = 32) -> NetworkInterpolator:
        """RIFE's weights (its `flownet.pkl`, form HDv3), or any network in a file .pt2 of `torch.export.save`.

        Export it with dynamic sides: `torch.export.export(network, pair, dynamic_shapes=...)`.
        """
        if not Path(path).is_file():
            raise AiluRusError(f"no such file: {path}")
        if Path(path).suffix.lower() != ".pt2":
            return cls(load_rife(path).to(device), device, multiple)
        try:
            network = torch.export.load(str(path)).module().to(device)
        except Exception as error:  # an archive can be wrong in as many ways as its parts
            reason = (str(error).strip().splitlines() or ["unknown reason"])[0]
            raise AiluRusError(f"{path} is no network saved by torch.export.save: {reason}") from error
        return cls(network, device, multiple)

    @torch.no_grad()
    def __call__(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        _check(before, after)
        height, width = before.shape[-2:]
        edges = (0, -width % self.multiple, 0, -height % self.multiple)
        pairs = [pad(x.to(self.device, torch.float32), edges, mode="replicate").split(1) for x in (before, after)]
        middle = torch.cat([self.network(*pair) for pair in zip(*pairs)])
        return middle[..., :height, :width].clamp(0, 1).to(before.device, before.dtype)


def optical_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Motion of each pixel from the first picture to the second: [H, W, 3] in [0, 1] twice to (Δx, Δy), [H, W, 2]."""
    cv2 = require("cv2", "video")
    gray = [cv2.cvtColor((picture * 255).round().astype(np.uint8), cv2.COLOR_RGB2GRAY) for picture in (first, second)]
    height, width = gray[0].shape
    scale = max(1.0, SMALLEST_SIDE / min(height, width))
    if scale > 1:
        size = (round(width * scale), round(height * scale))
        gray = [cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC) for picture in gray]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*gray, None)
    if scale > 1:
        flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA) / scale
    return flow


def warp(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """The picture sampled at each pixel plus its flow: [H, W, C] and [H, W, 2] to [H, W, C]; edges repeat."""
    cv2 = require("cv2", "video")
    y, x = np.indices(flow.shape[:2], dtype=np.float32)
    positions = (x + flow[..., 0]).astype(np.float32), (y + flow[..., 1]).astype(np.float32)
    return cv2.remap(picture, *positions, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def disagreement(flow: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Distance in pixels, [H, W], after following both flows, there and back: large where a pixel is hidden."""
    return np.linalg.norm(flow + warp(back, flow), axis=-1)


def _half_way(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    forth, back = optical_flow(first, second), optical_flow(second, first)
    flow = _flow_of_middle(first, second, forth, back)
    sides = warp(first, -flow / 2), warp(second, flow / 2)
    # A pixel of the middle is hidden on a side whose own flow, at the position it would come from, is another.
    errors = [
        np.linalg.norm(warp(own, position) - whole, axis=-1)
        for own, position, whole in ((forth, -flow / 2, flow), (back, flow / 2, -flow))
    ]
    weights = [1 / (OCCLUSION**2 + error**2) ** 2 for error in errors]
    total = weights[0] + weights[1]
    return sum(side * (weight / total)[..., None] for side, weight in zip(sides, weights)).astype(np.float32)


def _flow_of_middle(first: np.ndarray, second: np.ndarray, forth: np.ndarray, back: np.ndarray) -> np.ndarray:
    """The whole flow, first to second, of each pixel of the middle frame, [H, W, 2]."""
    cv2 = require("cv2", "video")
    height, width = forth.shape[:2]
    y, x = np.indices((height, width))
    arriving, costs, positions = [], [], []
    for picture, other, flow, sign in ((first, second, forth, 1), (second, first, back, -1)):
        column = np.rint(x + flow[..., 0] / 2).astype(int)
        row = np.rint(y + flow[..., 1] / 2).astype(int)
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        arriving.append(sign * flow[inside])
        costs.append(np.abs(picture - warp(other, flow)).sum(-1)[inside])
        positions.append((row * width + column)[inside])
    order = np.argsort(-np.concatenate(costs), kind="stable")  # of equal positions, the last that is written stays
    middle = np.zeros((height * width, 2), np.float32)
    empty = np.ones(height * width, np.uint8)
    position = np.concatenate(positions)[order]
    middle[position] = np.concatenate(arriving)[order]
    empty[position] = 0
    if empty.all():  # everything moves out of the picture: nothing is known of the middle
        return middle.reshape(height, width, 2)
    # labels: of each pixel, the number of its nearest pixel that is not empty.
    _, labels = cv2.distanceTransformWithLabels(
        empty.reshape(height, width), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    flow_of_label = np.zeros((labels.max() + 1, 2), np.float32)
    flow_of_label[labels.reshape(-1)[empty == 0]] = middle[empty == 0]
    filled = flow_of_label[labels]
    return np.stack([cv2.medianBlur(np.ascontiguousarray(filled[..., axis]), 3) for axis in (0, 1)], axis=-1)


def _check(before: torch.Tensor, after: torch.Tensor) -> None:
    if before.ndim != 4 or before.shape[1] != 3 or before.shape != after.shape:
        raise AiluRusError(
            f"frames to interpolate must be two Tensor[B, 3, H, W], got {list(before.shape)} and {list(after.shape)}"
        )
