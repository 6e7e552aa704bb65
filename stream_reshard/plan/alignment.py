"""Offset of the data in a target file. A header may be padded with spaces, so its length is ours to choose.

File systems that share blocks between files do so where an offset in the source and the one in the target agree modulo
the block. So the data of a file begin where most of the bytes that the source has in one piece stand as they stand
there. This depends on the plan alone and never on the file system: one plan has one output.

::

    source   |.....q0 q1|q2 q3 q4|q5 q6 ...
    target   |{head}  q0|q1 q2 q3|q4 q5 ...    as short as can be: no block is the source's
    target   |{header} q0 q1|q2 q3 q4|q5 ...   padded: all blocks but the first are
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stream_reshard.formats.layout import Group, Layout, Slice
from stream_reshard.plan.blocks import Part, Window, whole_block
from stream_reshard.storage.cloning import inner_blocks
from stream_reshard.storage.header import BLOCK_NBYTES, MIN_CLONED_NBYTES, TensorFile

DATA_ALIGNMENT = 8
"""The data of a safetensors file begin at a multiple of this many bytes."""

_MAX_CHOICES = 4096
"""Choices that are remembered: layers repeat a few, but nothing makes them."""


@dataclass(frozen=True)
class AlignmentRequest:
    """A contiguous run whose offset in the target should equal its offset in the source, modulo the block size."""

    source: int
    """Index of the source tensor that has it in one piece."""
    shift: int
    """Bytes from the begin of that tensor to the byte that stands where the data of the file begin; may be negative."""
    nbytes: int


def requests_of(files: Sequence[TensorFile],
              pairs: Iterable[tuple[Sequence[Slice], Sequence[Slice]]]) -> list[list[AlignmentRequest]]:
    """Per file what its stretches ask for. `pairs` are all that these files hold: per parameter (source, target).

    Source tensors are counted through all pairs. What is strided or cast asks for nothing, nor does a small tensor.
    """
    begins: Mapping[str, int] = {file.path: file.tensors[0].begin for file in files}
    found: dict[str, list[AlignmentRequest]] = {file.path: [] for file in files}
    first = 0
    for held, wanted in pairs:
        for window, part in _stretches(held, wanted):
            source, target = window.slice.tensor, part.target.tensor
            here = (window.start + part.window_offset) * source.itemsize
            there = target.begin - begins[target.file] + part.target_offset * target.itemsize
            found[target.file].append(AlignmentRequest(first + held.index(window.slice), here - there,
                                           part.num_elements * source.itemsize))
        first += len(held)
    return list(found.values())


def _stretches(held: Sequence[Slice], wanted: Sequence[Slice]) -> Iterator[tuple[Window, Part]]:
    """Runs of one parameter that are contiguous on both sides, in tensors that are worth it."""
    if not wanted:
        return
    block = whole_block(held, wanted)
    for part in block.parts:
        if block.keeps_bytes(part) and part.target.tensor.nbytes >= MIN_CLONED_NBYTES:
            yield block.windows[part.window], part


def begin_for(requests: Iterable[AlignmentRequest], source_begins: Sequence[int], least: int) -> int:
    """The byte from `least` on at which a file's data should begin: where the requests of most bytes come true, the
    first of several such; `least` without requests. `source_begins`: where the source tensors begin in their files."""
    nbytes: Counter[int] = Counter()
    for request in requests:
        residue = (source_begins[request.source] + request.shift) % BLOCK_NBYTES
        if residue % DATA_ALIGNMENT == 0:
            nbytes[residue] += request.nbytes
    most = max(nbytes.values(), default=0)
    return min((least + (residue - least) % BLOCK_NBYTES for residue, n in nbytes.items() if n == most), default=least)


class Alignment:
    """Chooses where the data of the files of a target begin, group by group."""

    def __init__(self, source: Layout, target: Layout):
        """`target` has headers as short as can be."""
        self.source, self.target = source, target
        self._requests: dict[Hashable, list[tuple[list[AlignmentRequest], int]]] = {}
        """Per kind of group and file: what is wished, and the least begin."""
        self._chosen: dict[Hashable, tuple[int, ...]] = {}

    def storage_class(self, group: Group) -> Hashable:
        """Groups that agree in this are alike in both layouts."""
        return (group.storage_class, *map(self.source.storage_class, group.numbers))

    def __call__(self, group: Group) -> tuple[int, ...]:
        """Offset of the data in each file of a group, in bytes."""
        begins = [begin for number in group.numbers for _, begin in self.source.locations_of(number)]
        return self.choose(group, self.storage_class(group), begins)

    def choose(self, group: Group, likeness: Hashable, source_begins: Sequence[int]) -> tuple[int, ...]:
        """The same for a caller that knows the likeness, and where the group's source tensors begin."""
        key = likeness, tuple([begin % BLOCK_NBYTES for begin in source_begins])
        if (chosen := self._chosen.get(key)) is None:
            if likeness not in self._requests:
                self._requests[likeness] = self._requests_of(group)
            chosen = tuple([begin_for(requests, source_begins, least) for requests, least in self._requests[likeness]])
            if len(self._chosen) >= _MAX_CHOICES:
                self._chosen.clear()
            self._chosen[key] = chosen
        return chosen

    def _requests_of(self, group: Group) -> list[tuple[list[AlignmentRequest], int]]:
        files = self.target.files_of(group)
        pairs = ((self.source.slices_of(number), self.target.slices_of(number)) for number in group.numbers)
        return [(requests, file.tensors[0].begin) for file, requests in zip(files, requests_of(files, pairs))]


def cloneable_nbytes(source: Layout, target: Layout) -> int:
    """Bytes of the target that need no room of their own where blocks can be shared."""
    total = 0
    for number in range(target.model.firsts[-1]):
        if wanted := target.slices_of(number):
            whole = whole_block(source.slices_of(number), wanted)
            for part in whole.parts if whole.is_plain_copy else ():
                first, last = inner_blocks(whole.windows[part.window].offset_of(part), part.offset, part.nbytes)
                total += last - first
    return total
