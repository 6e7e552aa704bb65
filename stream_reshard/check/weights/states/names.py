"""Names of the files of a training state (`optimizer_filename` and `lr_scheduler_filename`, nanotron/serialize/
optimizer.py; nanotron/serialize/random.py). Experts are never split over ranks here, so `exp` is always 0 of 1."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stream_reshard.errors import quoted
from stream_reshard.formats.nanotron.names import is_of_training
from stream_reshard.model.topology import Topology
from stream_reshard.storage.small_files import files_below

OPTIMIZER, SCHEDULE, RANDOM = "optimizer", "lr_scheduler", "random"
"""Folders of a training state."""

OPTIMIZER_CONFIG = "optimizer/optimizer_config.json"

SINGLE_SCHEDULE = "lr_scheduler/lr_scheduler.pt"
"""The one file of the schedule in format 1.2, which describes the first stage."""


def word(key: object) -> str:
    """A key from a file, for a message: in quotes where it is no plain word."""
    return str(key) if str(key).isascii() and str(key).isidentifier() else quoted(key)


def state_paths(root: Path) -> list[str]:
    """Paths of the files of a training state, of whatever topology; nobody reads other files in its folders."""
    paths = (f"{folder}/{path}" for folder in (OPTIMIZER, SCHEDULE, RANDOM) for path in files_below(root / folder))
    return list(filter(is_of_training, paths))


def optimizer_path(topology: Topology, zero: bool, pp: int, dp: int, tp: int) -> str:
    """Path of the optimizer's file of one rank; without ZeRO data-parallel ranks share one."""
    replica = f"_dp-{dp}-of-{topology.dp}" if zero else ""
    return f"optimizer/optimizer_pp-{pp}-of-{topology.pp}{replica}_tp-{tp}-of-{topology.tp}_exp-0-of-1.pt"


def schedule_path(topology: Topology, pp: int, tp: int) -> str:
    """Path of the schedule of one rank. Data-parallel ranks share one, also with ZeRO-1."""
    return f"lr_scheduler/lr_scheduler_pp-{pp}-of-{topology.pp}_tp-{tp}-of-{topology.tp}_exp-0-of-1.pt"


def random_paths(topology: Topology) -> Iterator[str]:
    """Paths of the states of the random generators, one per process."""
    for tp in range(topology.tp):
        for dp in range(topology.dp):
            for pp in range(topology.pp):
                yield f"random/tp-{tp}-of-{topology.tp}_dp-{dp}-of-{topology.dp}_pp-{pp}-of-{topology.pp}.pt"
