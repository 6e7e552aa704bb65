"""The files of one Nanotron parameter, checked against the part that Nanotron gives each rank
(`create_sharded_parameter`, nanotron/parallel/sharded_parameters.py)."""
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
    """Facts kept of one weight file; equal values of many files are one object."""

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


def group_faults(fused: list[Parameter], files: list[HeldFile]) -> Iterator[str]:
    """Faults of the files of one Nanotron parameter by Nanotron's own rules; `fused`: the parameters in it."""
    first, split = quoted(files[0].path), fused[0].split
    if any((file.rank is None) != (split is None) for file in files):
        yield f"{first}: {'has no' if split else 'has'} ranks in its name, unlike Nanotron's own file"
    elif len({(file.unsharded_shape, file.dtype) for file in files}) > 1:
        yield f"{first} and its other ranks disagree on unsharded_shape or dtype"
    elif (found := files[0].unsharded_shape) != (shape := _unsharded_shape(fused)):
        yield f"{first}: unsharded shape {found}, but {MODEL_CONFIG_NAME} asks for {shape}"
    elif fault := _rank_fault(files):
        yield f"{first}{fault}"
    else:
        for file in files:
            if file.rank is not None:
                yield from _slice_faults(fused, file, file.rank)


def _rows(fused: list[Parameter]) -> list[int]:
    return [matrix_of(parameter.matrix_shape)[0] for parameter in fused]


def _unsharded_shape(fused: list[Parameter]) -> tuple[int, ...]:
    """The unsharded shape by the config: matrices one below the other; those of experts stacked, transposed, side by
    side."""
    num_rows, (_, *columns) = sum(_rows(fused)), fused[0].matrix_shape
    experts = [parameter.stacked for parameter in fused if parameter.stacked is not None]
    if experts:
        num_experts = 1 + max(experts)
        return num_experts, *columns, num_rows // num_experts
    return num_rows, *columns


def _rank_fault(files: list[HeldFile]) -> str:
    """The fault of the ranks of a sharded parameter, if any: ranks are missing, or their slices do not tile it."""
    ranks = [file.rank for file in files if file.rank]
    size = max((rank.num_tp for rank in ranks), default=0)
    if sorted(rank.tp for rank in ranks) != list(range(size)):
        return f": of {size} tensor-parallel ranks there are {sorted(rank.tp for rank in ranks)}"
    origins = [origin for file in files if file.rank for _, origin in file.pairs]
    if ranks and (fault := tiling_fault(origins, Box.whole(files[0].unsharded_shape))):
        return f" and its other ranks do not make up the parameter: {fault}"
    return ""


def _slice_faults(fused: list[Parameter], file: HeldFile, rank: Rank) -> Iterator[str]:
    """The fault of a rank that holds another part than Nanotron gives it, if any: the tp-th part of each fused
    parameter, one below the other."""
    dim = _split_dim(fused[0])
    expected, local, begin = [], 0, 0
    for extent in _rows(fused) if dim == 0 else [file.unsharded_shape[1]]:
        part = extent // rank.num_tp
        expected.append((local, begin + rank.tp * part, part))
        local, begin = local + part, begin + extent
    found = [(here.start[dim], there.start[dim], here.shape[dim]) for here, there in file.pairs]
    is_whole = all(there.shape[k] == n for _, there in file.pairs
                   for k, n in enumerate(file.unsharded_shape) if k != dim)
    if found != expected or not is_whole:
        yield (f"{quoted(file.path)}: its header takes (local, global, extent) {found} of dim {dim}, but Nanotron "
               f"gives tensor-parallel rank {rank.tp} of {rank.num_tp} {expected}")


def _split_dim(parameter: Parameter) -> int:
    """The dim of the stored array that tensor parallelism splits."""
    return next(dim for dim, group in enumerate(parameter.matrix)
                if any(parameter.dims[index] == parameter.split for index in group))
