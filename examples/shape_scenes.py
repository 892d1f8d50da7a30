"""Captioned pictures of colored shapes, made from random numbers, and the rules that read such a picture again.

    scene = random_scene(np.random.default_rng(0))
    picture, mask = draw(scene)     # scene.caption: "large red circle left and small blue ring right on pink stripes"
    read(picture, scene)            # which facts of the caption the picture shows

Used by train_text_to_image.py, and by the benchmark that asks what token reduction does to its pictures.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 128
COLORS = {
    "red": (215, 40, 40),
    "green": (40, 165, 55),
    "blue": (40, 75, 220),
    "yellow": (245, 215, 30),
    "purple": (145, 50, 190),
    "white": (245, 245, 245),
}
GROUNDS = {"gray": (135, 135, 135), "pink": (235, 150, 190), "brown": (120, 75, 45), "teal": (95, 185, 195)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PATTERNS = ("paper", "gradient", "stripes", "checks", "dots")
# Radius in pixels, least and most.
SIZES = {"small": (14, 17), "large": (25, 28)}
POSITIONS = {"left": (32, 64), "right": (96, 64), "top": (64, 32), "bottom": (64, 96), "middle": (64, 64)}
PAIRS = (("left", "right"), ("top", "bottom"))
WANDER, PERIOD = 4, 16
WORDS = (*COLORS, *GROUNDS, *SHAPES, *PATTERNS, *SIZES, *POSITIONS, "and", "on")


@dataclass(frozen=True)
class Thing:
    """One shape. x, y, radius: in pixels."""

    shape: str
    color: str
    size: str
    position: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two things on a patterned ground. phase: where the pattern starts, in pixels."""

    things: tuple[Thing, ...]
    ground: str
    pattern: str
    phase: tuple[float, float]

    @property
    def caption(self) -> str:
        things = " and ".join(f"{t.size} {t.color} {t.shape} {t.position}" for t in self.things)
        return f"{things} on {self.ground} {self.pattern}"


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of one or two things of different colors."""
    if rng.random() < 0.5:
        positions = [str(rng.choice(list(POSITIONS)))]
    else:
        positions = list(PAIRS[rng.integers(len(PAIRS))])
    colors = rng.choice(list(COLORS), len(positions), replace=False)
    things = []
    for position, color in zip(positions, colors, strict=True):
        size = str(rng.choice(list(SIZES)))
        x, y = (center + rng.uniform(-WANDER, WANDER) for center in POSITIONS[position])
        things.append(Thing(str(rng.choice(SHAPES)), str(color), size, position, x, y, rng.uniform(*SIZES[size])))
    phase = (rng.uniform(0, PERIOD), rng.uniform(0, PERIOD))
    return Scene(tuple(things), str(rng.choice(list(GROUNDS))), str(rng.choice(PATTERNS)), phase)


def distance_to(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Pixels to the edge of a shape around the origin, negative inside."""
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - radius
    if shape == "ring":
        return ((x.square() + y.square()).sqrt() - 0.75 * radius).abs() - 0.25 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.85 * radius
    if shape == "cross":
        wide, narrow = radius, 0.33 * radius
        across = torch.maximum(x.abs() - wide, y.abs() - narrow)
        return torch.minimum(across, torch.maximum(x.abs() - narrow, y.abs() - wide))
    if shape == "triangle":
        side = math.sqrt(3) / 2
        return torch.maximum(y, side * x.abs() - y / 2) - 0.58 * radius
    raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")


def pixels(side: int) -> tuple[Tensor, Tensor]:
    """x and y of the middle of every pixel of a picture of SIDE, drawn `side` pixels wide: Tensor[side, side] each."""
    middle = (torch.arange(side) + 0.5) * (SIDE / side)
    return middle[None, :].expand(side, side), middle[:, None].expand(side, side)


