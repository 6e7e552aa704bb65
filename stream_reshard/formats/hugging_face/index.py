"""The shards of a Hugging Face folder, and the shard of each tensor by its index.

Names of shards are checked before they become paths; names of tensors never become paths. Links in the folder are
followed, because the cache of huggingface_hub consists of links. A large index does not fit into the limit on memory
when parsed at once, so it is read piece by piece, and a tensor of the model is kept as a number.
"""
from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stream_reshard.errors import Cause, Problems, Refused, SourceError, StreamReshardError, quoted
from stream_reshard.formats.causes import no_weights, unfinished
from stream_reshard.formats.hugging_face.pickled import SAFETENSORS, Kind, kind_of, read_weights
from stream_reshard.model.box import has_duplicates
from stream_reshard.model.parameters import Model
from stream_reshard.model.truncation import is_in_layers
from stream_reshard.storage.header import MAX_HEADER_NBYTES, TensorFile
from stream_reshard.storage.json_stream import JsonReader, TooLong
from stream_reshard.storage.small_files import (
    MAX_JSON_NBYTES, dangling, misplaced, open_regular, read_error, read_json, too_long)
from stream_reshard.storage.stand_ins import answer

MAX_PROBLEMS = 1000
"""Limit on the listed problems of one kind, so that those of a hostile index do not fill the memory."""

_MISSING = "missing"

MAX_KEY_NBYTES = 2**14
"""Limit on the name of a tensor that the model does not have, if it is to be kept."""


@dataclass
class Index:
    """The shard of each tensor, by an index. A shard is given by its position in `shards`."""

    shards: list[str] = field(default_factory=list)
    num_tensors: int = 0
    numbers: array[int] = field(default_factory=lambda: array("Q"))
    """Numbers of the parameters in the index, in its order."""
    shard_numbers: array[int] = field(default_factory=lambda: array("I"))
    """The shard of each parameter in `numbers`."""
    others: dict[str, int] = field(default_factory=dict)
    """The shard of each tensor that the model does not have, by name."""
    num_more: int = 0
    """Count of further tensors that the model does not have. They are not kept: no good source has so many."""
    passed_over: set[str] = field(default_factory=set)
    """Shards of tensors that are left out; at most MAX_PROBLEMS."""

    def shard_by_parameter(self, num_parameters: int) -> array[int]:
        """For each parameter 1 + its shard; 0 where the index does not name it."""
        shards = array("I", [0]) * num_parameters
        for number, shard in zip(self.numbers, self.shard_numbers):
            shards[number] = shard + 1
        return shards


@dataclass(frozen=True)
class Shards:
    """The shards of a folder."""

    names: tuple[str, ...]
    num_tensors: int
    """Count of tensors by the index, or in the only shard."""
    single: TensorFile | None = None
    """The only shard; None where there is an index."""
    index: Index = field(default_factory=Index)
    kind: Kind = SAFETENSORS
    left_out: range = range(0)
    """Layers whose tensors are passed over."""


def open_shards(root: Path, model: Model | None, max_nbytes: int = MAX_HEADER_NBYTES,
                left_out: range = range(0)) -> Shards:
    """Find the shards, by the index where there is one. Raises SourceError or Refused.

    `max_nbytes`: limit on a header, and on a value in the index. Without a model (config.json has problems), all
    tensors count as tensors that the model does not have. `left_out`: layers whose tensors are passed over; shards that
    hold nothing else are no part of the result.
    """
    shards = replace(_found_shards(_Reading(root, kind_of(root), model, left_out), max_nbytes), left_out=left_out)
    for name in shards.names:
        if os.path.lexists(root / f"{name}.aria2"):  # aria2 gives a file its full size before any bytes.
            raise Cause(f"{quoted(name)} is not downloaded whole, because aria2's {quoted(f'{name}.aria2')} is still "
                        f"beside it; let aria2 finish, or download the shard again")
    return shards


def _found_shards(reading: _Reading, max_nbytes: int) -> Shards:
    root, kind = reading.root, reading.kind
    single, index = os.path.isfile(root / kind.single), os.path.isfile(root / kind.index)
    if single and index:
        return _single_in_index(reading, max_nbytes)
    if single:
        file = read_weights(root, kind.single, max_nbytes)
        return Shards((kind.single,), len(file.tensors), file, kind=kind)
    if not index:
        raise no_weights(root)
    return _from_index(reading, max_nbytes)


def _single_in_index(reading: _Reading, max_nbytes: int) -> Shards:
    """The shards of a folder with a single shard and an index of it alone, as mlx-lm writes them. Raises SourceError
    for any other index: transformers would ignore it, but one of the two is stale."""
    root, kind = reading.root, reading.kind
    try:
        shards = _from_index(reading, max_nbytes)
        if shards.names == (kind.single,):
            return shards
    except Cause:
        raise
    except StreamReshardError:
        pass
    raise SourceError(f"{quoted(root)} holds both {kind.single} and an {kind.index} that is invalid or names other "
                      f"shards; remove the stale one")


