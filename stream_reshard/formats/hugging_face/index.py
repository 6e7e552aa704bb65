"""The shards of a Hugging Face folder, and what its index says of them.

Names in the index are checked before they become paths; names of tensors never do. Links in the folder are followed,
as the cache of huggingface_hub consists of them. An index may be larger than what the limit on memory lets be parsed at
once, so it is read piece by piece, and of a tensor that the model has only the number is kept.
"""
from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stream_reshard.errors import Cause, Problems, Refused, SourceError, StreamReshardError, quoted
from stream_reshard.formats.causes import no_weights, unfinished
from stream_reshard.formats.hugging_face.pickled import SAFETENSORS, Kind, kind_of, read_weights
from stream_reshard.model.box import has_duplicates
from stream_reshard.model.parameters import Model
from stream_reshard.storage.header import MAX_HEADER_NBYTES, TensorFile
from stream_reshard.storage.json_stream import JsonReader, TooLong
from stream_reshard.storage.small_files import (
    MAX_JSON_NBYTES, dangling, misplaced, open_regular, read_error, read_json, too_long)
from stream_reshard.storage.stand_ins import answer

MAX_PROBLEMS = 1000
"""More of one kind are not listed: a hostile index must not fill the memory with what is wrong with it."""

_MISSING = "missing"

MAX_KEY_NBYTES = 2**14
"""No tensor that is ignored has a longer name."""


@dataclass
class Index:
    """The shard of each tensor, as an index names it. Shards go by their index in `shards`."""

    shards: list[str] = field(default_factory=list)
    num_tensors: int = 0
    numbers: array[int] = field(default_factory=lambda: array("Q"))
    """Numbers of the parameters that it names, as it comes to them."""
    shard_numbers: array[int] = field(default_factory=lambda: array("I"))
    """The shard of each of them."""
    others: dict[str, int] = field(default_factory=dict)
    """The shard of each tensor that the model does not have."""
    num_more: int = 0
    """Number of further tensors that the model does not have, not kept: no good source has so many."""

    def told(self, num_parameters: int) -> array[int]:
        """For each parameter 1 + the index of its shard; 0 where the index does not name it."""
        told = array("I", [0]) * num_parameters
        for number, shard in zip(self.numbers, self.shard_numbers):
            told[number] = shard + 1
        return told


@dataclass(frozen=True)
class Shards:
    """The shards of a folder."""

    names: tuple[str, ...]
    num_tensors: int
    """Number of tensors in the shards, as far as is known before all are opened."""
    single: TensorFile | None = None
    """The only shard, where there is no index."""
    index: Index = field(default_factory=Index)
    kind: Kind = SAFETENSORS


def open_shards(root: Path, model: Model | None, max_nbytes: int = MAX_HEADER_NBYTES) -> Shards:
    """Find the shards, by the index where there is one. Raises SourceError or Refused.

    Nothing that is parsed at once may have more than `max_nbytes`. Without a model, of which config.json told, nothing
    is kept of what the index says of tensors.
    """
    shards = _found_shards(root, model, max_nbytes)
    for name in shards.names:
        if os.path.lexists(root / f"{name}.aria2"):  # It has its full size from the start, whatever is in it.
            raise Cause(f"{quoted(name)} is not downloaded whole: {quoted(f'{name}.aria2')} stands beside it, which "
                        f"aria2 keeps until then; let it finish, or download the shard again")
    return shards


def _found_shards(root: Path, model: Model | None, max_nbytes: int) -> Shards:
    kind = kind_of(root)
    single, index = os.path.isfile(root / kind.single), os.path.isfile(root / kind.index)
    if single and index:
        return _single_in_index(root, kind, model, max_nbytes)
    if single:
        file = read_weights(root, kind.single, max_nbytes)
        return Shards((kind.single,), len(file.tensors), file, kind=kind)
    if not index:
        raise no_weights(root)
    return _from_index(root, kind, model, max_nbytes)


def _single_in_index(root: Path, kind: Kind, model: Model | None, max_nbytes: int) -> Shards:
    """A single shard that an index names too, and no other, as mlx-lm writes it. Raises SourceError for one that names
    others: transformers would not look at it, but one of the two is stale."""
    try:
        shards = _from_index(root, kind, model, max_nbytes)
        if shards.names == (kind.single,):
            return shards
    except Cause:
        raise
    except StreamReshardError:
        pass
    raise SourceError(f"{quoted(root)} holds both {kind.single} and an {kind.index} that is not of it alone; remove "
                      f"the one that is stale")


def _from_index(root: Path, kind: Kind, model: Model | None, max_nbytes: int) -> Shards:
    try:
        with open_regular(root / kind.index) as stream:
            index = _Reading(root, kind, model).whole(JsonReader(stream, MAX_JSON_NBYTES, max_nbytes))
    except OSError as error:
        raise read_error(f"{quoted(kind.index)} in {quoted(root)}", error) from error
    except ValueError as error:
        raise misplaced(root, kind.index, "JSON") or SourceError(f"{kind.index} is not valid JSON: {error}") from error
    except TooLong as error:
        raise too_long(kind.index, error.limit, MAX_JSON_NBYTES) from error
    # Shards by name, whatever the order in which the index came to them.
    order = sorted(range(len(index.shards)), key=index.shards.__getitem__)
    rank = {old: new for new, old in enumerate(order)}
    index.shard_numbers = array("I", map(rank.__getitem__, index.shard_numbers))
    index.others = {key: rank[shard] for key, shard in index.others.items()}
    index.shards = [index.shards[old] for old in order]
    return Shards(tuple(index.shards), index.num_tensors, None, index, kind)


