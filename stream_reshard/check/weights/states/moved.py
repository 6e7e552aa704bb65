"""Moments and masters as matrices that are read by rows, like the weights of the same checkpoint."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from stream_reshard.check.weights.checkpoint import Piece, Weight, Weights, matrix_of
from stream_reshard.check.weights.states.cut import boxes_between, stretch_of
from stream_reshard.check.weights.states.rank_file import MASTERS
from stream_reshard.check.weights.states.state import TrainingState
from stream_reshard.formats.nanotron.weight_files import parse_path
from stream_reshard.model.box import Box
from stream_reshard.storage.header import StoredTensor


@dataclass(frozen=True)
class Repeat:
    """The choice among equal copies of a state."""

    tp: int = 0
    """The rank for parameters that all tensor-parallel ranks hold whole."""
    stage: int = 0
    """Index among the stages that hold a parameter: 1 for the tied embedding on the stage of the head."""


class StateWeights(Weights):
    """One kind of state of the parameters of a checkpoint. The pieces of the weights say which rows of a parameter are
    where in the shards; here the shards lie in the optimizer's files, whole or cut by ZeRO-1."""

    def __init__(self, weights: Weights, state: TrainingState, kind: str, repeat: Repeat = Repeat(),
                 is_rounded: bool = False):
        """`weights`: those of the same checkpoint. With `is_rounded` the state is read as its weight's dtype."""
        self._weights, self._state, self._kind = weights, state, kind
        self._repeat, self._is_rounded = repeat, is_rounded

    def __getitem__(self, name: str) -> Weight:
        weight = self._weights[name]
        pieces = tuple(cut for piece in weight.pieces for cut in self._cut(weight.parameter.nanotron, piece))
        rounded_to = weight.dtype if self._is_rounded else ""
        return replace(weight, pieces=pieces, state=self._kind, rounded_to=rounded_to)

    def _cut(self, name: str, piece: Piece) -> Iterator[Piece]:
        """A piece of the weights as pieces of the state."""
        rank, state = parse_path(piece.tensor.file)[1], self._state
        stage = state.stages_of[name][self._repeat.stage]
        num_elements, width = Box.whole(piece.tensor.shape).num_elements, _width(piece.tensor.shape)
        for dp in range(state.num_stretches):
            start, stop = stretch_of(num_elements, state.num_stretches, dp)
            if start >= stop:
                continue
            file = state.files[stage, dp, rank.tp if rank else self._repeat.tp]
            number = state.ids[file.names][name]
            dtype = file.dtypes[self._kind][number]
            # A stretch is read as a place in the whole shard, which would begin before it.
            tensor = StoredTensor(file.path, self._kind, dtype, piece.tensor.shape, 0)
            tensor = replace(tensor, begin=file.begins[self._kind][number] - start * tensor.itemsize)
            for box in boxes_between(start, stop, width):
                if common := box.overlap(piece.local):
                    yield _part_of(piece, tensor, common)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def dtype_of(self, name: str) -> str:
        weight = self._weights[name]
        return weight.dtype if self._is_rounded else self._state.dtype_of(self._kind, weight.parameter.nanotron)

    def paths_of(self, name: str) -> Sequence[str]:
        return list(dict.fromkeys(piece.tensor.file for piece in self[name].pieces))


def masters_rounded(weights: Weights, state: TrainingState) -> StateWeights:
    """The masters rounded to the dtypes of the weights, which must be these weights."""
    return StateWeights(weights, state, MASTERS, is_rounded=True)


def _width(shape: tuple[int, ...]) -> int:
    """Columns of a stored tensor; one of three dims has the rows of its first two."""
    return matrix_of(shape)[1] if len(shape) < 3 else shape[-1]


def _part_of(piece: Piece, tensor: StoredTensor, local: Box) -> Piece:
    """The part of a piece that stands at `local`, a box of its own."""
    inside = local.seen_from(piece.local)
    if piece.is_transposed:
        inside = Box(inside.start[::-1], inside.stop[::-1])
    corner = tuple(map(sum, zip(piece.origin.start, inside.start)))
    stop = tuple(map(sum, zip(corner, inside.shape)))
    return Piece(Box(corner, stop), tensor, local, piece.is_transposed)
