"""Part of a group of fused parameters that each tensor-parallel rank keeps: the header of its file, and its contents.

It is the same for every layer; which layer it is, its stage, and where the data begin are for the layout to say.
Sources: file names from `get_path` (nanotron/serialize/utils.py), what is split how from the tensor-parallel layers
(nanotron/parallel/tensor_parallel/nn.py) and `create_sharded_parameter` (nanotron/parallel/sharded_parameters.py),
header fields from `TensorMetadata` (nanotron/serialize/metadata.py).
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stream_reshard.formats.nanotron.rules import NanotronRules
from stream_reshard.model.box import Box
from stream_reshard.model.parameters import Parameter
from stream_reshard.model.topology import part_of
from stream_reshard.storage.header import TensorFile, planned_file

_KEY = "data"
"""Key of the one tensor in a file (nanotron/serialize/weights.py)."""


@dataclass(frozen=True)
class RankPart:
    """Part of one parameter that one rank holds, in three coordinate systems."""

    region: Box
    """Of the parameter; may be empty where the rank holds padding only."""
    place: Box
    """Of the rank's tensor, padding included."""
    origin: Box
    """Of the unsharded tensor, padding included."""
    num_rows: int
    """Rows of `place` that are no padding; they come first."""
    order: tuple[tuple[int, ...], ...]
    """As in a `Slice`."""

    @property
    def held(self) -> Box:
        """Place of the region in the rank's tensor."""
        return self.place.with_extent(0, self.place.start[0], self.place.start[0] + self.num_rows)

    @property
    def padding(self) -> Box | None:
        """Place of the padding in the rank's tensor: rows past the end of the vocabulary."""
        first, last = self.place.start[0] + self.num_rows, self.place.stop[0]
        return self.place.with_extent(0, first, last) if first < last else None


@dataclass(frozen=True)
class RankFile:
    """The file of one rank."""

    suffix: str
    """End of the file's name, with the stage as `{stage}`."""
    file: TensorFile
    """Its header, as short as can be; without a path."""
    parts: tuple[RankPart, ...]
    """Per fused parameter."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensor."""
        return self.file.tensors[0].nbytes


def rank_files(fused: Sequence[Parameter], dtype: str, rules: NanotronRules) -> tuple[RankFile, ...]:
    """The files of one Nanotron parameter, one per tensor-parallel rank that writes it, and what each holds."""
    first, topology = fused[0], rules.topology
    if first.stacked is not None:
        return (_stack(fused, dtype),)
    if first.split is None:
        shape, whole = first.matrix_shape, Box.whole(first.matrix_shape)
        part = RankPart(first.whole, whole, whole, shape[0], first.matrix)
        return (RankFile(".safetensors", planned_file("", [(_KEY, dtype, shape)], {}), (part,)),)
    made = []
    for tp in range(topology.tp):
        parts = tuple(_parts(fused, tp, rules))
        metadata = {"version": rules.version, "unsharded_shape": str(_unsharded_shape(fused, rules)),
                    "local_global_slices_pairs": _slices_pairs(parts, fused)}
        made.append(RankFile(f"_pp-rank-{{stage}}-of-{topology.pp}_tp-rank-{tp}-of-{topology.tp}.safetensors",
                             planned_file("", [(_KEY, dtype, parts[-1].place.stop)], metadata), parts))
    return tuple(made)


def _stack(fused: Sequence[Parameter], dtype: str) -> RankFile:
    """The one array of all experts, which every rank holds whole (`GroupedMLP`, nanotron/nn/moe.py): an expert's
    matrices are transposed there and stand beside each other."""
    parts, begin, end = [], 0, 0
    for parameter in fused:
        num_rows, num_columns = parameter.matrix_shape
        if parameter.stacked == 0:
            begin, end = end, end + num_rows
        expert = parameter.stacked or 0
        place = Box((expert, 0, begin), (expert + 1, num_columns, end))
        parts.append(RankPart(parameter.whole, place, place, 1, ((), *reversed(parameter.matrix))))
    shape = (1 + max(parameter.stacked or 0 for parameter in fused), fused[0].matrix_shape[1], end)
    return RankFile(".safetensors", planned_file("", [(_KEY, dtype, shape)], {}), tuple(parts))


