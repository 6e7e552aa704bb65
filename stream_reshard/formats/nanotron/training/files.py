"""Names of the files of a training state (`optimizer_filename` and `lr_scheduler_filename` in
nanotron/serialize/optimizer.py, `save_random_states` in nanotron/serialize/random.py)."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stream_reshard.model.topology import Topology

OPTIMIZER_FOLDER = "optimizer"
OPTIMIZER_CONFIG_NAME = "optimizer/optimizer_config.json"
SINGLE_SCHEDULER_NAME = "lr_scheduler/lr_scheduler.pt"
"""The only file of the schedule in format 1.2; it holds that of the first stage."""


def has_state(root: Path) -> bool:
    """True for a checkpoint with the state of an optimizer."""
    return os.path.isdir(root / OPTIMIZER_FOLDER)


class StateRank(NamedTuple):
    """Coordinates of an optimizer file. There is no expert parallelism: Nanotron's main cannot start with it."""

    pp: int
    tp: int
    dp: int | None
    """None without ZeRO: all data-parallel ranks hold the same."""


def state_ranks(topology: Topology, zero: int) -> Iterator[StateRank]:
    """The coordinates of every optimizer file. `zero`: stage of ZeRO, 0 or 1."""
    for pp in range(topology.pp):
        for tp in range(topology.tp):
            for dp in range(topology.dp) if zero else (None,):
                yield StateRank(pp, tp, dp)


def optimizer_path(rank: StateRank, topology: Topology) -> str:
    """Path of an optimizer file."""
    replica = "" if rank.dp is None else f"_dp-{rank.dp}-of-{topology.dp}"
    return (f"{OPTIMIZER_FOLDER}/optimizer_pp-{rank.pp}-of-{topology.pp}{replica}_tp-{rank.tp}-of-{topology.tp}"
            f"_exp-0-of-1.pt")


def scheduler_path(pp: int, tp: int, topology: Topology) -> str:
    """Path of a file of the schedule. Its name never has the data-parallel rank: Nanotron compares the number of the
    ZeRO stage with `True` by identity."""
    return f"lr_scheduler/lr_scheduler_pp-{pp}-of-{topology.pp}_tp-{tp}-of-{topology.tp}_exp-0-of-1.pt"


def random_path(tp: int, dp: int, pp: int, topology: Topology) -> str:
    """Path of a file of random states."""
    return f"random/tp-{tp}-of-{topology.tp}_dp-{dp}-of-{topology.dp}_pp-{pp}-of-{topology.pp}.pt"