def draw(scene: Scene, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """The picture, Tensor[3, side, side] from 0 to 1, and where its things are, BoolTensor[side, side]."""
    x, y = pixels(side)
    color = lambda values: torch.tensor(values, dtype=torch.float32)[:, None, None] / 255  # noqa: E731
    picture = color(GROUNDS[scene.ground]) * brightness(scene.pattern, x + scene.phase[0], y + scene.phase[1], y)
    mask = torch.zeros(side, side, dtype=torch.bool)
    for thing in scene.things:
        right, down = x - thing.x, y - thing.y
        distance = distance_to(thing.shape, right, down, thing.radius)
        cover = (0.5 - distance * side / SIDE).clamp(0, 1)
        # Lit from the left above.
        shade = 1 - 0.1 * (right + down) / thing.radius
        picture = picture + cover * (color(COLORS[thing.color]) * shade - picture)
        mask |= distance < 0
    return picture.clamp(0, 1), mask


def brightness(pattern: str, x: Tensor, y: Tensor, height: Tensor) -> Tensor:
    """What the color of a ground is multiplied with."""
    first, second = (x % PERIOD < PERIOD / 2), (y % PERIOD < PERIOD / 2)
    if pattern == "gradient":
        return 0.8 + 0.35 * height / SIDE
    if pattern == "stripes":
        light = first
    elif pattern == "checks":
        light = first ^ second
    elif pattern == "dots":
        light = (x % PERIOD - PERIOD / 2).square() + (y % PERIOD - PERIOD / 2).square() < (PERIOD / 4) ** 2
    else:
        light = torch.ones_like(x, dtype=torch.bool)
    return torch.where(light, 1.08, 0.85)


def edges(mask: Tensor) -> Tensor:
    """Pixels of BoolTensor[..., H, W] whose right or lower neighbor is on the other side; what ControlNet is told."""
    found = torch.zeros_like(mask)
    found[..., :, :-1] |= mask[..., :, 1:] ^ mask[..., :, :-1]
    found[..., :-1, :] |= mask[..., 1:, :] ^ mask[..., :-1, :]
    return found


def color_names(picture: Tensor) -> Tensor:
    """The nearest color of every pixel of Tensor[3, H, W]: LongTensor[H, W], things' colors first, then grounds'."""
    # A ground's color is as light or dark as its pattern makes it.
    shades = [torch.tensor(value) * factor for value in GROUNDS.values() for factor in (0.85, 1.0, 1.1)]
    known = torch.cat([torch.tensor(list(COLORS.values())).float(), torch.stack(shades)]) / 255
    nearest = torch.cdist(picture.flatten(1).T.float(), known).argmin(1).view(picture.shape[1:])
    grounds = len(COLORS) + (nearest - len(COLORS)) // 3
    return torch.where(nearest < len(COLORS), nearest, grounds)


def things_in(picture: Tensor) -> Tensor:
    """Pixels of Tensor[3, H, W] whose color is that of things: BoolTensor[H, W]."""
    return color_names(picture) < len(COLORS)


def read(picture: Tensor, scene: Scene) -> dict[str, bool]:
    """Which facts of the scene's caption Tensor[3, H, W], from 0 to 1, shows.

    Color: the one with most pixels, of those that things have, around the position that the caption names. Shape: the
    one that overlaps most with these pixels when drawn with their area around their center; size: by its radius.
    Without enough pixels of the right color no fact of a thing is true. Ground: the commonest of the grounds' colors.
    """
    names = color_names(picture)
    counts = torch.bincount(names.flatten(), minlength=len(COLORS) + len(GROUNDS))
    facts = {"ground": list(GROUNDS)[counts[len(COLORS) :].argmax()] == scene.ground}
    x, y = pixels(picture.shape[-1])
    for number, thing in enumerate(scene.things):
        center, reach = POSITIONS[thing.position], SIZES["large"][1] + WANDER
        near = torch.maximum((x - center[0]).abs(), (y - center[1]).abs()) <= reach
        counts = torch.bincount(names[near], minlength=len(COLORS))[: len(COLORS)]
        mask = (names == list(COLORS).index(thing.color)) & near
        area = mask.sum().item() * (SIDE / picture.shape[-1]) ** 2
        shape, radius = best_shape(mask)
        seen = area > 60 and list(COLORS)[counts.argmax()] == thing.color
        middle = sum(a + b for a, b in zip(SIZES["small"], SIZES["large"], strict=True)) / 4
        facts[f"color {number}"] = seen
        facts[f"shape {number}"] = seen and shape == thing.shape
        facts[f"size {number}"] = seen and (radius > middle) == (thing.size == "large")
    return facts


def best_shape(mask: Tensor) -> tuple[str, float]:
    """The shape, and its radius in pixels of SIDE, that overlaps most with BoolTensor[H, W]."""
    if not mask.any():
        return "", 0.0
    x, y = pixels(mask.shape[-1])
    right, down = x - x[mask].mean(), y - y[mask].mean()
    area = mask.sum().item() * (SIDE / mask.shape[-1]) ** 2
    overlaps = {}
    for shape in SHAPES:
        radius = math.sqrt(area / unit_area(shape))
        drawn = distance_to(shape, right, down, radius) < 0
        overlaps[shape] = ((drawn & mask).sum() / (drawn | mask).sum()).item(), radius
    best = max(overlaps, key=lambda shape: overlaps[shape][0])
    return best, overlaps[best][1]


def unit_area(shape: str) -> float:
    """Area of a shape of radius 1."""
    return {
        "circle": math.pi,
        "square": 1.7**2,
        "triangle": 0.58**2 * 3 * math.sqrt(3),
        "cross": 4 * 0.66 - 0.66**2,
        "ring": 0.75 * math.pi,
    }[shape]


def edge_adherence(picture: Tensor, wanted: Tensor, reach: int = 2) -> float:
    """F1 of the edges of a picture's things and those wanted, BoolTensor[H, W], up to `reach` pixels apart."""
    wide = lambda lines: F.max_pool2d(lines[None].float(), 2 * reach + 1, 1, reach)[0] > 0  # noqa: E731
    found = edges(things_in(picture))
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision = (found & wide(wanted)).sum() / found.sum()
    recall = (wanted & wide(found)).sum() / wanted.sum()
    return (2 * precision * recall / (precision + recall).clamp(min=1e-6)).item()
