"""The files of one Nanotron parameter, checked against what Nanotron gives each rank (`create_sharded_parameter`,
nanotron/parallel/sharded_parameters.py)."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from stream_reshard.check.weights.checkpoint import matrix_of
from stream_reshard.errors import quoted
from stream_reshard.formats.nanotron.config import MODEL_CONFIG_NAME
from stream_reshard.formats.nanotron.weight_files import Rank
from stream_reshard.model.box import Box, tiling_fault
from stream_reshard.model.parameters import Parameter
from stream_reshard.storage.header import StoredTensor


class HeldFile(NamedTuple):
    """Facts kept of one weight file; values that many files share are kept once."""

    path: str
    begin: int
    parameter: str
    rank: Rank | None
    version: str | None
    dtype: str
    shape: tuple[int, ...]
    unsharded_shape: tuple[int, ...]
    pairs: tuple[tuple[Box, Box], ...]

    @property
    def tensor(self) -> StoredTensor:
        """The one tensor in the file."""
        return StoredTensor(self.path, "data", self.dtype, self.shape, self.begin)


class FusedFiles:
    """The files of one Nanotron parameter, and the parameters fused in it."""

    def __init__(self, fused: list[Parameter], files: list[HeldFile]):
        self.fused, self.files = fused, files
        self.first = files[0].path
        self.rows = [matrix_of(parameter.matrix_shape)[0] for parameter in fused]

    def faults(self) -> Iterator[str]:
        """Everything that keeps Nanotron from loading what the headers say."""
        split = self.fused[0].split
        if any((file.rank is None) != (split is None) for file in self.files):
            yield f"{quoted(self.first)}: {'has no' if split else 'has'} ranks in its name, unlike Nanotron's own file"
        elif len({(file.unsharded_shape, file.dtype) for file in self.files}) > 1:
            yield f"{quoted(self.first)} and its other ranks disagree on unsharded_shape or dtype"
        elif fault := self._shape_fault() or self._rank_fault():
            yield fault
        else:
            for file in self.files:
                yield from self._slice_faults(file)

    def _shape_fault(self) -> str | None:
        found, own = self.files[0].unsharded_shape, self._own_shape()
        if found != own:
            return f"{quoted(self.first)}: unsharded shape {found}, but {MODEL_CONFIG_NAME} asks for {own}"
        return None

    def _own_shape(self) -> tuple[int, ...]:
        """The unsharded shape by the config: matrices one below the other; those of experts stacked, transposed, side
        by side."""
        stacked = [parameter.stacked for parameter in self.fused if parameter.stacked is not None]
        if stacked:
            return 1 + max(stacked), self.fused[0].matrix_shape[1], sum(self.rows) // (1 + max(stacked))
        return sum(self.rows), *self.fused[0].matrix_shape[1:]

    def _rank_fault(self) -> str | None:
        if self.fused[0].split is None:
            return None
        ranks = sorted(file.rank.tp for file in self.files if file.rank)
        size = max(file.rank.num_tp for file in self.files if file.rank)
        if ranks != list(range(size)):
            return f"{quoted(self.first)}: of {size} tensor-parallel ranks there are {ranks}"
        origins = [origin for file in self.files for _, origin in file.pairs]
        if fault := tiling_fault(origins, Box.whole(self.files[0].unsharded_shape)):
            return f"{quoted(self.first)} and its other ranks do not make up the parameter: {fault}"
        return None

    def _slice_faults(self, file: HeldFile) -> Iterator[str]:
        """Faults of a rank that holds another part than Nanotron gives it: the tp-th part of each fused parameter, one
        below the other."""
        if file.rank is None:
            return
        dim = self._split_dim()
        chunks = self.rows if dim == 0 else [file.unsharded_shape[1]]
        expected, local, begin = [], 0, 0
        for chunk in chunks:
            part = chunk // file.rank.num_tp
            origin = begin + file.rank.tp * part
            expected.append((local, origin, part))
            local, begin = local + part, begin + chunk
        found = [(here.start[dim], there.start[dim], here.shape[dim]) for here, there in file.pairs]
        is_whole = all(there.shape[k] == n for _, there in file.pairs
                       for k, n in enumerate(file.unsharded_shape) if k != dim)
        if found != expected or not is_whole:
            yield (f"{quoted(file.path)}: its header takes (local, global, extent) {found} of dim {dim}, but "
                   f"Nanotron gives tensor-parallel rank {file.rank.tp} of {file.rank.num_tp} {expected}")

    def _split_dim(self) -> int:
        """The dim of the stored array that tensor parallelism splits."""
        parameter = self.fused[0]
        split = parameter.dims.index(parameter.split or "")
        return next(dim for dim, group in enumerate(parameter.matrix) if split in group)
