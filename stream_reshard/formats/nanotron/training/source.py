"""The training state of a Nanotron checkpoint, opened for a conversion.

Every optimizer file is read but for the bytes of its states, and compared with what Nanotron saves for its rank.
"""
from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stream_reshard.errors import Problems, SourceError, UsageError, quoted
from stream_reshard.formats.nanotron.layout import NanotronLayout
from stream_reshard.formats.nanotron.training.documents import WITH_ZERO
from stream_reshard.formats.nanotron.training.entries import (
    NOT_NANOTRONS, Entry, Shape, begins_of, check_values, dtypes_in, entries_of, has_one_group, kinds_of,
    names_in)
from stream_reshard.formats.nanotron.training.files import (
    OPTIMIZER_CONFIG_NAME, OPTIMIZER_FOLDER, SINGLE_SCHEDULER_NAME, StateRank, optimizer_path, random_path,
    scheduler_path, state_ranks)
from stream_reshard.formats.nanotron.training.layout import MASTERS, StateLayout, positions_of, shape_at, state_model
from stream_reshard.model.topology import Topology
from stream_reshard.storage.identity import Identity, identities_of
from stream_reshard.storage.small_files import files_below, is_litter, read_json
from stream_reshard.storage.source_file import SourceFile
from stream_reshard.storage.torch_file import TorchFile, read_torch_file
from stream_reshard.storage.value_tree import tensors_in


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A training state that can be converted."""

    layout: StateLayout
    keys: tuple[str, ...]
    """The keys of an optimizer file, in their order."""
    order: tuple[str, ...]
    """The names of all parameters in Nanotron's order, a tied one once."""
    entries: Mapping[str, Entry]
    """By the name of the parameter."""
    has_one_group: bool
    """All parameters of a stage are in one group, as in release 0.4."""
    names: tuple[tuple[str, ...], ...]
    """Those of each stage, in its order."""
    schedules: tuple[TorchFile, ...]
    """The files of the schedule: one of each stage, or of the first alone in format 1.2."""
    random: Mapping[StateRank, str]
    """Paths of the random states."""
    identities: Mapping[str, Identity]
    """Of all files of the state, by path, each taken before it was read."""

    def groups_of(self, stages: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        """The names of the groups of parameters of each stage, which the lists of a schedule have an entry for: those
        of its parameters, or "" alone."""
        return (("",),) * len(stages) if self.has_one_group else stages

    @property
    def zero(self) -> int:
        """Stage of ZeRO."""
        return self.layout.zero


def open_state(root: Path, weights: NanotronLayout, max_nbytes: int) -> TrainingState:
    """Read all values of the optimizer and the schedule, of at most `max_nbytes` a file. Raises SourceError, Refused,
    or ResourceError."""
    seen = identities_of(root, [OPTIMIZER_CONFIG_NAME])
    topology, zero = _topology(root, weights.rules.topology, max_nbytes)
    paths = {optimizer_path(rank, topology): rank for rank in state_ranks(topology, zero)}
    _check_paths(root, paths)
    reader = _Reader(root, weights, topology, zero, max_nbytes)
    for path, rank in paths.items():
        reader.add(path, rank)
    schedules, more = _schedules(root, topology, max_nbytes)
    return TrainingState(
        layout=reader.layout(), keys=reader.keys, order=reader.order, entries=reader.entries,
        has_one_group=reader.has_one_group, names=tuple(reader.names), schedules=schedules,
        random=_random(root, topology), identities=seen | reader.identities | more)


def _topology(root: Path, weights: Topology, max_nbytes: int) -> tuple[Topology, int]:
    """(topology, stage of ZeRO) in optimizer_config.json; the weights beside it have the same TP and PP."""
    config, where = read_json(root, OPTIMIZER_CONFIG_NAME, max_nbytes), OPTIMIZER_CONFIG_NAME
    sizes, found = config.get("parallelism"), {}
    for axis in ("tp", "pp", "dp", "expert_parallel"):
        size = sizes.get(f"{axis}_size") if isinstance(sizes, dict) else None
        if not (isinstance(size, str) and size.isascii() and size.isdigit() and 0 < int(size) < 2**20):
            raise SourceError(f"{where} names no {axis}_size: {quoted(size)}")
        found[axis] = int(size)
    if found["expert_parallel"] != 1:
        raise UsageError(f"{where}: expert parallelism of {found['expert_parallel']} is not known here, only 1")
    if (found["tp"], found["pp"]) != (weights.tp, weights.pp):
        raise SourceError(f"{where} is of TP={found['tp']} PP={found['pp']}, the weights beside it of TP={weights.tp} "
                          f"PP={weights.pp}: they are not of one checkpoint")
    return Topology(found["tp"], found["pp"], found["dp"]), int(config.get("type") == WITH_ZERO)


def _check_paths(root: Path, expected: Mapping[str, StateRank]) -> None:
    """Raises Refused for missing files, and for files of another topology."""
    found = {f"{OPTIMIZER_FOLDER}/{path}" for path in files_below(root / OPTIMIZER_FOLDER) if not is_litter(path)}
    problems = Problems()
    for path in expected:
        if path not in found:
            problems.append(SourceError(f"{quoted(path)} is missing", kind="files of the optimizer are missing"))
    for path in sorted(found - expected.keys() - {OPTIMIZER_CONFIG_NAME}):
        problems.append(SourceError(f"{quoted(path)} is of no rank that {OPTIMIZER_CONFIG_NAME} names; remove it where "
                                    f"it is stale", kind="files of the optimizer are of no rank"))
    problems.raise_if_any()


class _Reader:
    """Reads optimizer files one after the other, and keeps a few bytes per state."""

    def __init__(self, root: Path, weights: NanotronLayout, topology: Topology, zero: int, max_nbytes: int):
        self.root, self.weights, self.topology, self.zero = root, weights, topology, zero
        self.entries: dict[str, Entry] = {}
        self.identities: dict[str, Identity] = {}
        self.keys: tuple[str, ...] = ()
        self.has_one_group = False
        self._max_nbytes = max_nbytes
        self._kinds: tuple[str, ...] = ()
        self._positions = positions_of(weights)
        self.names: list[tuple[str, ...]] = []
        """The parameters of each stage, in its order."""
        self._begins: dict[StateRank, array[int]] = {}
        self._sizes: dict[StateRank, int] = {}

    @property
    def order(self) -> tuple[str, ...]:
        """All parameters, a tied one once."""
        return tuple(dict.fromkeys(name for names in self.names for name in names))

    def add(self, path: str, rank: StateRank) -> None:
        """Read the file of a rank; that of the first rank of a stage comes first. Raises SourceError."""
        self.identities |= identities_of(self.root, [path])
        file = read_torch_file(self.root, path, self._max_nbytes)
        try:
            self._add(file, rank)
        except ValueError as error:
            raise SourceError(f"{quoted(path)}: {error}", kind=NOT_NANOTRONS) from error

    def _add(self, file: TorchFile, rank: StateRank) -> None:
        if is_first := len(self.names) == rank.pp:
            self.names.append(self._stage_names(file, rank.pp))
        shapes = self._shapes(rank)
        check_values(file, shapes)
        if is_first:
            self._add_entries(file)
        if tuple(file.contents) != self.keys:
            raise ValueError(f"it has the keys {quoted(list(file.contents))}, other files of the optimizer have "
                             f"{quoted(list(self.keys))}")
        for name, dtypes in dtypes_in(file).items():
            if dtypes != self.entries[name].dtypes:
                raise ValueError(f"the states of {quoted(name)} are {quoted(dtypes)}, in other files "
                                 f"{quoted(dict(self.entries[name].dtypes))}")
        self._begins[rank] = array("Q", begins_of(file, shapes, self._kinds))
        self._sizes[rank] = file.nbytes

    def _stage_names(self, file: TorchFile, stage: int) -> tuple[str, ...]:
        """The parameters of a stage, which are those whose weights stand on it, in the file's order."""
        names, config = names_in(file), self.weights.model.config
        expected = {name for name, position in self._positions.items()
                    if self.weights.stage_of(self.weights.group(position)) == stage}
        tied = next(iter(self._positions))
        if config.tie_word_embeddings and stage and stage == self.weights.all_stages["lm_head"]:
            expected.add(tied)
        if names and (odd := sorted(expected ^ set(names))):
            raise ValueError(f"it has {'no' if odd[0] in expected else 'a'} state of {quoted(odd[0])}, which "
                             f"{'stands' if odd[0] in expected else 'does not stand'} on its stage")
        return tuple(names) or tuple(sorted(expected))

    def _shapes(self, rank: StateRank) -> dict[str, Shape]:
        return {name: shape_at(self.weights, self._positions[name], self.topology.dp, rank)
                for name in self.names[rank.pp]}

    def _add_entries(self, file: TorchFile) -> None:
        self.keys = self.keys or tuple(file.contents)
        self.has_one_group = self.has_one_group or has_one_group(file)
        with SourceFile(self.root, file.path, self.identities.get(file.path)) as opened:
            for entry in entries_of(file, opened.read):
                self.entries.setdefault(entry.name, entry)
                self._kinds = self._kinds or kinds_of(entry)
                if kinds_of(entry) != self._kinds:
                    raise ValueError(f"{quoted(entry.name)} has the states {', '.join(kinds_of(entry))}, others have "
                                     f"{', '.join(self._kinds)}")
        if len(dtypes := {entry.dtypes.get(MASTERS) for entry in self.entries.values()}) > 1:
            raise ValueError(f"its masters have the dtypes {', '.join(sorted(map(str, dtypes)))}, and Nanotron keeps "
                             f"all of them in one storage")

    def layout(self) -> StateLayout:
        """The layout of all files that were read."""
        kinds = self._kinds
        return StateLayout(
            self.root, state_model(self.weights.model, kinds), self.weights, self.topology, self.zero, kinds,
            tuple(tuple(self._positions[name] for name in names) for names in self.names),
            {self._positions[name]: tuple(entry.dtypes.values()) for name, entry in self.entries.items()},
            self._begin_of, self._sizes.__getitem__)

    def _begin_of(self, rank: StateRank, index: int, kind: int) -> int:
        return self._begins[rank][index * len(self._kinds) + kind]


def _schedules(root: Path, topology: Topology, max_nbytes: int) -> tuple[tuple[TorchFile, ...], dict[str, Identity]]:
    """The files of the schedule of each stage, and identities of their files. Raises SourceError."""
    paths = [scheduler_path(pp, 0, topology) for pp in range(topology.pp)]
    if not os.path.lexists(root / paths[0]) and os.path.lexists(root / SINGLE_SCHEDULER_NAME):
        paths = [SINGLE_SCHEDULER_NAME]
    seen = identities_of(root, paths)
    files = tuple(read_torch_file(root, path, max_nbytes) for path in paths)
    for file in files:
        if any(tensors_in(file.contents)):
            raise SourceError(f"{quoted(file.path)} holds tensors, where a schedule has numbers; --weights-only goes "
                              f"without the training", kind=NOT_NANOTRONS)
    return files, seen


def _random(root: Path, topology: Topology) -> dict[StateRank, str]:
    """Paths of the random states that are there."""
    paths = {rank: random_path(rank.tp, rank.dp or 0, rank.pp, topology) for rank in state_ranks(topology, 1)}
    return {rank: path for rank, path in paths.items() if os.path.isfile(root / path)}
