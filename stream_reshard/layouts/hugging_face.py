"""The Hugging Face layout: config.json, and every parameter a tensor of its own in one of the shards."""
from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from stream_reshard.architectures import build_model
from stream_reshard.box import Box
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.header import ITEMSIZE, MAX_HEADER_NBYTES, StoredTensor, TensorFile, read_header
from stream_reshard.layouts.base import TORCH_DTYPES, Group, Layout, Slice
from stream_reshard.layouts.hf_config import CONFIG_NAME, SourceConfig, read_config
from stream_reshard.layouts.hf_shards import INDEX_NAME, MAX_PROBLEMS, Index, Shards, open_shards
from stream_reshard.model import Model
from stream_reshard.names import Templates
from stream_reshard.small_files import MAX_JSON_NBYTES

_BUFFERS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
"""Tensors that old versions of transformers saved; they follow from config.json."""

_DTYPES = (None, *ITEMSIZE)
"""Dtypes by the code under which the layout keeps them; 0 is a tensor that is not there."""

_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True, eq=False)
class HuggingFaceLayout(Layout):
    """What is where in a folder of shards. Per parameter 13 bytes are kept; shape and name are the model's to say."""

    format = "Hugging Face"
    shards: tuple[str, ...]
    """Their names."""
    sizes: array[int] = field(repr=False)
    """Of each shard, in bytes."""
    places: array[int] = field(repr=False)
    """Per parameter the index of its shard."""
    begins: array[int] = field(repr=False)
    """Per parameter the offset of its first byte in the shard."""
    codes: array[int] = field(repr=False)
    """Per parameter the code of its dtype; 0 where it is not there, which only a tied one may be."""
    ignored: Mapping[str, str]
    """Stored tensors that hold no parameter, with the reason."""

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.sizes)

    @property
    def dtypes(self) -> set[str]:
        """Every dtype that occurs."""
        return {str(_DTYPES[code]) for code in set(self.codes) if code}

    def tensor_of(self, number: int) -> StoredTensor | None:
        """The tensor of a parameter, of a tied one too; None where it is not there."""
        if not self.codes[number]:
            return None
        parameter = self.model.parameter(number)
        return StoredTensor(self.shards[self.places[number]], parameter.hugging_face, self.dtype_at(number),
                            parameter.matrix_shape, self.begins[number])

    def count_dtypes(self) -> dict[str, int]:
        """How many tensors have which dtype."""
        return {str(_DTYPES[code]): count for code, count in Counter(self.codes).items() if code}

    def tied(self) -> Iterator[tuple[StoredTensor, StoredTensor]]:
        """Tensors that are there although they are tied, each with the one whose values it must have."""
        firsts = self.model.firsts
        for number in (firsts[row] for row in range(len(self.model.rows)) if self.model.is_tied(row)):
            if (tensor := self.tensor_of(number)) and (name := self.model.parameter(number).tied_to):
                yield tensor, self.slices[name][0].tensor

    def slices_of(self, number: int) -> tuple[Slice, ...]:
        parameter, tensor = self.model.parameter(number), self.tensor_of(number)
        if tensor is None or parameter.tied_to:
            return ()
        return (Slice(parameter.name, parameter.whole, tensor, Box.whole(tensor.shape), parameter.matrix),)

    def dtype_at(self, number: int) -> str:
        return str(_DTYPES[self.codes[number]])

    def likeness_of(self, number: int) -> int:
        return self.codes[number]

    def places_of(self, number: int) -> tuple[tuple[int, int], ...]:
        return ((self.places[number], self.begins[number]),)

    @property
    def num_groups(self) -> int:
        return len(self.shards)

    @property
    def num_files(self) -> int:
        return len(self.shards)

    @cached_property
    def _by_place(self) -> array[int]:
        """The stored parameters in the order of their bytes."""
        firsts = self.model.firsts
        stored = [number for row in self.model.stored_rows for number in range(firsts[row], firsts[row + 1])]
        return array("I", sorted(stored, key=lambda number: self.places[number] << 48 | self.begins[number]))

    def group(self, position: int) -> Group:
        first = bisect_left(self._by_place, position, key=self.places.__getitem__)
        last = bisect_left(self._by_place, position + 1, key=self.places.__getitem__)
        return Group(position, position, tuple(self._by_place[first:last]))

    @property
    def paths(self) -> Iterator[str]:
        return iter(self.shards)

    def paths_of(self, group: Group) -> list[str]:
        return [self.shards[group.position]]

    def files_of(self, group: Group) -> tuple[TensorFile, ...]:
        tensors = (part.tensor for number in group.numbers for part in self.slices_of(number))
        return (TensorFile(self.shards[group.position], tuple(tensors)),)


