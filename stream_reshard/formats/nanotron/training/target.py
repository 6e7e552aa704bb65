"""A training state to be written: the state of a source at another topology."""
from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from stream_reshard.formats.layout import SharedFiles
from stream_reshard.formats.nanotron.layout import NanotronLayout
from stream_reshard.formats.nanotron.training.contents import NewOptimizerFile, new_optimizer_file
from stream_reshard.formats.nanotron.training.entries import Shape
from stream_reshard.formats.nanotron.training.files import StateRank, optimizer_path, state_ranks
from stream_reshard.formats.nanotron.training.layout import StateLayout, positions_of, shape_at, state_model
from stream_reshard.formats.nanotron.training.source import TrainingState
from stream_reshard.model.topology import Topology


class Places(NamedTuple):
    """Places in an optimizer file to be written."""

    nbytes: int
    """Size of the whole file."""
    begins: array[int]
    """`NewOptimizerFile.begins`."""
    digest: str
    """Of the values in it, states apart."""


@dataclass(frozen=True)
class NewTrainingState(SharedFiles):
    """The optimizer files of a checkpoint to be written."""

    source: TrainingState
    weights: NanotronLayout
    """The weights to be written."""
    topology: Topology
    zero: int
    """Stage of ZeRO."""
    _files: dict[tuple[int, int | None, int], Places] = field(default_factory=dict, repr=False)
    """The places in files by stage, data-parallel rank, and length of the name; other ranks have the same."""
    _kinds: dict[tuple[object, ...], Places] = field(default_factory=dict, repr=False)
    """Places by all that they depend on: most data-parallel ranks have the same too."""

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
            self._begin_of, self._size_of)

    def _begin_of(self, rank: StateRank, number: int, kind: int) -> int:
        return self.places_in(rank).begins[number * len(self.source.layout.kinds) + kind]

    def _size_of(self, rank: StateRank) -> int:
        return self.places_in(rank).nbytes

    def places_in(self, rank: StateRank) -> Places:
        """The places in the file of a rank. Offsets depend on the length of its name, which its records repeat."""
        length = len(optimizer_path(rank, self.topology))
        key = rank.pp, rank.dp, length
        if (found := self._files.get(key)) is None:
            shapes = self._shapes(rank)
            kind = rank.pp, length, shapes
            if kind not in self._kinds:
                made = self.made(rank)
                self._kinds[kind] = Places(made.file.nbytes, made.begins, made.digest)
            found = self._files[key] = self._kinds[kind]
        return found

    def _shapes(self, rank: StateRank) -> tuple[Shape, ...]:
        return tuple([shape_at(self.weights, self._positions[name], self.topology.dp, rank)
                      for name in self.names[rank.pp]])

    def made(self, rank: StateRank) -> NewOptimizerFile:
        """The file of a rank, with all its values."""
        shapes = self._shapes(rank)
        entries = [(self.source.entries[name], shape) for name, shape in zip(self.names[rank.pp], shapes)]
        return new_optimizer_file(optimizer_path(rank, self.topology), entries, self.source.keys,
                                  self.source.layout.kinds, self.source.has_one_group)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return positions_of(self.weights)

    @cached_property
    def _ranks(self) -> dict[str, StateRank]:
        return {optimizer_path(rank, self.topology): rank for rank in state_ranks(self.topology, self.zero)}

    def sizes(self) -> Iterator[tuple[str, int]]:
        return ((path, self.places_in(rank).nbytes) for path, rank in self._ranks.items())

    def rest_of(self, path: str, crcs: Mapping[int, int]) -> Iterator[tuple[int, bytes]]:
        return self.made(self._ranks[path]).rest(crcs)

    @cached_property
    def nbytes_by_kind(self) -> dict[str, int]:
        """Bytes of all states of each kind, with those that several ranks hold."""
        found = dict.fromkeys(self.layout.kinds, 0)
        for group in self.layout.groups():
            for tensor in (tensor for part in self.layout.files_of(group) for tensor in part.tensors):
                found[tensor.key] += tensor.nbytes
        return found

    @property
    def digest(self) -> str:
        """sha256 of the values of all files, in hex."""
        digest = hashlib.sha256()
        for path, rank in self._ranks.items():
            digest.update(f"{path} {self.places_in(rank).digest}\n".encode())
        return digest.hexdigest()
