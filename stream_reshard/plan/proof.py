"""One pass over the groups of a target: the proof that a plan is right, and all counts.

Two things are proved. Within a group, boxes cover every element once; this is checked for the first and the last group
of each storage class, because other groups of the class differ only in names and offsets. Across all groups, every
parameter is in one group, and no path occurs twice.
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
class _StorageClass:
    """Groups that are stored alike in both layouts."""

    index: int
    """Classes are counted in the order of their first groups."""
    last: Group
    """The last group seen."""
    data_nbytes: int
    """Bytes of the tensors of one group."""
    dtypes: tuple[tuple[str, str], ...]
    """(source dtype, target dtype) of each parameter in one group."""
    dtype_nbytes: Counter[str]
    """Bytes of the tensors of one group, per dtype."""
    num_groups: int = 0


class Survey:
    """Faults and counts of one pass over the groups."""

    def __init__(self, alignment: Alignment, target: Layout):
        self.source, self.target, self.faults = alignment.source, target, list[str]()
        self._nbytes = array("Q")
        """Bytes of the files of each group."""
        self._classes: dict[Hashable, _StorageClass] = {}
        self._seen = bytearray(target.model.firsts[-1])
        """1 for each parameter that is in a group."""
        self._paths = array("q")
        """Hash of each path."""
        self._spans: list[tuple[int, int]] = []
        """(first, last) location of each group in its lowest source file."""
        self._hash = hashlib.sha256()
        for group in target.groups():
            self._add(group, alignment)
        for storage_class in self._classes.values():
            if storage_class.num_groups > 1:
                self._prove(storage_class.last)
        self._prove_whole()

    def _add(self, group: Group, alignment: Alignment) -> None:
        key = alignment.storage_class(group)
        if (storage_class := self._classes.get(key)) is None:
            storage_class = self._classes[key] = self._new_class(group)
        storage_class.num_groups += 1
        storage_class.last = group
        locations = [location for number in group.numbers for location in self.source.locations_of(number)]
        begins = alignment.choose(group, key, [begin for _, begin in locations])
        self._nbytes.append(sum(begins) + storage_class.data_nbytes)
        lowest, begin = min(locations)
        last = max(begin for file, begin in locations if file == lowest)
        self._spans.append(((lowest << 48) + begin, (lowest << 48) + last))
        paths = self.target.paths_of(group)
        self._paths.extend(map(hash, paths))
        self._hash.update(f"{storage_class.index} {locations} {begins} {chr(10).join(paths)}\n".encode())
        for number in group.numbers:
            if self._seen[number]:
                self._complain(f"{self.target.model.parameter(number).name} is in two groups")
            self._seen[number] = 1

    def _new_class(self, group: Group) -> _StorageClass:
        self._prove(group)
        files = self.target.files_of(group)
        text = [[described(layout, number) for number in group.numbers] for layout in (self.source, self.target)]
        self._hash.update(json.dumps([text, [header_of(file).hex() for file in files]]).encode())
        dtypes = tuple((self.source.dtype_at(number), self.target.dtype_at(number)) for number in group.numbers)
        nbytes: Counter[str] = Counter()
        for tensor in (tensor for file in files for tensor in file.tensors):
            nbytes[tensor.dtype] += tensor.nbytes
        return _StorageClass(len(self._classes), group, nbytes.total(), dtypes, nbytes)

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
            self._complain(f"{len(self._paths)} files are in groups, the layout has {self.target.num_files}")
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
        stops = (*starts[1:], len(order))
        return max(sum(self._nbytes[group] for group in order[start:stop]) for start, stop in zip(starts, stops))

    def order(self) -> array[int]:
        """The groups in the order of the source's bytes: by the lowest file, then by the lowest offset in it."""
        return array("I", sorted(range(len(self._spans)), key=self._spans.__getitem__))

    def starts(self, order: array[int]) -> array[int]:
        """Index in `order` of the first group of each job. Interleaved groups are one job, which reads them in one go:
        a Hugging Face shard holds k_proj, o_proj, q_proj, v_proj in this order, and o_proj is in another group."""
        starts, reached = array("I"), -1
        for index, group in enumerate(order):
            first, last = self._spans[group]
            if first > reached or index - starts[-1] >= MAX_JOINED:
                starts.append(index)
                reached = -1
            reached = max(reached, last)
        return starts

    def casts(self) -> dict[tuple[str, str], int]:
        """Count of cast parameters per (source dtype, target dtype)."""
        counts: Counter[tuple[str, str]] = Counter()
        for storage_class in self._classes.values():
            for pair in storage_class.dtypes:
                counts[pair] += storage_class.num_groups
        return {pair: count for pair, count in counts.items() if pair[0] != pair[1]}

    def dtypes(self) -> dict[str, int]:
        """Bytes of target tensors per dtype."""
        counts: Counter[str] = Counter()
        for storage_class in self._classes.values():
            for dtype, nbytes in storage_class.dtype_nbytes.items():
                counts[dtype] += storage_class.num_groups * nbytes
        return dict(counts)

    def digest(self) -> str:
        """sha256 of everything that decides the output's bytes, in hex."""
        return self._hash.hexdigest()


def group_faults(source: Layout, target: Layout, group: Group) -> Iterator[str]:
    """Elements of a group's files that are not written exactly once, or of its parameters not used exactly once."""
    files = target.files_of(group)
    places: dict[tuple[str, str], list[Box]] = defaultdict(list)
    for number in group.numbers:
        parameter, targets = target.model.parameter(number), target.slices_of(number)
        for layout, slices in ((source, source.slices_of(number)), (target, targets)):
            if fault := tiling_fault([part.region for part in slices], parameter.whole):
                yield f"{parameter.name} in {layout.format}: {fault}"
            if any(part.region.num_elements != part.place.num_elements for part in slices):
                yield f"{parameter.name} in {layout.format}: a region and its place differ in size"
        parts: tuple[Slice | Fill, ...] = (*targets, *target.copies_of(number), *target.fills_of(number))
        for part in parts:
            places[part.tensor.file, part.tensor.key].append(part.place)
    for file in files:
        if len(header_of(file)) != file.tensors[0].begin:
            yield f"{file.path}: its header does not end where its data begin"
        for tensor in file.tensors:
            if fault := tiling_fault(places.pop((tensor.file, tensor.key), []), Box.whole(tensor.shape)):
                yield f"{file.path}: {fault}"
    if places or target.paths_of(group) != [file.path for file in files]:
        yield f"{target.model.parameter(group.numbers[0]).name}: its files are not those of its group"


def described(layout: Layout, number: int) -> list[object]:
    """The slices and padding of a parameter as JSON, without the offsets of tensors in their files."""
    slices = [[part.region.start, part.region.stop, part.place.start, part.place.stop, part.order, part.tensor.file,
               part.tensor.key, part.tensor.dtype, part.tensor.shape] for part in layout.slices_of(number)]
    copies = [[part.region.start, part.region.stop, part.place.start, part.place.stop, part.tensor.file]
               for part in layout.copies_of(number)]
    fills = [[fill.place.start, fill.place.stop, fill.tensor.file] for fill in layout.fills_of(number)]
    return [layout.model.parameter(number).name, slices, fills, *([copies] if copies else [])]
