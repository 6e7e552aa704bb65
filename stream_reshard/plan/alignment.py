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
from stream_reshard.plan.blocks import Part, Window, whole_step
from stream_reshard.storage.cloning import inner_blocks
from stream_reshard.storage.header import BLOCK_NBYTES, MIN_SHARED_NBYTES, TensorFile

DATA_STEP = 8
"""The data of a safetensors file begin at a multiple of this many bytes."""

_MAX_CHOICES = 4096
"""Choices that are remembered: layers repeat a few, but nothing makes them."""


@dataclass(frozen=True)
class Wish:
    """A contiguous run whose offset in the target should equal its offset in the source, modulo the block size."""

    source: int
    """Index of the source tensor that has it in one piece."""
    shift: int
    """Bytes from the begin of that tensor to the byte that stands where the data of the file begin; may be negative."""
    nbytes: int


def wishes_of(files: Sequence[TensorFile],
              pairs: Iterable[tuple[Sequence[Slice], Sequence[Slice]]]) -> list[list[Wish]]:
    """Per file what its stretches ask for. `pairs` are all that these files hold: per parameter (source, target).

    Source tensors are counted through all pairs. What is strided or cast asks for nothing, nor does a small tensor.
    """
    begins: Mapping[str, int] = {file.path: file.tensors[0].begin for file in files}
    found: dict[str, list[Wish]] = {file.path: [] for file in files}
    first = 0
    for held, wanted in pairs:
        for window, part in _stretches(held, wanted):
            source, target = window.slice.tensor, part.target.tensor
            here = (window.start + part.window_offset) * source.itemsize
            there = target.begin - begins[target.file] + part.target_offset * target.itemsize
            found[target.file].append(Wish(first + held.index(window.slice), here - there,
                                           part.num_elements * source.itemsize))
        first += len(held)
    return list(found.values())


def _stretches(held: Sequence[Slice], wanted: Sequence[Slice]) -> Iterator[tuple[Window, Part]]:
    """Runs of one parameter that are contiguous on both sides, in tensors that are worth it."""
    if not wanted:
        return
    step = whole_step(held, wanted)
    for part in step.parts:
        if step.is_kept(part) and part.target.tensor.nbytes >= MIN_SHARED_NBYTES:
            yield step.windows[part.window], part


def begin_for(wishes: Iterable[Wish], source_begins: Sequence[int], least: int) -> int:
    """The byte from `least` on at which a file's data should begin: where the wishes of most bytes come true, the first
    of several such; `least` where there is no wish. `source_begins`: where the source tensors begin in their files."""
    nbytes: Counter[int] = Counter()
    for wish in wishes:
        residue = (source_begins[wish.source] + wish.shift) % BLOCK_NBYTES
        if residue % DATA_STEP == 0:
            nbytes[residue] += wish.nbytes
    most = max(nbytes.values(), default=0)
    return min((least + (residue - least) % BLOCK_NBYTES for residue, n in nbytes.items() if n == most), default=least)


class Alignment:
    """Chooses where the data of the files of a target begin, group by group."""

    def __init__(self, source: Layout, target: Layout):
        """`target` has headers as short as can be."""
        self.source, self.target = source, target
        self._wished: dict[Hashable, list[tuple[list[Wish], int]]] = {}
        """Per kind of group and file: what is wished, and the least begin."""
        self._chosen: dict[Hashable, tuple[int, ...]] = {}

    def likeness_of(self, group: Group) -> Hashable:
        """Groups that agree in this are alike in both layouts."""
        return (group.kind, *map(self.source.likeness_of, group.numbers))

    def __call__(self, group: Group) -> tuple[int, ...]:
        """Offset of the data in each file of a group, in bytes."""
        begins = [begin for number in group.numbers for _, begin in self.source.places_of(number)]
        return self.choose(group, self.likeness_of(group), begins)

    def choose(self, group: Group, likeness: Hashable, source_begins: Sequence[int]) -> tuple[int, ...]:
        """The same for a caller that knows the likeness, and where the group's source tensors begin."""
        key = likeness, tuple([begin % BLOCK_NBYTES for begin in source_begins])
        if (chosen := self._chosen.get(key)) is None:
            if likeness not in self._wished:
                self._wished[likeness] = self._wishes_of(group)
            chosen = tuple([begin_for(wishes, source_begins, least) for wishes, least in self._wished[likeness]])
            if len(self._chosen) >= _MAX_CHOICES:
                self._chosen.clear()
            self._chosen[key] = chosen
        return chosen

    def _wishes_of(self, group: Group) -> list[tuple[list[Wish], int]]:
        files = self.target.files_of(group)
        pairs = ((self.source.slices_of(number), self.target.slices_of(number)) for number in group.numbers)
        return [(wishes, file.tensors[0].begin) for file, wishes in zip(files, wishes_of(files, pairs))]


def shareable_nbytes(source: Layout, target: Layout) -> int:
    """Bytes of the target that need no room of their own where blocks can be shared."""
    total = 0
    for number in range(target.model.firsts[-1]):
        if wanted := target.slices_of(number):
            whole = whole_step(source.slices_of(number), wanted)
            for part in whole.parts if whole.is_stretched else ():
                first, last = inner_blocks(whole.windows[part.window].offset_of(part), part.offset, part.nbytes)
                total += last - first
    return total
