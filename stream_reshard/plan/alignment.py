"""Offset of the data in a target file. A header may be padded with spaces, so this tool chooses its length.

A file system can clone a block where its offset in the source equals its offset in the target, modulo the size of a
block. The offset of a file's data is therefore the one at which most bytes can be cloned. It depends on the plan alone,
never on the file system: one plan has one output.

::

    source   |.....q0 q1|q2 q3 q4|q5 q6 ...
    target   |{head}  q0|q1 q2 q3|q4 q5 ...    shortest header: no block equals a block of the source
    target   |{header} q0 q1|q2 q3 q4|q5 ...   padded header: all blocks but the first do
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from stream_reshard.formats.layout import Group, Layout, Slice
from stream_reshard.plan.blocks import Part, Window, whole_block
from stream_reshard.storage.cloning import inner_blocks
from stream_reshard.storage.header import BLOCK_NBYTES, MIN_CLONED_NBYTES, TensorFile

DATA_ALIGNMENT = 8
"""The data of a safetensors file begin at a multiple of this many bytes."""

_MAX_CHOICES = 4096
"""Choices that are remembered. Layers usually repeat a few; a hostile source could ask for one per layer."""


@dataclass(frozen=True)
class AlignmentRequest:
    """A contiguous run whose offset in the target should equal its offset in the source, modulo the block size."""

    source: int
    """Index of the run's source tensor."""
    shift: int
    """Bytes from the begin of the source tensor to the byte that would be the first of the file's data, if the file
    continued the source in both directions; may be negative."""
    nbytes: int


def requests_of(files: Sequence[TensorFile],
                pairs: Iterable[tuple[Sequence[Slice], Sequence[Slice]]]) -> list[list[AlignmentRequest]]:
    """The requests of each file. `pairs`: (source slices, target slices) of each parameter in these files.

    Source tensors are numbered through all pairs. Runs that are rearranged or cast, and small tensors, make no request.
    """
    data_begins = {file.path: file.tensors[0].begin for file in files}
    requests: dict[str, list[AlignmentRequest]] = {file.path: [] for file in files}
    first = 0
    for sources, targets in pairs:
        for window, part in _cloneable(sources, targets):
            source, target = window.slice.tensor, part.target.tensor
            in_source = (window.start + part.window_offset) * source.itemsize
            in_data = part.offset - data_begins[target.file]
            requests[target.file].append(
                AlignmentRequest(first + sources.index(window.slice), in_source - in_data, part.nbytes))
        first += len(sources)
    return list(requests.values())


def _cloneable(sources: Sequence[Slice], targets: Sequence[Slice]) -> Iterator[tuple[Window, Part]]:
    """Runs of one parameter whose bytes are copied unchanged, in target tensors that are large enough to be cloned."""
    if not targets:
        return
    block = whole_block(sources, targets)
    for part in block.parts:
        if block.keeps_bytes(part) and part.target.tensor.nbytes >= MIN_CLONED_NBYTES:
            yield block.windows[part.window], part


def begin_for(requests: Iterable[AlignmentRequest], source_begins: Sequence[int], least: int) -> int:
    """The offset from byte `least` on at which a file's data should begin: the smallest one that grants the requests
    of the most bytes; `least` without requests. `source_begins`: offset of each source tensor in its file."""
    nbytes: Counter[int] = Counter()
    for request in requests:
        residue = (source_begins[request.source] + request.shift) % BLOCK_NBYTES
        if residue % DATA_ALIGNMENT == 0:
            nbytes[residue] += request.nbytes
    most = max(nbytes.values(), default=0)
    return min((least + (residue - least) % BLOCK_NBYTES for residue, n in nbytes.items() if n == most), default=least)


class Alignment:
    """Chooses the offsets of the data in the files of a target, group by group."""

    def __init__(self, source: Layout, target: Layout):
        """`target` has the shortest headers."""
        self.source, self.target = source, target
        self._requests: dict[Hashable, list[tuple[list[AlignmentRequest], int]]] = {}
        """By storage class of a group, per file: its requests, and the least offset of its data."""
        self._chosen: dict[Hashable, tuple[int, ...]] = {}

    def storage_class(self, group: Group) -> Hashable:
        """Key of a group. Groups with equal keys are stored alike in both layouts."""
        return (group.storage_class, *map(self.source.storage_class, group.numbers))

    def __call__(self, group: Group) -> tuple[int, ...]:
        """Offset of the data in each file of a group, in bytes."""
        begins = [begin for number in group.numbers for _, begin in self.source.locations_of(number)]
        return self.choose(group, self.storage_class(group), begins)

    def choose(self, group: Group, storage_class: Hashable, source_begins: Sequence[int]) -> tuple[int, ...]:
        """Offset of the data in each file of a group, in bytes, for a caller that knows the group's storage class and
        the offset of each of its source tensors."""
        key = storage_class, tuple([begin % BLOCK_NBYTES for begin in source_begins])
        if (chosen := self._chosen.get(key)) is None:
            if storage_class not in self._requests:
                self._requests[storage_class] = self._requests_of(group)
            chosen = tuple([begin_for(requests, source_begins, least)
                            for requests, least in self._requests[storage_class]])
            if len(self._chosen) >= _MAX_CHOICES:
                self._chosen.clear()
            self._chosen[key] = chosen
        return chosen

    def _requests_of(self, group: Group) -> list[tuple[list[AlignmentRequest], int]]:
        files = self.target.files_of(group)
        pairs = ((self.source.slices_of(number), self.target.slices_of(number)) for number in group.numbers)
        return [(requests, file.tensors[0].begin) for file, requests in zip(files, requests_of(files, pairs))]


def cloneable_nbytes(source: Layout, target: Layout) -> int:
    """Bytes of the target that take no space of their own on a file system that can clone."""
    total = 0
    for number in range(target.model.firsts[-1]):
        if targets := target.slices_of(number):
            whole = whole_block(source.slices_of(number), targets)
            for part in whole.parts if whole.is_plain_copy else ():
                begin, end = inner_blocks(whole.windows[part.window].offset_of(part), part.offset, part.nbytes)
                total += end - begin
    return total
