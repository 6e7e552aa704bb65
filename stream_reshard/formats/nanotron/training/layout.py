"""The place of every state of a training in the optimizer files of one checkpoint.

A training state is a model with a row per kind of state in the place of each row of weights: `exp_avg:layers.3.mlp.up`
is the moment of that weight, and is cut as the weight is. A group is one Nanotron parameter with all kinds. Its states
lie in files that hold those of all other parameters of a stage too, so a group has parts of files.

With ZeRO a file holds a stretch of a flattened shard. Its tensor is described as the whole shard, which begins before
the stretch by as much as the stretch begins behind the first element: so places in shards are places in files.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from stream_reshard.formats.layout import Fill, Group, Layout, Slice
from stream_reshard.formats.nanotron.layout import NanotronLayout, repeats
from stream_reshard.formats.nanotron.ranks import RankFile, RankPart
from stream_reshard.formats.nanotron.training.files import StateRank, optimizer_path, state_ranks
from stream_reshard.formats.nanotron.training.zero import padding_in, regions_in, stretch_of
from stream_reshard.model.box import Box
from stream_reshard.model.parameters import Model
from stream_reshard.model.topology import Topology
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.shared_file import FilePart

MASTERS = "gradient_accumulator"
"""The kind of the fp32 masters: the key under which an optimizer file holds them."""


_MAX_KNOWN = 8
"""Groups of which facts are kept: those of the jobs under way."""


def state_model(model: Model, kinds: tuple[str, ...]) -> Model:
    """The states of all kinds as a model: a row per kind and stored row of weights, kind by kind."""
    rows = [model.rows[row] for row in model.stored_rows]
    return Model(model.config, tuple(replace(row, parameter=f"{kind}:{row.parameter}") for kind in kinds
                                     for row in rows))


class Place(NamedTuple):
    """A copy of a parameter's states in the files of one stage."""

    stage: int
    number: int
    """Position among the parameters of the stage, by which Nanotron matches states to parameters."""


class Holder(NamedTuple):
    """Part of the states of a parameter in one file."""

    place: Place
    rank: StateRank
    start: int
    """First element of the flattened shard that the file holds."""
    stop: int
    is_copy: bool
    """Another file holds the same."""


class _Known(NamedTuple):
    """Facts about a group."""

    weights: Group
    ranks: tuple[RankFile, ...]
    shape: tuple[int, ...]
    """Of a rank's shard."""
    holders: tuple[Holder, ...]


def positions_of(weights: NanotronLayout) -> dict[str, int]:
    """The position of each group by the name of its parameter in optimizer files; the embedding's comes first."""
    return {f"model.{weights.model.parameter(group.numbers[0]).nanotron}": group.position
            for group in weights.groups()}


def shape_at(weights: NanotronLayout, position: int, num_replicas: int, rank: StateRank) -> tuple[int, ...] | None:
    """Shape of the states of a group in the file of a rank: that of its shard, or with ZeRO a flat one; None where the
    rank has none of them."""
    tensor = weights.ranks_of(weights.group(position))[0].file.tensors[0]
    if rank.dp is None:
        return tensor.shape
    start, stop = stretch_of(math.prod(tensor.shape), num_replicas, rank.dp)
    return (stop - start,) if start < stop else None