def open_folder(root: Path, max_nbytes: int, problems: Problems, check: Callable[[Shards], None] = lambda shards: None
                ) -> tuple[SourceConfig | None, Model | None, HuggingFaceLayout | None]:
    """Read the config and all headers of a Hugging Face folder, none of more than `max_nbytes`, as far as they make
    sense; everything wrong goes to `problems`. `check` raises SourceError where there is more than can be opened."""
    config = problems.collect(open_config, root, max_nbytes)
    table = build_model(config.family, config.model) if config else None
    shards = problems.collect(open_shards, root, table, max_nbytes) if os.path.isdir(root) else None
    if config is None or shards is None:
        return config, None, None
    num_before = len(problems)
    problems.collect(check, shards)
    model = problems.collect(model_of, config, shards) if len(problems) == num_before else None
    return config, model, problems.collect(layout_of, root, model, shards, max_nbytes) if model else None


def open_config(root: Path, max_nbytes: int = MAX_JSON_NBYTES) -> SourceConfig:
    """The config of a Hugging Face folder, of at most `max_nbytes`. Raises SourceError or Refused."""
    if not os.path.isdir(root):
        raise SourceError(f"{quoted(root)} is not a folder")
    if not (root / CONFIG_NAME).is_file():
        raise SourceError(f"{quoted(root)} holds no {CONFIG_NAME}: it is not a Hugging Face checkpoint")
    return read_config(root, max_nbytes)


def model_of(config: SourceConfig, shards: Shards) -> Model:
    """The model that the config describes. Raises SourceError where the shards are far from enough for its layers."""
    model = build_model(config.family, config.model)
    num_layers, num_tensors = config.model.num_hidden_layers, shards.num_tensors
    if num_layers > num_tensors or model.num_stored > num_tensors + MAX_PROBLEMS:
        raise SourceError(f"config.json: num_hidden_layers is {num_layers}, but the shards hold {num_tensors} tensors "
                          f"in all")
    return model


def layout_of(root: Path, model: Model, shards: Shards, max_nbytes: int = MAX_HEADER_NBYTES) -> HuggingFaceLayout:
    """Read the headers of all shards, each of at most `max_nbytes`, and match the tensors in them with the index and
    with the model's parameters. Raises Refused."""
    told = shards.index.told(model.firsts[-1])
    found, problems = _Found(model, shards.names), Problems()
    for place, name in enumerate(shards.names):
        file = shards.single or problems.collect(read_header, root, name, max_nbytes)
        if file is not None:
            found.add(place, file)
        if len(problems) + len(found.problems) > MAX_PROBLEMS:
            break
    problems.raise_if_any()
    if len(found.problems) <= MAX_PROBLEMS:  # All were opened.
        if not shards.single:
            problems.extend([*found.twins, *found.differences(told, shards.index)])
            problems.raise_if_any()
        problems.extend(found.missing())
    problems.extend(found.problems)
    problems.raise_if_any()
    return found.layout(root)


