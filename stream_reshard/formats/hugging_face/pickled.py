"""The two kinds of shards: safetensors, and files that torch.save pickled, which are read without unpickling them.

transformers takes the first where both are there (modeling_utils.py, _get_resolved_checkpoint_files).
"""
from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from heapq import nsmallest
from pathlib import Path

from stream_reshard.errors import quoted
from stream_reshard.formats.config_json import INDEX_NAME, PICKLED_INDEX_NAME, PICKLED_NAME, SINGLE_NAME
from stream_reshard.storage.header import SHARD_NAME, StoredTensor, TensorFile, read_header
from stream_reshard.storage.small_files import names_in
from stream_reshard.storage.torch_file import read_torch_file
from stream_reshard.storage.torch_weights import BIN_NAME, TorchWeights

_MAX_LISTED = 16
"""Files that are named."""


@dataclass(frozen=True)
class Kind:
    """A kind of shards, by its names."""

    word: str
    single: str
    """Of the only shard."""
    index: str
    shard_name: re.Pattern[str]
    """Names that an index may give."""
    pattern: str
    """Names of what is taken for a shard in the folder."""
    notes: tuple[str, ...] = ()
    """Remarks on how such shards are read."""


SAFETENSORS = Kind("safetensors", SINGLE_NAME, INDEX_NAME, SHARD_NAME, "*.safetensors")
PICKLED = Kind(".bin", PICKLED_NAME, PICKLED_INDEX_NAME, BIN_NAME, "pytorch_model*.bin",
               ("weights are read from pickled files (pytorch_model*.bin) without unpickling them",))


def kind_of(root: Path) -> Kind:
    """The kind of the shards in a folder. A link that leads to no safetensors is no reason to take others."""
    safe, pickled = (any(os.path.lexists(root / name) for name in (kind.single, kind.index))
                     for kind in (SAFETENSORS, PICKLED))
    return PICKLED if pickled and not safe else SAFETENSORS


def read_weights(root: Path, name: str, max_nbytes: int) -> TensorFile:
    """The tensors of a shard; see `read_header` and `read_torch_file`."""
    if name.endswith(".bin"):
        return read_torch_file(root, name, max_nbytes).weights()
    return read_header(root, name, max_nbytes)


def strides_of(file: TensorFile, tensor: StoredTensor) -> tuple[int, ...] | None:
    """The strides of a tensor that does not stand in C order, in elements."""
    return file.strides.get(tensor.key) if isinstance(file, TorchWeights) else None


def is_transposed(tensor: StoredTensor, strides: tuple[int, ...] | None) -> bool:
    """True for a matrix that stands column by column: the file holds the other matrix in C order."""
    return len(tensor.shape) == 2 and strides == (1, tensor.shape[0])


def file_notes(root: Path, kind: Kind, shards: Collection[str]) -> Iterator[str]:
    """Remarks on files of weights beside the shards."""
    yield from _others(root, kind.pattern, set(shards), "files that no index names, ignored")
    if kind is SAFETENSORS:
        yield from _others(root, PICKLED.pattern, (), "pickled weights beside the safetensors, ignored")


def _others(root: Path, pattern: str, known: Collection[str], what: str) -> Iterator[str]:
    """A remark on the files of a pattern that are not known, with the first of them by name; none without any."""
    def others() -> Iterator[str]:
        return (name for name in names_in(root)
                if fnmatch(name, pattern) and name not in known and not name.startswith("._"))

    if num_others := sum(1 for _ in others()):
        listed = ", ".join(map(quoted, nsmallest(_MAX_LISTED, others())))
        more = f" and {num_others - _MAX_LISTED} more" if num_others > _MAX_LISTED else ""
        yield f"{what}: {listed}{more}"
