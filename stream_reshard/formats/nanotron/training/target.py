"""A training state to be written: the state of a source at another topology."""
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from stream_reshard.formats.layout import SharedFiles
from stream_reshard.formats.nanotron.layout import NanotronLayout
from stream_reshard.formats.nanotron.training.contents import NewOptimizerFile, new_optimizer_file
from stream_reshard.formats.nanotron.training.files import StateRank, optimizer_path, state_ranks
from stream_reshard.formats.nanotron.training.layout import StateLayout, positions_of, shape_at, state_model
from stream_reshard.formats.nanotron.training.source import TrainingState
from stream_reshard.model.topology import Topology


@dataclass(frozen=True)
class NewTrainingState(SharedFiles):
    """The optimizer files of a checkpoint to be written."""

    source: TrainingState
    weights: NanotronLayout
    """The weights to be written."""
    topology: Topology
    zero: int
    """Stage of ZeRO."""
    _files: dict[tuple[int, int | None, int], NewOptimizerFile] = field(default_factory=dict, repr=False)
    """Files by stage, data-parallel rank, and length of the name; other ranks have the same but for their names."""
    _kinds: dict[tuple[object, ...], NewOptimizerFile] = field(default_factory=dict, repr=False)
    """Files by all that they depend on: most data-parallel ranks have the same too."""

    @cached_property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The parameters of each stage in Nanotron's order. A tied embedding comes again as the last parameter of the
        head's stage (nanotron/models/base.py)."""
        positions, order = positions_of(self.weights), self.source.order
        stages = [[name for name in order if self._stage_of(positions[name]) == stage]
                  for stage in range(self.topology.pp)]
        if self.weights.model.config.tie_word_embeddings and (head := self.weights.all_stages["lm_head"]):
            stages[head].append(next(iter(positions)))
        return tuple(map(tuple, stages))

    def _stage_of(self, position: int) -> int:
        return self.weights.stage_of(self.weights.group(position))

    @cached_property
    def layout(self) -> StateLayout:
        """The place of every state."""
        source, positions = self.source.layout, positions_of(self.weights)
        return StateLayout(
            self.weights.root, state_model(self.weights.model, source.kinds), self.weights, self.topology, self.zero,
            source.kinds, tuple(tuple(positions[name] for name in names) for names in self.names),
            {positions[name]: tuple(entry.dtypes.values()) for name, entry in self.source.entries.items()},
            self._begin_of, lambda rank: self.file_of(rank).file.nbytes)

    def _begin_of(self, rank: StateRank, number: int, kind: int) -> int:
        return self.file_of(rank).begins[number * len(self.source.layout.kinds) + kind]

    def file_of(self, rank: StateRank) -> NewOptimizerFile:
        """The file of a rank. Offsets depend on the length of its name, which its records repeat."""
        path = optimizer_path(rank, self.topology)
        key = rank.pp, rank.dp, len(path)
        if (found := self._files.get(key)) is None:
            names, positions = self.names[rank.pp], self._positions
            shapes = tuple([shape_at(self.weights, positions[name], self.topology.dp, rank) for name in names])
            kind = rank.pp, len(path), shapes
            if kind not in self._kinds:
                entries = [(self.source.entries[name], shape) for name, shape in zip(names, shapes)]
                self._kinds[kind] = new_optimizer_file(path, entries, self.source.keys, self.source.layout.kinds)
            found = self._files[key] = self._kinds[kind]
        return found

    @cached_property
    def _positions(self) -> dict[str, int]:
        return positions_of(self.weights)

    @cached_property
    def _ranks(self) -> dict[str, StateRank]:
        return {optimizer_path(rank, self.topology): rank for rank in state_ranks(self.topology, self.zero)}

    def sizes(self) -> Iterator[tuple[str, int]]:
        return ((path, self.file_of(rank).file.nbytes) for path, rank in self._ranks.items())

    def rest_of(self, path: str, crcs: Mapping[int, int]) -> Iterator[tuple[int, bytes]]:
        return self.file_of(self._ranks[path]).renamed(path).rest(crcs)

    @property
    def digest(self) -> str:
        """sha256 of the values of all files, in hex."""
        digest = hashlib.sha256()
        for rank in state_ranks(self.topology, self.zero):
            file = self.file_of(rank)
            digest.update(repr((rank, file.file.before[0][1], list(file.scalars.values()))).encode())
        return digest.hexdigest()
