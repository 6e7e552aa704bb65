"""Names of the files of a training state that a folder holds, and words for messages about them."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stream_reshard.errors import quoted
from stream_reshard.formats.nanotron.names import is_of_training
from stream_reshard.formats.nanotron.training.files import OPTIMIZER_FOLDER, random_path, state_ranks
from stream_reshard.model.topology import Topology
from stream_reshard.storage.small_files import files_below

OPTIMIZER, SCHEDULE, RANDOM = OPTIMIZER_FOLDER, "lr_scheduler", "random"
"""Folders of a training state."""


def word(key: object) -> str:
    """A key from a file, for a message: in quotes where it is no plain word."""
    return str(key) if str(key).isascii() and str(key).isidentifier() else quoted(key)


def state_paths(root: Path) -> list[str]:
    """Paths of the files of a training state, of whatever topology; nobody reads other files in its folders."""
    paths = (f"{folder}/{path}" for folder in (OPTIMIZER, SCHEDULE, RANDOM) for path in files_below(root / folder))
    return list(filter(is_of_training, paths))


def random_paths(topology: Topology) -> Iterator[str]:
    """Paths of the states of the random generators, one per process."""
    for rank in state_ranks(topology, 1):
        yield random_path(rank.tp, rank.dp or 0, rank.pp, topology)
