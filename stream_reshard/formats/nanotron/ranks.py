"""The rank files of one group of fused parameters: the header of each, and the parts of the parameters in it.

They are the same for every layer; the layout adds the path, the stage and the offset of the data. Sources in Nanotron:
names of files from `get_path` (nanotron/serialize/utils.py), splits from the tensor-parallel layers
(nanotron/parallel/tensor_parallel/nn.py) and `create_sharded_parameter` (nanotron/parallel/sharded_parameters.py),
header fields from `TensorMetadata` (nanotron/serialize/metadata.py).
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stream_reshard.formats.layout import interleaved
from stream_reshard.formats.nanotron.rules import NanotronRules
from stream_reshard.model.box import Box
from stream_reshard.model.parameters import Parameter
from stream_reshard.model.topology import part_of
from stream_reshard.storage.header import TensorFile, planned_file

_KEY = "data"
"""Key of the one tensor in each file (nanotron/serialize/weights.py)."""


@dataclass(frozen=True)
class RankPart:
    """The part of one parameter in the tensor of one rank."""

    region: Box
    """Elements of the parameter; empty where the rank holds only padding."""
    padded_place: Box
    """Region and padding, in the rank's tensor."""
    unsharded_place: Box
    """Region and padding, in the unsharded tensor."""
    num_rows: int
    """Rows of `padded_place` that hold the region; rows of padding follow them."""
    order: tuple[tuple[int, ...], ...]
    """`Slice.order`."""

    @property
    def place(self) -> Box:
        """The region, in the rank's tensor."""
        start = self.padded_place.start[0]
        return self.padded_place.with_extent(0, start, start + self.num_rows)

    @property
    def padding(self) -> Box | None:
        """Rows past the end of the vocabulary, in the rank's tensor; None where there are none."""
        start, stop = self.padded_place.start[0] + self.num_rows, self.padded_place.stop[0]
        return self.padded_place.with_extent(0, start, stop) if start < stop else None


@dataclass(frozen=True)
class RankFile:
    """The file of one rank."""

    suffix: str
    """End of the file's path, with the stage as `{stage}`."""
    file: TensorFile
    """The file without a path, with the shortest header."""
    parts: tuple[RankPart, ...]
    """The part of each fused parameter."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.file.tensors[0].nbytes


def rank_files(fused: Sequence[Parameter], dtype: str, rules: NanotronRules) -> tuple[RankFile, ...]:
    """The files of one group, one per tensor-parallel rank; a single one where all ranks hold the same."""
    first, topology = fused[0], rules.topology
    if first.stacked is not None:
        return (_stack(fused, dtype),)
    if first.split is None:
        shape, whole = first.matrix_shape, Box.whole(first.matrix_shape)
        part = RankPart(first.whole, whole, whole, shape[0], first.matrix)
        return (RankFile(".safetensors", planned_file("", [(_KEY, dtype, shape)], {}), (part,)),)
    files = []
    for tp in range(topology.tp):
        parts = tuple(_parts(fused, tp, rules))
        metadata = {"version": rules.version, "unsharded_shape": str(_unsharded_shape(fused, rules)),
                    "local_global_slices_pairs": _slices_pairs(parts, fused)}
        files.append(RankFile(f"_pp-rank-{{stage}}-of-{topology.pp}_tp-rank-{tp}-of-{topology.tp}.safetensors",
                              planned_file("", [(_KEY, dtype, parts[-1].padded_place.stop)], metadata), parts))
    return tuple(files)


def _stack(fused: Sequence[Parameter], dtype: str) -> RankFile:
    """The one array of all experts, which every rank holds whole (`GroupedMLP`, nanotron/nn/moe.py). The matrices of an
    expert are transposed, and stand beside each other."""
    parts, start, stop = [], 0, 0
    for parameter in fused:
        num_rows, num_columns = parameter.matrix_shape
        if parameter.stacked == 0:
            start, stop = stop, stop + num_rows
        expert = parameter.stacked or 0
        place = Box((expert, 0, start), (expert + 1, num_columns, stop))
        parts.append(RankPart(parameter.whole, place, place, 1, ((), *reversed(parameter.matrix))))
    shape = (1 + max(parameter.stacked or 0 for parameter in fused), fused[0].matrix_shape[1], stop)
    return RankFile(".safetensors", planned_file("", [(_KEY, dtype, shape)], {}), tuple(parts))


def _padded_shape(parameter: Parameter, rules: NanotronRules) -> tuple[int, ...]:
    """The shape of a parameter with padding: Nanotron pads the vocabulary only."""
    return tuple(rules.padded_vocab(n) if dim == "vocab" else n for dim, n in zip(parameter.dims, parameter.shape))


def _parts(fused: Sequence[Parameter], tp: int, rules: NanotronRules) -> Iterator[RankPart]:
    """The part of each parameter on rank `tp`. Nanotron splits each fused parameter by itself; the rank's tensor holds
    the parts one below the other (`contiguous_chunks`, nanotron/parallel/sharded_parameters.py)."""
    local_row = unsharded_row = 0
    for parameter in fused:
        padded = _padded_shape(parameter, rules)
        split = parameter.dims.index(parameter.split or "")
        start, stop = part_of(padded[split], rules.topology.tp, tp)
        size = parameter.shape[split]
        region = parameter.whole.with_extent(split, min(start, size), min(stop, size))
        unsharded = _matrix_box(parameter, Box.whole(padded).with_extent(split, start, stop), padded)
        local = unsharded.seen_from(unsharded)
        num_rows = _matrix_box(parameter, region, parameter.shape).shape[0]
        yield RankPart(region, _moved_down(local, local_row), _moved_down(unsharded, unsharded_row), num_rows,
                       interleaved(parameter) if rules.rope_interleaved else parameter.matrix)
        local_row += local.stop[0]
        unsharded_row += _matrix_box(parameter, Box.whole(padded), padded).stop[0]


def _matrix_box(parameter: Parameter, region: Box, shape: tuple[int, ...]) -> Box:
    """A region of a parameter with this shape, as a box of its stored matrix. Of the dims merged into one dim of the
    matrix, only the outermost may be cut."""
    inner = [math.prod(shape[dim] for dim in group[1:]) for group in parameter.matrix]
    return Box(tuple(region.start[group[0]] * n for group, n in zip(parameter.matrix, inner)),
               tuple(region.stop[group[0]] * n for group, n in zip(parameter.matrix, inner)))


def _moved_down(box: Box, rows: int) -> Box:
    return box.with_extent(0, box.start[0] + rows, box.stop[0] + rows)


def _unsharded_shape(fused: Sequence[Parameter], rules: NanotronRules) -> tuple[int, ...]:
    shapes = [_matrix_box(p, Box.whole(padded := _padded_shape(p, rules)), padded).stop for p in fused]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _slices_pairs(parts: Sequence[RankPart], fused: Sequence[Parameter]) -> str:
    """`local#global;...` as `SlicesPair.tuple_to_str` writes it (nanotron/parallel/parameters.py).

    Only the split dim has numbers; on the local side only where several parameters are fused.
    """
    def text(box: Box, named: int | None) -> str:
        return "|".join(f"{start},{stop},None" if dim == named else "None,None,None"
                        for dim, (start, stop) in enumerate(zip(box.start, box.stop)))

    split = next(dim for dim, group in enumerate(fused[0].matrix)
                 if fused[0].dims.index(fused[0].split or "") in group)
    local = split if len(parts) > 1 else None
    return ";".join(f"{text(part.padded_place, local)}#{text(part.unsharded_place, split)}" for part in parts)
