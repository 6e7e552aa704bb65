"""The one pass over the groups of a target: the proof that a plan is right, and everything that is counted on the way.

What one group holds is proved with boxes, for the first and the last group of every likeness: groups that are alike
differ in names and offsets only. That the groups make up the whole is proved for each of them: every parameter is in
one group, and no path occurs twice.
"""
from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from stream_reshard.formats.layout import Fill, Group, Layout, Slice
from stream_reshard.model.box import Box, has_duplicates, tiling_fault
from stream_reshard.plan.alignment import Alignment
from stream_reshard.storage.header import header_of

_MAX_FAULTS = 100

MAX_JOINED = 4
"""At most this many groups per job, so that a shuffled source does not become a single job."""


@dataclass
class _Alike:
    """Groups that are alike in both layouts."""

    index: int
    """Of the likeness, in the order in which the groups come."""
    last: Group
    data_nbytes: int
    """Bytes of a group's tensors."""
    dtypes: tuple[tuple[str, str], ...]
    """(source, target) of each parameter in a group."""
    dtype_nbytes: Counter[str]
    """Bytes of a group's tensors per dtype."""
    count: int = 0


class Survey:
    """Findings of one pass over the groups."""

    def __init__(self, alignment: Alignment, target: Layout):
        self.source, self.target, self.faults = alignment.source, target, list[str]()
        self._nbytes = array("Q")
        """Bytes of the files of each group."""
        self._alike: dict[Hashable, _Alike] = {}
        self._seen = bytearray(target.model.firsts[-1])
        self._paths = array("q")
        self._spans: list[tuple[int, int]] = []
        """Per group the first place in the source, and the last one that begins in the same file."""
        self._hash = hashlib.sha256()
        for group in target.groups():
            self._add(group, alignment)
        for alike in self._alike.values():
            if alike.count > 1:
                self._prove(alike.last)
        self._prove_whole()

    def _add(self, group: Group, alignment: Alignment) -> None:
        likeness = alignment.storage_class(group)
        if (alike := self._alike.get(likeness)) is None:
            alike = self._alike[likeness] = self._new_class(group)
        alike.count += 1
        alike.last = group
        locations = [location for number in group.numbers for location in self.source.locations_of(number)]
        begins = alignment.choose(group, likeness, [begin for _, begin in locations])
        self._nbytes.append(sum(begins) + alike.data_nbytes)
        file, begin = min(locations)
        self._spans.append((file << 48 | begin, file << 48 | max(at for shard, at in locations if shard == file)))
        paths = self.target.paths_of(group)
        self._paths.extend(map(hash, paths))
        self._hash.update(f"{alike.index} {locations} {begins} {chr(10).join(paths)}\n".encode())
        for number in group.numbers:
            if self._seen[number]:
                self._complain(f"{self.target.model.parameter(number).name} is in two groups")
            self._seen[number] = 1

    def _new_class(self, group: Group) -> _Alike:
        self._prove(group)
        files = self.target.files_of(group)
        text = [[described(layout, number) for number in group.numbers] for layout in (self.source, self.target)]
        self._hash.update(json.dumps([text, [header_of(file).hex() for file in files]]).encode())
        dtypes = tuple((self.source.dtype_at(number), self.target.dtype_at(number)) for number in group.numbers)
        nbytes: Counter[str] = Counter()
        for tensor in (tensor for file in files for tensor in file.tensors):
            nbytes[tensor.dtype] += tensor.nbytes
        return _Alike(len(self._alike), group, nbytes.total(), dtypes, nbytes)

    def _prove(self, group: Group) -> None:
        for fault in group_faults(self.source, self.target, group):
            self._complain(fault)

    def _prove_whole(self) -> None:
        model = self.target.model
        for row in model.stored_rows:
            for number in model.numbers_of(row):
                if not self._seen[number]:
                    self._complain(f"{model.parameter(number).name} is in no group")
        if sum(self._seen) > model.num_stored:
            self._complain("a parameter that is not stored is in a group")
        if len(self._paths) != self.target.num_files:
            self._complain(f"{len(self._paths)} files are in groups, of {self.target.num_files}")
        if has_duplicates(self._paths):
            self._complain("two groups have a file in common")

    def _complain(self, fault: str) -> None:
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(fault)

    @property
    def nbytes(self) -> int:
        """Bytes of all target files."""
        return sum(self._nbytes)

    def largest_job_nbytes(self, order: array[int], starts: array[int]) -> int:
        """Bytes that the largest job writes."""
        ends = (*starts[1:], len(order))
        return max(sum(self._nbytes[group] for group in order[start:end]) for start, end in zip(starts, ends))

    def order(self) -> array[int]:
        """The groups in the order of the source's bytes: by their lowest file, then the lowest offset in it."""
        return array("I", sorted(range(len(self._spans)), key=self._spans.__getitem__))

    def starts(self, order: array[int]) -> array[int]:
        """Index in `order` of the first group of each job. Groups that lie between each other's bytes are one job that
        reads all of them in one go: in Hugging Face's shards k_proj, o_proj, q_proj, v_proj follow each other."""
        starts, reach = array("I"), -1
        for index, group in enumerate(order):
            first, last = self._spans[group]
            if first > reach or index - starts[-1] >= MAX_JOINED:
                starts.append(index)
                reach = -1
            reach = max(reach, last)
        return starts

    def casts(self) -> dict[tuple[str, str], int]:
        """Number of parameters per (source dtype, target dtype) that changes."""
        counts: Counter[tuple[str, str]] = Counter()
        for alike in self._alike.values():
            for pair in alike.dtypes:
                counts[pair] += alike.count
        return {pair: count for pair, count in counts.items() if pair[0] != pair[1]}

    def dtypes(self) -> dict[str, int]:
        """Bytes of target tensors per dtype."""
        counts: Counter[str] = Counter()
        for alike in self._alike.values():
            for dtype, nbytes in alike.dtype_nbytes.items():
                counts[dtype] += alike.count * nbytes
        return dict(counts)

    def digest(self) -> str:
        """sha256 of everything that decides the output's bytes, in hex."""
        return self._hash.hexdigest()


