"""The Nanotron layout: one file per parameter and rank.

A group is one Nanotron parameter: the model's parameters fused in it, and its rank files. Groups of one kind differ by
layer, that is by folder and stage, so the contents of the rank files are derived once per kind and dtype.
"""
from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from stream_reshard.formats.layout import Fill, Group, Layout, Slice
from stream_reshard.formats.nanotron.ranks import RankFile, RankPart, rank_files
from stream_reshard.formats.nanotron.rules import NanotronRules, stages_of
from stream_reshard.model.box import Box
from stream_reshard.model.names import fields_of
from stream_reshard.storage.header import StoredTensor, TensorFile, placed


@dataclass(frozen=True)
class _Kind:
    """The Nanotron parameters of one name in the architecture table: one, or one per layer. Each is a group."""

    path: str
    """Beginning of the paths of the files; `{layer}` is the index of the layer."""
    rows: tuple[int, ...]
    """The rows of the table fused in each group."""
    firsts: tuple[int, ...]
    """Number of the first parameter of each row."""
    num_each: tuple[int, ...]
    """Count of parameters of each row in one group: more than one where experts are stacked."""
    stages: array[int]
    """The stage of each group."""


@dataclass(frozen=True, eq=False)
class NanotronLayout(Layout):
    """The layout that Nanotron saves: the same files, header fields and places.

    The model must fit the topology (`topology_problems`).
    """

    format = "Nanotron"
    file_word = "file"
    rules: NanotronRules
    dtypes: Callable[[int], str]
    """The safetensors dtype of each parameter, by its number; fused parameters must agree."""
    begins: Callable[[Group], Sequence[int]] | None = None
    """Offset of the data in each file of a group, in bytes; None for the shortest headers."""
    stages: Mapping[str, int] | None = None
    """The stage of each pipeline block in an existing checkpoint; None for Nanotron's own balancing."""
    _ranks: dict[Hashable, tuple[RankFile, ...]] = field(default_factory=dict, repr=False)
    """Rank files by storage class of a group."""
    _suffixes: dict[tuple[int, int], list[str]] = field(default_factory=dict, repr=False)
    """Ends of the rank files' paths, by (index of the kind, stage)."""

    @property
    def facts(self) -> dict[str, Any]:
        rules, topology = self.rules, self.rules.topology
        return {"format": self.format, "version": rules.version, "config_class": rules.config_class,
                "tp": topology.tp, "pp": topology.pp, "rope_interleaved": rules.rope_interleaved,
                "vocab_rows": rules.padded_vocab(self.model.config.vocab_size)}

    @cached_property
    def all_stages(self) -> Mapping[str, int]:
        """The stage of each pipeline block."""
        return stages_of(self.model.config, self.rules) if self.stages is None else self.stages

    @cached_property
    def _kinds(self) -> tuple[_Kind, ...]:
        """One kind per name in the table, in its order."""
        model, kinds = self.model, []
        stages = self.all_stages
        for name, rows in groupby(model.stored_rows, key=lambda row: model.rows[row].nanotron):
            fused = tuple(rows)
            block, (folder, _, last) = name.split(".pp_block")[0], f"model.model.{name}".rpartition(".")
            num_groups = math.prod(model.config.counts[field] for field in fields_of(name))
            kinds.append(_Kind(f"{folder.replace('.', '/')}/model_{last}", fused,
                               tuple(model.firsts[row] for row in fused),
                               tuple((model.firsts[row + 1] - model.firsts[row]) // num_groups for row in fused),
                               array("I", (stages[block.format(layer=i)] for i in range(num_groups)))))
        return tuple(kinds)

    @cached_property
    def _first_groups(self) -> tuple[int, ...]:
        """Position of the first group of each kind; the last entry is the count of all groups."""
        return tuple(accumulate((len(kind.stages) for kind in self._kinds), initial=0))

    @cached_property
    def _kind_of_row(self) -> dict[int, tuple[int, int]]:
        """(index of the kind, index in `_Kind.rows`) of each row of the table."""
        return {row: (k, i) for k, kind in enumerate(self._kinds) for i, row in enumerate(kind.rows)}

    @property
    def num_groups(self) -> int:
        return self._first_groups[-1]

    def group(self, position: int) -> Group:
        return self._group(*self._in_kind(position))

    def groups(self) -> Iterator[Group]:
        return (self._group(k, i) for k, kind in enumerate(self._kinds) for i in range(len(kind.stages)))

    def _group(self, k: int, i: int) -> Group:
        kind = self._kinds[k]
        numbers = tuple([first + i * each + n for first, each in zip(kind.firsts, kind.num_each) for n in range(each)])
        return Group(self._first_groups[k] + i, (k, self.dtypes(numbers[0])), numbers)

    def _in_kind(self, position: int) -> tuple[int, int]:
        """(index of the kind, index among the groups of the kind) of the group at a position."""
        k = bisect_right(self._first_groups, position) - 1
        return k, position - self._first_groups[k]

    @property
    def moved_blocks(self) -> list[str]:
        """Pipeline blocks on other stages than in Nanotron's own balancing."""
        own = stages_of(self.model.config, self.rules)
        return sorted(block for block, stage in (self.stages or {}).items() if own.get(block) != stage)

    def stage_of(self, group: Group) -> int:
        """The pipeline stage of a group."""
        k, i = self._in_kind(group.position)
        return self._kinds[k].stages[i]

    @property
    def most_files(self) -> int:
        return self.rules.topology.tp

    def ranks_of(self, group: Group) -> tuple[RankFile, ...]:
        """The rank files of a group, without paths."""
        if (ranks := self._ranks.get(group.storage_class)) is None:
            fused = tuple(map(self.model.parameter, group.numbers))
            ranks = rank_files(fused, self.dtypes(group.numbers[0]), self.rules)
            self._ranks[group.storage_class] = ranks
        return ranks

    def paths_of(self, group: Group) -> list[str]:
        k, i = self._in_kind(group.position)
        kind = self._kinds[k]
        path, stage = kind.path.format(layer=i), kind.stages[i]
        if (suffixes := self._suffixes.get((k, stage))) is None:
            suffixes = self._suffixes[k, stage] = [rank.suffix.format(stage=stage) for rank in self.ranks_of(group)]
        return [path + suffix for suffix in suffixes]

    def files_of(self, group: Group) -> tuple[TensorFile, ...]:
        ranks = self.ranks_of(group)
        begins = self.begins(group) if self.begins else [rank.file.tensors[0].begin for rank in ranks]
        return tuple(placed(rank.file, path, begin)
                     for rank, path, begin in zip(ranks, self.paths_of(group), begins))

    def dtype_at(self, number: int) -> str:
        return self.dtypes(self._group_of(number)[0].numbers[0])

    def storage_class(self, number: int) -> Hashable:
        return self._group_of(number)[0].storage_class

    def locations_of(self, number: int) -> tuple[tuple[int, int], ...]:
        group, _ = self._group_of(number)
        k, i = self._in_kind(group.position)
        first = self._first_files[k] + i * len(self.ranks_of(group))
        indices = {path: first + n for n, path in enumerate(self.paths_of(group))}
        return tuple((indices[part.tensor.file], part.tensor.begin) for part in self.slices_of(number))

    @cached_property
    def _first_files(self) -> tuple[int, ...]:
        """Index of the first file of each kind; the last entry is the count of all files."""
        counts = (len(kind.stages) * len(self.ranks_of(self.group(first)))
                  for kind, first in zip(self._kinds, self._first_groups))
        return tuple(accumulate(counts, initial=0))

    @property
    def num_files(self) -> int:
        return self._first_files[-1]

    def aligned(self, begins: Callable[[Group], Sequence[int]]) -> NanotronLayout:
        return replace(self, begins=begins)

    def position_of(self, number: int) -> int:
        """The position of the group of a parameter."""
        k, index, _ = self._place_of(number)
        return self._first_groups[k] + index

    def _place_of(self, number: int) -> tuple[int, int, int]:
        """(index of the kind, index among the groups of the kind, index in `Group.numbers`) of a parameter."""
        row, instance = self.model.row_of(number)
        k, i = self._kind_of_row[row]
        num_each = self._kinds[k].num_each
        index, n = divmod(instance, num_each[i])
        return k, index, sum(num_each[:i]) + n

    def _group_of(self, number: int) -> tuple[Group, int]:
        """(group of a parameter, index of the parameter in `Group.numbers`)."""
        k, index, i = self._place_of(number)
        return self._group(k, index), i

    def _parts_of(self, number: int) -> Iterator[tuple[StoredTensor, RankPart]]:
        """(tensor, part of the parameter in it) of each rank; nothing for a parameter that is not stored."""
        if self.model.row_of(number)[0] not in self._kind_of_row:
            return iter(())
        group, i = self._group_of(number)
        return ((file.tensors[0], rank.parts[i]) for file, rank in zip(self.files_of(group), self.ranks_of(group)))

    def slices_of(self, number: int) -> tuple[Slice, ...]:
        name = self.model.parameter(number).name
        return tuple(Slice(name, part.region, tensor, part.place, part.order)
                     for tensor, part in self._parts_of(number) if part.region.num_elements)

    def copies_of(self, number: int) -> tuple[Slice, ...]:
        if (row := self.rules.pad_row) is None:
            return ()
        name = self.model.parameter(number).name
        return tuple(repeat for tensor, part in self._parts_of(number) if part.padding
                     for repeat in repeats(name, tensor, part.padding, row))

    def fills_of(self, number: int) -> tuple[Fill, ...]:
        if self.rules.pad_row is not None:
            return ()
        return tuple(Fill(tensor, part.padding) for tensor, part in self._parts_of(number) if part.padding)


def repeats(name: str, tensor: StoredTensor, padding: Box, row: int) -> Iterator[Slice]:
    """Slices that repeat one row of the embedding or the head, or a part of it, in every row of a place of padding."""
    (first, left), (last, right) = padding.start, padding.stop
    for own in range(first, last):
        yield Slice(name, Box((row, left), (row + 1, right)), tensor, Box((own, left), (own + 1, right)), ((0,), (1,)))
