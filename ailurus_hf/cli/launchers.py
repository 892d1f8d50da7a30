"""Which process this is, of those that a launcher started: accelerate, torchrun, mpirun, srun."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..errors import AiluRusError

# Variables that launchers set: the number of a process, and how many there are. SLURM's are of a step: the batch script
# itself, which no srun started, is one process.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


class Place(NamedTuple):
    """A process among those that a launcher started."""

    rank: int = 0
    size: int = 1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


class LaunchError(AiluRusError, ValueError):
    """The launcher's variables do not fit each other."""


def launched() -> Place:
    """What the launcher's variables say; one process where there are none. Raises LaunchError."""
    for rank, size in LAUNCHERS:
        found = os.environ.get(rank), os.environ.get(size)
        if found[0] is None or found[1] is None:
            continue
        if not (found[0].isdecimal() and found[1].isdecimal() and int(found[0]) < int(found[1])):
            raise LaunchError(f"the launcher's {rank} must be from 0 to {size} - 1, got {found[0]} and {found[1]}")
        return Place(int(found[0]), int(found[1]))
    return Place()