def group_faults(source: Layout, target: Layout, group: Group) -> Iterator[str]:
    """Reasons why the files of a group are not written exactly once, or its parameters not used exactly once."""
    files = target.files_of(group)
    locations: dict[tuple[str, str], list[Box]] = defaultdict(list)
    for number in group.numbers:
        parameter = target.model.parameter(number)
        for layout in (source, target):
            held = layout.slices_of(number)
            if fault := tiling_fault([part.region for part in held], parameter.whole):
                yield f"{parameter.name} in {layout.format}: {fault}"
            if any(part.region.num_elements != part.place.num_elements for part in held):
                yield f"{parameter.name} in {layout.format}: a region and its place differ in size"
        parts: tuple[Slice | Fill, ...] = (*target.slices_of(number), *target.fills_of(number))
        for part in parts:
            locations[part.tensor.file, part.tensor.key].append(part.place)
    for file in files:
        if len(header_of(file)) != file.tensors[0].begin:
            yield f"{file.path}: its header does not end where its data begin"
        for tensor in file.tensors:
            if fault := tiling_fault(locations.pop((tensor.file, tensor.key), []), Box.whole(tensor.shape)):
                yield f"{file.path}: {fault}"
    if locations or target.paths_of(group) != [file.path for file in files]:
        yield f"{target.model.parameter(group.numbers[0]).name}: its files are not those of its group"


def described(layout: Layout, number: int) -> list[object]:
    """Everything that the slices and padding of a parameter say, but for where tensors begin in their files."""
    slices = [[part.region.start, part.region.stop, part.place.start, part.place.stop, part.order, part.tensor.file,
               part.tensor.key, part.tensor.dtype, part.tensor.shape] for part in layout.slices_of(number)]
    fills = [[fill.place.start, fill.place.stop, fill.tensor.file] for fill in layout.fills_of(number)]
    return [layout.model.parameter(number).name, slices, fills]
