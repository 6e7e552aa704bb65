"""The shards of a Hugging Face folder, and what its index says of them.

Names in the index are checked before they become paths; names of tensors never do. Links in the folder are followed,
as the cache of huggingface_hub consists of them. An index may be larger than what the limit on memory lets be parsed at
once, so it is read piece by piece, and of a tensor that the model has only the number is kept.
"""
from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stream_reshard.box import has_twins
from stream_reshard.errors import Problems, Refused, SourceError, quoted
from stream_reshard.header import MAX_HEADER_NBYTES, TensorFile, read_header
from stream_reshard.json_stream import JsonReader, TooLong
from stream_reshard.model import Model
from stream_reshard.small_files import MAX_JSON_NBYTES, open_regular, read_error, too_long

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")

MAX_PROBLEMS = 1000
"""More of one kind are not listed: a hostile index must not fill the memory with what is wrong with it."""

MAX_KEY_NBYTES = 2**14
"""No tensor that is ignored has a longer name."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass
class Index:
    """What an index says: in which shard each tensor is. Shards go by their index in `shards`."""

    shards: list[str] = field(default_factory=list)
    num_tensors: int = 0
    numbers: array[int] = field(default_factory=lambda: array("Q"))
    """Numbers of the parameters that it names, as it comes to them."""
    places: array[int] = field(default_factory=lambda: array("I"))
    """The shard of each of them."""
    others: dict[str, int] = field(default_factory=dict)
    """The shard of each tensor that the model does not have."""
    num_more: int = 0
    """How many more of those there are than any good source has; nothing is kept of them."""

    def told(self, num_parameters: int) -> array[int]:
        """Per parameter the place that the index says and 1; 0 where it does not name it."""
        told = array("I", [0]) * num_parameters
        for number, place in zip(self.numbers, self.places):
            told[number] = place + 1
        return told


@dataclass(frozen=True)
class Shards:
    """The shards of a folder."""

    names: tuple[str, ...]
    num_tensors: int
    """How many tensors they hold, as far as is known before all are opened."""
    single: TensorFile | None = None
    """The only shard, where there is no index."""
    index: Index = field(default_factory=Index)


def open_shards(root: Path, model: Model | None, max_nbytes: int = MAX_HEADER_NBYTES) -> Shards:
    """Find the shards, by the index where there is one. Raises SourceError or Refused.

    Nothing that is parsed at once may have more than `max_nbytes`. Without a model, of which config.json told, nothing
    is kept of what the index says of tensors.
    """
    single, index = (root / SINGLE_NAME).is_file(), (root / INDEX_NAME).is_file()
    if single and index:
        raise SourceError(f"{quoted(root)} holds both {SINGLE_NAME} and {INDEX_NAME}; remove the one that is stale")
    if single:
        file = read_header(root, SINGLE_NAME, max_nbytes)
        return Shards((SINGLE_NAME,), len(file.tensors), file)
    if not index:
        raise _without_shards(root)
    return _from_index(root, model, max_nbytes)


def _without_shards(root: Path) -> SourceError:
    """Why a folder without single file and index is refused, with what to do."""
    pickled = sorted(path.name for pattern in _PICKLED for path in root.glob(pattern))
    if pickled:
        return SourceError(
            f"{quoted(root)} holds pickled weights ({quoted(pickled[0])}), which are never opened because they can run "
            f"code; convert them where you trust them: AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(NEW)")
    shards = sorted(path.name for path in root.glob("*.safetensors"))
    if shards:
        return SourceError(f"{quoted(root)} holds {len(shards)} shards such as {quoted(shards[0])}, but no "
                           f"{INDEX_NAME}")
    return SourceError(f"{quoted(root)} holds neither {SINGLE_NAME} nor {INDEX_NAME}: it is not a Hugging Face "
                       f"checkpoint")


def _from_index(root: Path, model: Model | None, max_nbytes: int) -> Shards:
    try:
        with open_regular(root / INDEX_NAME) as stream:
            index = _Reading(root, model).whole(JsonReader(stream, MAX_JSON_NBYTES, max_nbytes))
    except OSError as error:
        raise read_error(f"{quoted(INDEX_NAME)} in {quoted(root)}", error) from error
    except ValueError as error:
        raise SourceError(f"{INDEX_NAME} is not valid JSON: {error}") from error
    except TooLong as error:
        raise too_long(INDEX_NAME, error.limit, MAX_JSON_NBYTES) from error
    # Shards by name, whatever the order in which the index came to them.
    order = sorted(range(len(index.shards)), key=index.shards.__getitem__)
    rank = {old: new for new, old in enumerate(order)}
    index.places = array("I", map(rank.__getitem__, index.places))
    index.others = {key: rank[place] for key, place in index.others.items()}
    index.shards = [index.shards[old] for old in order]
    return Shards(tuple(index.shards), index.num_tensors, None, index)


class _Reading:
    """Reads an index."""

    def __init__(self, root: Path, model: Model | None):
        self._root, self._model, self._index = root, model, Index()
        self._problems = Problems()
        self._known: dict[str, int] = {}
        """Places by name. A shard that is refused has one too, so that it is refused once."""
        self._max_others = MAX_PROBLEMS + (model.config.num_hidden_layers if model else 0)

    def whole(self, reader: JsonReader) -> Index:
        """Read to the end. Raises SourceError, Refused, ValueError for what is no JSON, TooLong."""
        if reader.next() != "{":
            raise SourceError(f"{INDEX_NAME} holds a {type(reader.value()).__name__}, not an object")
        seen: set[int] = set()
        for key in reader.keys():
            if hash(key) in seen:
                raise ValueError("a key occurs twice")
            seen.add(hash(key))
            if len(seen) > MAX_PROBLEMS:
                raise SourceError(f"{INDEX_NAME} has more than {MAX_PROBLEMS} keys beside weight_map")
            if key == "weight_map" and reader.next() == "{":
                self._read_map(reader.entries())
            else:
                reader.value()
        if reader.next():
            raise ValueError("something stands behind its end")
        if has_twins(self._index.numbers):
            raise ValueError("a key occurs twice")
        self._problems.raise_if_any()
        if not self._index.num_tensors:
            raise SourceError(f"{INDEX_NAME} has no weight_map")
        return self._index

    def _read_map(self, entries: Iterator[tuple[str, Any]]) -> None:
        index, find = self._index, self._model.number_of_tensor if self._model else lambda key: None
        for key, name in entries:
            index.num_tensors += 1
            place = self._known[name] if isinstance(name, str) and name in self._known else self._place_of(name)
            if (number := find(key)) is not None:
                index.numbers.append(number)
                index.places.append(place)
            elif key in index.others:
                raise ValueError("a key occurs twice")
            elif len(key) <= MAX_KEY_NBYTES and len(index.others) < self._max_others:
                index.others[key] = place
            else:
                index.num_more += 1

    def _place_of(self, name: Any) -> int:
        """The place of a shard that was not met before. Raises Refused where it is no name at all."""
        if len(self._problems) >= MAX_PROBLEMS:
            return 0
        fault = self._fault_of(name)
        if fault is None:
            self._index.shards.append(name)
            return self._known.setdefault(name, len(self._index.shards) - 1)
        text = f"a {type(name).__name__}" if isinstance(name, (list, dict)) else name
        self._problems.append(SourceError(f"{INDEX_NAME} names {quoted(text)}, which is {fault}"))
        if not isinstance(name, str):
            raise Refused(self._problems)
        if len(name) <= MAX_KEY_NBYTES:
            self._known[name] = 0
        return 0

    def _fault_of(self, name: Any) -> str | None:
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            return "not a safetensors file in the folder"
        return "missing" if len(name) > 255 or not (self._root / name).is_file() else None