@dataclass(frozen=True, eq=False)
class StateLayout(Layout):
    """The optimizer files of a checkpoint."""

    format = "Nanotron training state"
    file_word = "file"
    weights: NanotronLayout
    """The weights at the same topology."""
    topology: Topology
    zero: int
    """Stage of ZeRO: 1 if each data-parallel rank keeps a part of each state, else 0."""
    kinds: tuple[str, ...]
    """Kinds of state, masters last."""
    stages: tuple[tuple[int, ...], ...]
    """The groups of each stage by their positions among the groups of weights, in the order of the stage's parameters.
    A tied embedding is in two stages where there are several."""
    dtypes: Mapping[int, tuple[str, ...]]
    """The safetensors dtype per kind, by the position of a group."""
    begins: Callable[[StateRank, int, int], int]
    """Offset in a file of a state: (rank, index of the parameter in its stage, index of the kind), in bytes."""
    sizes: Callable[[StateRank], int]
    """Size of a file, in bytes."""
    _known: dict[int, _Known] = field(default_factory=dict, repr=False)
    """Facts about the groups that were asked for last, by their positions."""

    @cached_property
    def places(self) -> dict[int, tuple[Place, ...]]:
        """The places of each group's states, by its position; the first is the one that is read."""
        found: dict[int, tuple[Place, ...]] = {}
        for stage, positions in enumerate(self.stages):
            for index, position in enumerate(positions):
                found[position] = (*found.get(position, ()), Place(stage, index))
        return found

    @cached_property
    def _num_each(self) -> int:
        """Number of parameters of each kind."""
        return self.model.firsts[-1] // len(self.kinds)

    def _split(self, number: int) -> tuple[int, int]:
        """(index of the kind, number of the weight) of a parameter."""
        return divmod(number, self._num_each)

    @property
    def num_groups(self) -> int:
        return self.weights.num_groups

    def group(self, position: int) -> Group:
        weights = self._known_of(position).weights
        numbers = tuple(kind * self._num_each + number for kind in range(len(self.kinds))
                        for number in weights.numbers)
        places = self.places[position]
        return Group(position, (weights.storage_class, self.dtypes[position], len(places)), numbers)

    def shape_of(self, position: int) -> tuple[int, ...]:
        """Shape of a rank's shard of a group, before it is cut by ZeRO."""
        return self._known_of(position).shape

    def holders_of(self, position: int) -> tuple[Holder, ...]:
        """The parts of a group's states, each in one file, for every kind alike. Those that hold each element once come
        first."""
        return self._known_of(position).holders

    def _known_of(self, position: int) -> _Known:
        if (found := self._known.get(position)) is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            weights = self.weights.group(position)
            ranks = self.weights.ranks_of(weights)
            shape = ranks[0].file.tensors[0].shape
            holders = sorted(self._held(position, math.prod(shape), len(ranks) > 1), key=lambda holder: holder.is_copy)
            found = self._known[position] = _Known(weights, ranks, shape, tuple(holders))
        return found

    def _held(self, position: int, num_elements: int, is_split: bool) -> Iterator[Holder]:
        topology = self.topology
        for place in self.places[position]:
            is_first = place is self.places[position][0]
            for tp in range(topology.tp):
                is_copy = not is_first or (tp > 0 and not is_split)
                if not self.zero:
                    yield Holder(place, StateRank(place.stage, tp, None), 0, num_elements, is_copy)
                    continue
                for dp in range(topology.dp):
                    start, stop = stretch_of(num_elements, topology.dp, dp)
                    if start < stop:
                        yield Holder(place, StateRank(place.stage, tp, dp), start, stop, is_copy)

    def _tensor(self, holder: Holder, position: int, kind: int) -> StoredTensor:
        dtype = self.dtypes[position][kind]
        tensor = StoredTensor(optimizer_path(holder.rank, self.topology), self.kinds[kind], dtype,
                              self.shape_of(position), self.begins(holder.rank, holder.place.number, kind))
        return replace(tensor, begin=tensor.begin - holder.start * tensor.itemsize)

    def _parts_of(self, number: int, copies: bool) -> Iterator[tuple[Holder, StoredTensor, RankPart]]:
        """(holder, tensor, part of the parameter in its shard), of the first holders or of the copies."""
        kind, weight = self._split(number)
        position = self.weights.position_of(weight)
        known = self._known_of(position)
        i = known.weights.numbers.index(weight)
        for holder in known.holders:
            if holder.is_copy == copies:
                rank = known.ranks[holder.rank.tp if len(known.ranks) > 1 else 0]
                yield holder, self._tensor(holder, position, kind), rank.parts[i]

    def slices_of(self, number: int) -> tuple[Slice, ...]:
        return tuple(part for _, part in self._held_slices(number, False))

    def copies_of(self, number: int) -> tuple[Slice, ...]:
        return tuple(part for _, part in self._held_slices(number, True)) + tuple(self._repeats(number))

    def _repeats(self, number: int) -> Iterator[Slice]:
        """Slices that fill new rows of padding with a trained one."""
        if (row := self.weights.rules.pad_row) is not None:
            name = self.model.parameter(number).name
            for tensor, place in self._padding_of(number):
                yield from repeats(name, tensor, place, row)

    def _padding_of(self, number: int) -> Iterator[tuple[StoredTensor, Box]]:
        for copies in (False, True):
            for holder, tensor, part in self._parts_of(number, copies):
                for place in padding_in(part, tensor.shape, holder.start, holder.stop):
                    yield tensor, place

    def _held_slices(self, number: int, copies: bool) -> Iterator[tuple[Holder, Slice]]:
        name = self.model.parameter(number).name
        for holder, tensor, part in self._parts_of(number, copies):
            if not part.region.num_elements:
                continue
            if holder.stop - holder.start == math.prod(tensor.shape):
                yield holder, Slice(name, part.region, tensor, part.place, part.order)
                continue
            for region, place in regions_in(part, tensor.shape, holder.start, holder.stop):
                yield holder, Slice(name, region, tensor, place, part.order)

    def fills_of(self, number: int) -> tuple[Fill, ...]:
        if self.weights.rules.pad_row is not None:
            return ()
        return tuple(Fill(tensor, place) for tensor, place in self._padding_of(number))

    def dtype_at(self, number: int) -> str:
        kind, weight = self._split(number)
        return self.dtypes[self.weights.position_of(weight)][kind]

    def storage_class(self, number: int) -> Hashable:
        kind, weight = self._split(number)
        return kind, self.group(self.weights.position_of(weight)).storage_class

    def locations_of(self, number: int) -> tuple[tuple[int, int], ...]:
        """The tensor of a stretch begins where its shard would, perhaps before the file."""
        return tuple((self._file_index(holder.rank), part.tensor.begin)
                     for holder, part in self._held_slices(number, False))

    def _file_index(self, rank: StateRank) -> int:
        num_dp = self.topology.dp if self.zero else 1
        return (rank.pp * self.topology.tp + rank.tp) * num_dp + (rank.dp or 0)

    @property
    def masters(self) -> StateLayout:
        """The fp32 masters in the place of the weights, as parameters of the model itself."""
        last = len(self.kinds) - 1
        return replace(self, model=self.weights.model, kinds=(MASTERS,),
                       dtypes={position: (names[last],) for position, names in self.dtypes.items()},
                       begins=self._begin_of_master, _known={})

    def _begin_of_master(self, rank: StateRank, number: int, kind: int) -> int:
        return self.begins(rank, number, len(self.kinds) - 1)

    def files_of(self, group: Group) -> tuple[FilePart, ...]:
        """The part of each file that the group's states take."""
        return tuple(self._file_part(holder, group.position) for holder in self.holders_of(group.position))

    def _file_part(self, holder: Holder, position: int) -> FilePart:
        num_elements = holder.stop - holder.start
        path = optimizer_path(holder.rank, self.topology)
        tensors = [StoredTensor(path, name, self.dtypes[position][kind], (num_elements,),
                                self.begins(holder.rank, holder.place.number, kind))
                   for kind, name in enumerate(self.kinds)]
        tensors.sort(key=lambda tensor: tensor.begin)
        return FilePart(path, tuple(tensors), (), self.sizes(holder.rank))

    def paths_of(self, group: Group) -> list[str]:
        return [optimizer_path(holder.rank, self.topology) for holder in self.holders_of(group.position)]

    @property
    def paths(self) -> Iterator[str]:
        return (optimizer_path(rank, self.topology) for rank in self.ranks())

    def ranks(self) -> Iterator[StateRank]:
        """The coordinates of every file."""
        return state_ranks(self.topology, self.zero)

    @property
    def most_files(self) -> int:
        return max(len(places) for places in self.places.values()) * self.topology.tp * (
            self.topology.dp if self.zero else 1)

    @property
    def num_files(self) -> int:
        return self.topology.tp * self.topology.pp * (self.topology.dp if self.zero else 1)

    @property
    def nbytes(self) -> int:
        return sum(map(self.sizes, self.ranks()))