def _from_index(reading: _Reading, max_nbytes: int) -> Shards:
    root, kind = reading.root, reading.kind
    try:
        with open_regular(root / kind.index) as stream:
            index = reading.whole(JsonReader(stream, MAX_JSON_NBYTES, max_nbytes))
    except OSError as error:
        raise read_error(f"{quoted(kind.index)} in {quoted(root)}", error) from error
    except ValueError as error:
        raise misplaced(root, kind.index, "JSON") or SourceError(f"{kind.index} is not valid JSON: {error}") from error
    except TooLong as error:
        raise too_long(kind.index, error.limit, MAX_JSON_NBYTES) from error
    # The shards are sorted by name.
    order = sorted(range(len(index.shards)), key=index.shards.__getitem__)
    rank = {old: new for new, old in enumerate(order)}
    index.shard_numbers = array("I", map(rank.__getitem__, index.shard_numbers))
    index.others = {key: rank[shard] for key, shard in index.others.items()}
    index.shards = [index.shards[old] for old in order]
    return Shards(tuple(index.shards), index.num_tensors, None, index, kind)


def _without_map(root: Path, kind: Kind) -> SourceError:
    """Reason to refuse an index without weight_map."""
    try:
        message = answer(read_json(root, kind.index, 2**16, ()), "weight_map")
    except StreamReshardError:
        message = None
    if message:
        return Cause(f"{quoted(kind.index)} in {quoted(root)} {message}")
    return SourceError(f"{kind.index} has no weight_map; download it again: it names the shard of each tensor")


class _Reading:
    """Reads an index."""

    def __init__(self, root: Path, kind: Kind, model: Model | None, left_out: range):
        self.root, self.kind, self._model, self._left_out, self._index = root, kind, model, left_out, Index()
        self._name = kind.index
        self._problems = Problems()
        self._known: dict[str, int] = {}
        """The shard of each name. A refused name has shard 0, so that it is refused only once."""
        self._max_others = MAX_PROBLEMS + (model.config.num_hidden_layers if model else 0)

    def whole(self, reader: JsonReader) -> Index:
        """The whole index. Raises SourceError, Refused, TooLong, or ValueError for invalid JSON."""
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
                reader.value()  # Other keys are not used.
        if reader.next():
            raise ValueError("there is text after its end")
        if num_maps > 1:
            raise SourceError(f"{self._name}: weight_map occurs twice")
        self._problems.raise_if_any()
        self._refuse_duplicates()
        if not self._index.num_tensors:
            raise _without_map(self.root, self.kind)
        return self._index

    def _refuse_duplicates(self) -> None:
        """Raises SourceError for a tensor that the index names twice, in different shards."""
        index = self._index
        for part in range(64 if has_duplicates(index.numbers) else 0):  # Sorted in parts to save memory.
            pairs = sorted(number << 32 | shard for number, shard in zip(index.numbers, index.shard_numbers)
                           if number & 63 == part)
            for one, other in zip(pairs, pairs[1:]):
                if one >> 32 == other >> 32 and one != other and self._model:
                    self._refuse_duplicate(self._model.parameter(one >> 32).hugging_face)

    def _refuse_duplicate(self, key: str) -> None:
        pattern = re.compile(re.escape(json.dumps(key)).encode() + rb"\s*:")
        with open_regular(self.root / self._name) as stream:
            lines = [str(number) for number, line in enumerate(stream, 1) for _ in pattern.findall(line)][:5]
        where = f" in line{'s' * (len(lines) > 1)} {' and '.join(lines)}" if lines else ""
        raise SourceError(f"{self._name}: {quoted(key)} occurs twice with different values{where}")

    def _read_map(self, entries: Iterator[tuple[str, Any]]) -> None:
        index, find = self._index, self._model.number_of_tensor if self._model else lambda key: None
        for key, name in entries:
            if is_in_layers(key, self._left_out):
                if isinstance(name, str) and len(name) <= 255 and len(index.passed_over) < MAX_PROBLEMS:
                    index.passed_over.add(name)
                continue
            index.num_tensors += 1
            shard = self._known[name] if isinstance(name, str) and name in self._known else self._shard_of(name)
            if (number := find(key)) is not None:
                index.numbers.append(number)
                index.shard_numbers.append(shard)
            elif key in index.others:
                if index.others[key] != shard:
                    self._refuse_duplicate(key)
            elif len(key) <= MAX_KEY_NBYTES and len(index.others) < self._max_others:
                index.others[key] = shard
            else:
                index.num_more += 1

    def _shard_of(self, name: Any) -> int:
        """The shard of a name that is new. Raises Refused for a value that is not a string."""
        if len(self._problems) >= MAX_PROBLEMS:
            return 0
        fault = self._fault_of(name)
        if fault is None:
            self._index.shards.append(name)
            return self._known.setdefault(name, len(self._index.shards) - 1)
        text = f"a {type(name).__name__}" if isinstance(name, (list, dict)) else name
        cause = dangling(self.root, name) if fault == _MISSING and len(name) <= 255 else None
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
        return unfinished(self.root)

    def _fault_of(self, name: Any) -> str | None:
        if not isinstance(name, str) or not self.kind.shard_name.fullmatch(name):
            return f"not a {self.kind.word} file in the folder"
        return _MISSING if len(name) > 255 or not (self.root / name).is_file() else None