class _Found:
    """The tensors that the headers name, matched with the parameters of a model."""

    def __init__(self, model: Model, names: tuple[str, ...]):
        self.model, self.names = model, names
        self.twins = Problems()
        self.problems = Problems()
        """Of tensors that are not what the model asks for."""
        self._places, self._begins, self._codes = (array(kind, [0]) * model.firsts[-1] for kind in "IQB")
        self._sizes = array("Q")
        self._others: dict[str, int] = {}
        """Places of tensors that the model does not have."""
        self._buffers = Templates(_BUFFERS, model.config.counts)
        self._shapes = [model.parameter(first).matrix_shape for first in model.firsts[:-1]]

    def add(self, place: int, file: TensorFile) -> None:
        """The tensors of one shard."""
        for tensor in file.tensors:
            number = self.model.number_of_tensor(tensor.key)
            if number is None:
                self._add_other(place, tensor)
                continue
            if self._codes[number]:
                self._note_twin(tensor, self._places[number])
            self._places[number], self._begins[number] = place, tensor.begin
            self._codes[number] = _CODES[tensor.dtype]
            row, _ = self.model.row_of(number)
            if not self.model.is_tied(row) and (tensor.shape != self._shapes[row] or tensor.dtype not in TORCH_DTYPES):
                self._complain(_fault(tensor, self._shapes[row]))
        self._sizes.append(file.nbytes)

    def _add_other(self, place: int, tensor: StoredTensor) -> None:
        if tensor.key in self._others:
            self._note_twin(tensor, self._others[tensor.key])
        if not self._buffers.find(tensor.key):
            self._complain(f"unexpected tensor {quoted(tensor.key)} in {tensor.file}: a {self.model.config.family} "
                           f"model of this config does not have it")
        if len(self.problems) <= MAX_PROBLEMS:
            self._others[tensor.key] = place

    def _note_twin(self, tensor: StoredTensor, place: int) -> None:
        if len(self.twins) < MAX_PROBLEMS:
            self.twins.append(SourceError(f"{quoted(tensor.key)} is in both {self.names[place]} and "
                                          f"{tensor.file}"))

    def _complain(self, text: str) -> None:
        if len(self.problems) <= MAX_PROBLEMS:
            self.problems.append(SourceError(text))

    def differences(self, told: array[int], index: Index) -> Iterator[SourceError]:
        """Tensors that are not where the index has `told` (per parameter the place and 1, or 0)."""
        actual = array("I", (code and place + 1 for place, code in zip(self._places, self._codes)))
        if index.num_more:
            yield SourceError(f"{INDEX_NAME} names {index.num_more} tensors and more that a {self.model.config.family} "
                              f"model of this config does not have")
        differ = ((self.model.parameter(number).hugging_face, told[number] - 1, actual[number] - 1)
                  for number in range(len(told) if told != actual else 0) if told[number] != actual[number])
        others = ((key, index.others.get(key, -1), self._others.get(key, -1))
                  for key in sorted(index.others.keys() | self._others.keys()))
        for key, said, place in islice((row for row in chain(differ, others) if row[1] != row[2]), MAX_PROBLEMS):
            actual_name = self.names[place] if place >= 0 else "no shard"
            yield SourceError(f"{quoted(key)} is in {actual_name}, but {INDEX_NAME} says "
                              f"{quoted(self.names[said]) if said >= 0 else 'nothing of it'}")

    def missing(self) -> Iterator[SourceError]:
        """Parameters that no tensor holds."""
        model, firsts = self.model, self.model.firsts
        numbers = (number for row in model.stored_rows for number in range(firsts[row], firsts[row + 1])
                   if not self._codes[number])
        for parameter in map(model.parameter, islice(numbers, MAX_PROBLEMS)):
            hint = "; is the model tied? then config.json must say so" if parameter.name == "lm_head" else ""
            yield SourceError(f"{parameter.hugging_face} is missing{hint}")

    def layout(self, root: Path) -> HuggingFaceLayout:
        """The layout, once all is as it should be."""
        firsts = self.model.firsts
        ignored = {self.model.parameter(firsts[row]).hugging_face: f"tied to {self._key_of('embedding')}"
                   for row in range(len(self.model.rows)) if self.model.is_tied(row) and self._codes[firsts[row]]}
        ignored |= dict.fromkeys(self._others, "follows from config.json")
        return HuggingFaceLayout(root, self.model, self.names, self._sizes, self._places, self._begins, self._codes,
                                 ignored)

    def _key_of(self, name: str) -> str:
        return self.model.parameter(self.model.number_of(name)).hugging_face


def _fault(tensor: StoredTensor, shape: tuple[int, ...]) -> str:
    """Why a tensor cannot be taken for a parameter of this shape."""
    if tensor.shape != shape:
        return f"{tensor.key} has the shape {tensor.shape}, but config.json asks for {shape}"
    return f"{tensor.key} has the dtype {tensor.dtype}: it is quantised; dequantise the model first"