def _without_map(root: Path, kind: Kind) -> SourceError:
    try:
        said = answer(read_json(root, kind.index, 2**16, ()), "weight_map")
    except StreamReshardError:
        said = None
    if said:
        return Cause(f"{quoted(kind.index)} in {quoted(root)} {said}")
    return SourceError(f"{kind.index} has no weight_map; download it again, it tells which tensor is where")


class _Reading:
    """Reads an index."""

    def __init__(self, root: Path, kind: Kind, model: Model | None):
        self._root, self._kind, self._model, self._index = root, kind, model, Index()
        self._name = kind.index
        self._problems = Problems()
        self._known: dict[str, int] = {}
        """Places by name. A shard that is refused has one too, so that it is refused once."""
        self._max_others = MAX_PROBLEMS + (model.config.num_hidden_layers if model else 0)

    def whole(self, reader: JsonReader) -> Index:
        """Read to the end. Raises SourceError, Refused, ValueError for what is no JSON, TooLong."""
        if reader.next() != "{":
            raise SourceError(f"{self._name} holds a {type(reader.value()).__name__}, not an object")
        num_keys = num_maps = 0
        for key in reader.keys():
            num_keys += 1
            if num_keys > MAX_PROBLEMS:
                raise SourceError(f"{self._name} has more than {MAX_PROBLEMS} keys beside weight_map")
            num_maps += key == "weight_map"
            if key == "weight_map" and reader.next() == "{":
                self._read_map(reader.entries())
            else:
                reader.value()  # Nobody asks for it, whatever it is.
        if reader.next():
            raise ValueError("something stands behind its end")
        if num_maps > 1:
            raise SourceError(f"{self._name}: weight_map occurs twice")
        self._problems.raise_if_any()
        self._refuse_twins()
        if not self._index.num_tensors:
            raise _without_map(self._root, self._kind)
        return self._index

    def _refuse_twins(self) -> None:
        """Raises SourceError for a tensor that the index has twice, in different shards."""
        index = self._index
        for part in range(64 if has_duplicates(index.numbers) else 0):  # In parts, as has_duplicates does it.
            pairs = sorted(number << 32 | shard for number, shard in zip(index.numbers, index.shard_numbers)
                           if number & 63 == part)
            for one, other in zip(pairs, pairs[1:]):
                if one >> 32 == other >> 32 and one != other and self._model:
                    self._refuse_twin(self._model.parameter(one >> 32).hugging_face)

    def _refuse_twin(self, key: str) -> None:
        pattern = re.compile(re.escape(json.dumps(key)).encode() + rb"\s*:")
        with open_regular(self._root / self._name) as stream:
            lines = [str(number) for number, line in enumerate(stream, 1) for _ in pattern.findall(line)][:5]
        where = f" in line{'s' * (len(lines) > 1)} {' and '.join(lines)}" if lines else ""
        raise SourceError(f"{self._name}: {quoted(key)} occurs twice with different values{where}")

    def _read_map(self, entries: Iterator[tuple[str, Any]]) -> None:
        index, find = self._index, self._model.number_of_tensor if self._model else lambda key: None
        for key, name in entries:
            index.num_tensors += 1
            shard = self._known[name] if isinstance(name, str) and name in self._known else self._shard_of(name)
            if (number := find(key)) is not None:
                index.numbers.append(number)
                index.shard_numbers.append(shard)
            elif key in index.others:
                if index.others[key] != shard:
                    self._refuse_twin(key)
            elif len(key) <= MAX_KEY_NBYTES and len(index.others) < self._max_others:
                index.others[key] = shard
            else:
                index.num_more += 1

    def _shard_of(self, name: Any) -> int:
        """The number of a shard that was not met before. Raises Refused where it is no name at all."""
        if len(self._problems) >= MAX_PROBLEMS:
            return 0
        fault = self._fault_of(name)
        if fault is None:
            self._index.shards.append(name)
            return self._known.setdefault(name, len(self._index.shards) - 1)
        text = f"a {type(name).__name__}" if isinstance(name, (list, dict)) else name
        cause = dangling(self._root, name) if fault == _MISSING and len(name) <= 255 else None
        hint = self._unfinished if fault == _MISSING else None
        problem = (Cause if hint else SourceError)(
            f"{self._name} names {quoted(text)}, which is {fault}{f'; {hint}' if hint else ''}",
            kind="shards are missing" if fault == _MISSING else "")
        self._problems.append(cause or problem)
        if not isinstance(name, str):
            raise Refused(self._problems)
        if len(name) <= MAX_KEY_NBYTES:
            self._known[name] = 0
        return 0

    @cached_property
    def _unfinished(self) -> str | None:
        return unfinished(self._root)

    def _fault_of(self, name: Any) -> str | None:
        if not isinstance(name, str) or not self._kind.shard_name.fullmatch(name):
            return f"not a {self._kind.word} file in the folder"
        return _MISSING if len(name) > 255 or not (self._root / name).is_file() else None
