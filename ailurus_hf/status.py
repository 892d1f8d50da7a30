"""What token reduction did: a Record filled during forwards, and the Status table that `ailurus_status` prints."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch

from .clusters import TokenClusters


@dataclass
class Record:
    """Filled by the hooks of one encoder at one location. Compiled graphs leave it as it is: counting in them would
    recompile them.

    attended: images whose keys a token takes in self-attention; more than 1 in cross-frame attention.
    sizes: how many forwards there were of each N and M; again: how many of those on all N ran on M, too.
    """

    forwards: int = 0
    clusterings: int = 0
    last_tokens: int | None = None
    last_clusters_count: int | None = None
    last_clusters: TokenClusters | None = None
    last_grid: tuple[int, ...] | None = None
    attended: int = 1
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    again: Counter[tuple[int, int]] = field(default_factory=Counter)

    def reduced(
        self,
        num_tokens: int,
        num_clusters: int,
        clusters: TokenClusters,
        grid: tuple[int, ...],
        clustered: bool = True,
    ) -> None:
        """clustered: whether it was clustered here, or the clusters of another location or step were taken."""
        if torch.compiler.is_compiling():
            return
        self.forwards += 1
        self.clusterings += clustered
        self.sizes[num_tokens, num_clusters] += 1
        self.last_tokens, self.last_clusters_count = num_tokens, num_clusters
        self.last_clusters, self.last_grid = clusters, grid

    def ran_again(self, num_tokens: int, num_clusters: int) -> None:
        """What ran on all tokens ran on clusters, too."""
        self.again[num_tokens, num_clusters] += 1

    def skipped(self, num_tokens: int) -> None:
        """Its blocks did not run."""
        self.forwards += 1
        self.sizes[num_tokens, 0] += 1
        self.last_tokens, self.last_clusters_count = num_tokens, 0
        self.last_clusters = self.last_grid = None

    def unreduced(self, num_tokens: int) -> None:
        if torch.compiler.is_compiling():
            return
        self.forwards += 1
        self.sizes[num_tokens, num_tokens] += 1
        self.last_tokens = self.last_clusters_count = num_tokens
        self.last_clusters = self.last_grid = None

    def location_status(
        self, where: str, location: int, restored: str, flops: float | None, reduced_flops: float | None
    ) -> LocationStatus:
        """This record as a row of the table."""
        return LocationStatus(
            where,
            location,
            restored,
            self.last_tokens,
            self.last_clusters_count,
            self.forwards,
            self.clusterings,
            flops,
            reduced_flops,
        )


@dataclass(frozen=True)
class LocationStatus:
    """One location where tokens are reduced, and what the last forward did there.

    where: the encoder's class; location: L; restored: where all tokens are back.
    num_tokens, num_clusters: N (M of the location before, where there is one) and M of the last forward, None before
    the first. M is 0 in a step between two full ones in which nothing runs.
    forwards, clusterings: counts since it was switched on (compiled forwards are not counted).
    flops, reduced_flops: of the transformer layers for one image, without and with reduction, up to the encoder's next
        location; at its first one also of those that run on all tokens. None before the first forward. Of the last
        forward; in a diffusion network with `full_every` or `step_factors` the mean of all forwards, which differ.
    """

    where: str
    location: int
    restored: str
    num_tokens: int | None
    num_clusters: int | None
    forwards: int
    clusterings: int
    flops: float | None
    reduced_flops: float | None

    @property
    def flops_saved(self) -> float | None:
        """Share of the layers' FLOPs that is saved, 0 to 1."""
        if self.flops is None or self.reduced_flops is None:
            return None
        return 1 - self.reduced_flops / self.flops


@dataclass(frozen=True)
class Status:
    """What is on and what it did; `str()` is a table, `to_dict()` its JSON. No locations: nothing is on.

    settings_are_off: whether the target was saved with settings that nothing has switched on.
    """

    model: str
    config: dict[str, Any] | None = None
    locations: list[LocationStatus] = field(default_factory=list)
    last_clusters: TokenClusters | None = None
    last_grid: tuple[int, ...] | None = None
    settings_are_off: bool = False

    @property
    def active(self) -> bool:
        return bool(self.locations)

    @property
    def saved_flops(self) -> float:
        """FLOPs that the last forward saved for one image, at all locations; 0 before the first."""
        return sum((row.flops or 0.0) - (row.reduced_flops or 0.0) for row in self.locations)

    def to_dict(self) -> dict[str, Any]:
        locations = [{**dataclasses.asdict(row), "flops_saved": row.flops_saved} for row in self.locations]
        return {"model": self.model, "active": self.active, "config": self.config, "locations": locations}

    def _rows(self) -> list[tuple[str, ...]]:
        """The table, its heads first."""
        rows: list[tuple[str, ...]] = [("where", "location", "tokens", "restored", "clustered", "FLOPs saved")]
        for location in self.locations:
            saved = location.flops_saved
            rows.append(
                (
                    location.where,
                    str(location.location),
                    "no forward yet"
                    if location.num_tokens is None
                    else f"{location.num_tokens} → {location.num_clusters}",
                    location.restored,
                    f"{location.clusterings} of {location.forwards} forwards",
                    "–" if saved is None else f"{saved:.0%}",
                )
            )
        return rows

    def __str__(self) -> str:
        if not self.active:
            hint = (
                "; it was saved with settings: apply_ailurus(model) switches them on" if self.settings_are_off else ""
            )
            return f"{self.model}: AiluRus is off{hint}"
        rows = self._rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{self.model}: AiluRus is on", *lines])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """The table, as notebooks show it."""
        if not self.active:
            return f"<p>{escape(str(self))}</p>"
        head, *rows = [[escape(cell) for cell in row] for row in self._rows()]
        lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
        return f"<p>{escape(self.model)}: AiluRus is on</p><table>{''.join(lines)}</table>"
