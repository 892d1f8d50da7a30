"""Numbers as figures: speed-up against loss with its front, and how similar features stay by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import AiluRusError
from ..extras import needs_extra
from .palettes import LINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each line has a mark of its own beside its color.
MARKS = "osD^vPX"


def plot_front(
    losses: Sequence[float],
    speed_ups: Sequence[float],
    front: Sequence[int],
    *,
    labels: Sequence[str] | None = None,
    chosen: int | None = None,
    loss_means: str = "loss",
    title: str = "",
) -> Figure:
    """Speed-up against loss of several settings, those that no other beats in both as a line.

    `Tuned.plot` draws what `autotune` found.

    Args:
        losses, speed_ups: a number for each setting.
        front: the numbers of the settings on the line, in its order.
        labels: each setting in words; those of the front are written beside it.
        chosen: the number of the setting that gets a star.
        loss_means: what a loss is, for the axis.
        title: above the figure.

    Returns:
        A matplotlib figure, which is not shown.

    Raises:
        AiluRusError: as many losses as speed-ups are needed, and matplotlib.

    Example:
        >>> plot_front([0.0, 0.02, 0.03], [1.4, 2.6, 2.1], [0, 1], chosen=1).axes[0].get_ylabel()
        'speed-up'
    """
    if len(losses) != len(speed_ups):
        raise AiluRusError(f"{len(losses)} losses do not go with {len(speed_ups)} speed-ups")
    figure, axes = _figure(title)
    axes.axhline(1, color="#767676", linewidth=0.8, linestyle=":")
    axes.annotate("plain", (0, 1), (3, 3), ("axes fraction", "data"), "offset points", color="#5f5f5f")
    axes.plot([losses[i] for i in front], [speed_ups[i] for i in front], color=LINES[0], zorder=1)
    beaten = [i for i in range(len(losses)) if i not in set(front)]
    axes.scatter([losses[i] for i in beaten], [speed_ups[i] for i in beaten], color="#8c8c8c", s=16, label="beaten")
    axes.scatter([losses[i] for i in front], [speed_ups[i] for i in front], color=LINES[0], s=28, label="front")
    if chosen is not None:
        x, y = losses[chosen], speed_ups[chosen]
        axes.scatter([x], [y], color=LINES[1], marker="*", s=220, edgecolor="white", zorder=3, label="chosen")
    if labels is not None:
        for i in front:
            left = losses[i] <= (min(losses) + max(losses)) / 2
            _name(axes, (losses[i], speed_ups[i]), labels[i], left, bold=i == chosen)
    axes.set(xlabel=loss_means, ylabel="speed-up")
    axes.margins(x=0.1)
    axes.legend(frameon=False, loc="upper left")
    return figure


def plot_similarity(
    similarities: Mapping[str, Sequence[float]], *, location: int | None = None, title: str = ""
) -> Figure:
    """How similar the tokens of a reduced model stay to the plain model's, layer by layer (appendix D).

    Args:
        similarities: by setting, one number for each hidden state, as `reconstruction_similarity` counts them: the
            first is of the embeddings.
        location: after which layer tokens are merged, which is marked.
        title: above the figure, such as the model, N and M.

    Returns:
        A matplotlib figure, which is not shown.

    Raises:
        AiluRusError: nothing to draw, or matplotlib is not there.

    Example:
        >>> figure = plot_similarity({"ward, 2700 to 675": [1.0, 1.0, 0.97, 0.96]}, location=1)
        >>> figure.axes[0].get_xlabel()
        'layer'
    """
    if not similarities:
        raise AiluRusError("plot_similarity needs the similarities of at least one setting")
    figure, axes = _figure(title)
    for i, (name, values) in enumerate(similarities.items()):
        color, mark = LINES[i % len(LINES)], MARKS[i % len(MARKS)]
        axes.plot(range(len(values)), values, label=name, color=color, marker=mark, markersize=4)
    if location is not None:
        axes.axvline(location, color="#767676", linewidth=0.8, linestyle=":")
        axes.annotate("merged", (location, 0), (3, 4), ("data", "axes fraction"), "offset points", color="#5f5f5f")
    axes.set(xlabel="layer", ylabel="cosine to the plain model's tokens")
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    axes.legend(frameon=False, loc="lower left")
    return figure


def _name(axes: Axes, point: tuple[float, float], text: str, left: bool, bold: bool) -> None:
    """Writes beside a point of a line that rises to the right: below it on the left, above it on the right."""
    place, align = ((8, -10), "left") if left else ((-8, 6), "right")
    weight = "bold" if bold else "normal"
    written = axes.annotate(text, point, place, textcoords="offset points", fontsize=8, weight=weight, ha=align)
    written.set_in_layout(False)


def _figure(title: str) -> tuple[Figure, Axes]:
    """An empty figure of this library's look; none of pyplot's, which would keep it."""
    with needs_extra("bench", "A figure"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