def _padded_shape(parameter: Parameter, rules: NanotronRules) -> tuple[int, ...]:
    """The shape with padding: Nanotron pads the vocabulary, nothing else."""
    return tuple(rules.padded_vocab(n) if dim == "vocab" else n for dim, n in zip(parameter.dims, parameter.shape))


def _parts(fused: Sequence[Parameter], tp: int, rules: NanotronRules) -> Iterator[RankPart]:
    """Part of each parameter that rank `tp` holds: the shard is the ranks' parts one below the other, not a part of the
    fused whole (`contiguous_chunks`, nanotron/parallel/sharded_parameters.py)."""
    local_row = global_row = 0
    for parameter in fused:
        padded = _padded_shape(parameter, rules)
        split = parameter.dims.index(parameter.split or "")
        start, stop = part_of(padded[split], rules.topology.tp, tp)
        size = parameter.shape[split]
        region = parameter.whole.with_extent(split, min(start, size), min(stop, size))
        held = _matrix_box(parameter, Box.whole(padded).with_extent(split, start, stop), padded)
        local = held.seen_from(held)
        num_rows = _matrix_box(parameter, region, parameter.shape).shape[0]
        yield RankPart(region, _moved_down(local, local_row), _moved_down(held, global_row), num_rows,
                       _order(parameter, rules))
        local_row += local.stop[0]
        global_row += _matrix_box(parameter, Box.whole(padded), padded).stop[0]


def _matrix_box(parameter: Parameter, region: Box, shape: tuple[int, ...]) -> Box:
    """A region of a parameter of this shape as a box of the matrix it is stored as; only outermost dims may be cut."""
    inner = [math.prod(shape[dim] for dim in group[1:]) for group in parameter.matrix]
    return Box(tuple(region.start[group[0]] * n for group, n in zip(parameter.matrix, inner)),
               tuple(region.stop[group[0]] * n for group, n in zip(parameter.matrix, inner)))


def _moved_down(box: Box, rows: int) -> Box:
    return box.with_extent(0, box.start[0] + rows, box.stop[0] + rows)


def _order(parameter: Parameter, rules: NanotronRules) -> tuple[tuple[int, ...], ...]:
    """The order of dims in the stored matrix: with interleaved rotary embedding a head is (pair, half)."""
    if not rules.rope_interleaved or "half" not in parameter.dims:
        return parameter.matrix
    half, pair = parameter.dims.index("half"), parameter.dims.index("pair")
    swap = {half: pair, pair: half}
    return tuple(tuple(swap.get(dim, dim) for dim in group) for group in parameter.matrix)


def _unsharded_shape(fused: Sequence[Parameter], rules: NanotronRules) -> tuple[int, ...]:
    shapes = [_matrix_box(p, Box.whole(padded := _padded_shape(p, rules)), padded).stop for p in fused]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _slices_pairs(parts: Sequence[RankPart], fused: Sequence[Parameter]) -> str:
    """`local#global;...` as `SlicesPair.tuple_to_str` writes it (nanotron/parallel/parameters.py).

    With several chunks both sides name their rows; a lone parameter's local side is all None.
    """
    def text(box: Box, named: int | None) -> str:
        return "|".join(f"{a},{b},None" if dim == named else "None,None,None"
                        for dim, (a, b) in enumerate(zip(box.start, box.stop)))

    split = next(dim for dim, group in enumerate(fused[0].matrix)
                 if fused[0].dims.index(fused[0].split or "") in group)
    return ";".join(f"{text(part.place, split if len(parts) > 1 else None)}#{text(part.origin, split)}"
                    for part in parts)
