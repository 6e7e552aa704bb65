"""Reading a Hugging Face folder: config.json, and shards whose tensors are matched with the parameters."""
from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from stream_reshard.errors import Problems, SourceError, explained, quoted
from stream_reshard.formats.causes import no_checkpoint
from stream_reshard.formats.config_json import CONFIG_NAME, SourceConfig, read_config
from stream_reshard.formats.hugging_face.causes import cause_of
from stream_reshard.formats.hugging_face.index import MAX_PROBLEMS, Index, Shards, open_shards
from stream_reshard.formats.hugging_face.layout import CODES, SPELLING, TRANSPOSED, HuggingFaceLayout
from stream_reshard.formats.hugging_face.pickled import is_transposed, read_weights, strides_of
from stream_reshard.model.architectures import build_model
from stream_reshard.model.parameters import Model
from stream_reshard.model.truncation import Truncate, is_in_layers, left_out, untruncated
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.header import MAX_HEADER_NBYTES, NO_HEADER, StoredTensor, TensorFile
from stream_reshard.storage.small_files import MAX_JSON_NBYTES
from stream_reshard.storage.torch_file import NO_TORCH_FILE

_MAX_FAULTS = 10_000
"""Limit on faults of tensors; when there are more, no further shard is opened."""

_BUFFER = "rotary_emb.inv_freq"
"""Part of the names of tensors that old versions of transformers saved and new ones ignore (modeling_utils.py), because
config.json determines them."""


def open_folder(root: Path, max_nbytes: int, problems: Problems, check: Callable[[Shards], None] = lambda shards: None,
                truncate: Truncate = untruncated
                ) -> tuple[SourceConfig | None, Model | None, HuggingFaceLayout | None]:
    """Read the config and all headers of a Hugging Face folder, each of at most `max_nbytes`. All problems are added to
    `problems`; a part with problems is None. `check` may raise SourceError to refuse the shards before they are read.
    Shards that hold nothing of the layers that `truncate` takes are not opened, and need not exist.
    """
    found = Problems()
    whole = found.collect(open_config, root, max_nbytes)
    taken = found.collect(truncate, whole.model) if whole else None
    config = replace(whole, model=taken) if whole and taken else whole
    described = build_model(whole.family, taken) if whole and taken else None
    absent = left_out(whole.model, taken) if whole and taken else range(0)
    has_config = config is not None or os.path.isfile(root / CONFIG_NAME)
    shards = found.collect(open_shards, root, described, max_nbytes, absent) if has_config else None
    model, layout = None, None
    if config is not None and described is not None and shards is not None:
        num_before = len(found)
        found.collect(check, shards)
        if len(found) == num_before:
            model = found.collect(model_of, described, shards)
            layout = found.collect(layout_of, root, model, shards, max_nbytes) if model else None
            if layout is None and not any(problem.kind in (NO_HEADER, NO_TORCH_FILE) for problem in found):
                found.extend(filter(None, [cause_of(root, config, model, shards, max_nbytes)]))
    problems.extend(explained(found))
    return config, model, layout


def open_config(root: Path, max_nbytes: int = MAX_JSON_NBYTES) -> SourceConfig:
    """The config of a Hugging Face folder, of at most `max_nbytes`. Raises SourceError or Refused."""
    if not os.path.isfile(root / CONFIG_NAME):
        raise no_checkpoint(root)
    return read_config(root, max_nbytes)


def model_of(model: Model, shards: Shards) -> Model:
    """The model, unless the shards have far too few tensors for it: then raises SourceError."""
    num_layers, num_tensors = model.config.num_hidden_layers, shards.num_tensors
    if num_layers > num_tensors or model.num_stored > num_tensors + MAX_PROBLEMS:
        raise SourceError(f"config.json: num_hidden_layers is {num_layers}, but the shards hold {num_tensors} tensors "
                          f"in all")
    return model


def layout_of(root: Path, model: Model, shards: Shards, max_nbytes: int = MAX_HEADER_NBYTES) -> HuggingFaceLayout:
    """Read the headers of all shards, each of at most `max_nbytes`, and match their tensors with the index and with the
    parameters of the model. Raises Refused."""
    indexed = shards.index.shard_by_parameter(model.firsts[-1])
    found, problems = _Found(model, shards.names, shards.left_out), Problems()
    for shard, name in enumerate(shards.names):
        file = shards.single or problems.collect(read_weights, root, name, max_nbytes)
        if file is not None:
            found.add(shard, file)
        if len(problems) > MAX_PROBLEMS or found.num_faults > _MAX_FAULTS:
            break
    problems.raise_if_any()
    if found.num_faults <= _MAX_FAULTS:  # All shards were opened.
        problems.extend(found.duplicates)
        if not shards.single:
            problems.extend(found.differences(indexed, shards))
        problems.raise_if_any()
        problems.extend(found.missing())
    problems.extend(found.faults)
    problems.raise_if_any()
    return found.layout(root, indexed, shards)


class _Found:
    """The tensors in the headers, matched with the parameters of a model."""

    def __init__(self, model: Model, names: tuple[str, ...], left_out: range):
        """`names`: of the shards. `left_out`: layers whose tensors are passed over."""
        self.model, self.names, self._left_out = model, names, left_out
        self.duplicates = Problems()
        """Tensors that occur twice; at most MAX_PROBLEMS."""
        self.faults = Problems()
        """Tensors that the model does not have, or with another shape or dtype; at most MAX_PROBLEMS."""
        self.num_faults = 0
        """Count of all such tensors."""
        self._shard_numbers, self._begins, self._codes = (array(kind, [0]) * model.firsts[-1] for kind in "IQB")
        self._sizes = array("Q")
        self._others: dict[str, int] = {}
        """Shard of each tensor that the model does not have."""
        self._shapes = [model.parameter(first).matrix_shape for first in model.firsts[:-1]]

    def add(self, shard: int, file: TensorFile) -> None:
        """Add the tensors of one shard."""
        for tensor in file.tensors:
            if is_in_layers(tensor.key, self._left_out):
                continue
            number = self.model.number_of_tensor(tensor.key)
            if number is None:
                self._add_other(shard, tensor)
                continue
            if self._codes[number]:
                self._add_duplicate(tensor, self._shard_numbers[number])
            self._shard_numbers[number], self._begins[number] = shard, tensor.begin
            self._codes[number] = CODES[tensor.dtype] + SPELLING * self.model.spelling_of(number, tensor.key)
            row, _ = self.model.row_of(number)
            if not self.model.is_tied(row) and (tensor.shape != self._shapes[row] or tensor.dtype not in TORCH_DTYPES):
                self._add_fault(*_fault(tensor, self._shapes[row]))
            elif strides := strides_of(file, tensor):
                self._add_strided(number, tensor, strides)
        self._sizes.append(file.nbytes)

    def _add_strided(self, number: int, tensor: StoredTensor, strides: tuple[int, ...]) -> None:
        """A tensor that does not stand in C order. A head that is tied is compared by its bytes, so it has to."""
        if is_transposed(tensor, strides) and not self.model.is_tied(self.model.row_of(number)[0]):
            self._codes[number] += TRANSPOSED
        else:
            self._add_fault(f"{tensor.key} of shape {tensor.shape} has the strides {strides} in {tensor.file}, so it "
                            f"is not in one piece; save it again after .contiguous(), or as safetensors",
                            "tensors are not in one piece")

    def _add_other(self, shard: int, tensor: StoredTensor) -> None:
        if tensor.key in self._others:
            self._add_duplicate(tensor, self._others[tensor.key])
        if _BUFFER not in tensor.key:
            self._add_fault(f"unexpected tensor {quoted(tensor.key)} in {tensor.file}: a {self.model.config.family} "
                            f"model of this config does not have it", "tensors are unexpected")
        if len(self._others) < MAX_PROBLEMS + self.model.config.num_hidden_layers:
            self._others[tensor.key] = shard

    def _add_duplicate(self, tensor: StoredTensor, shard: int) -> None:
        """Add a tensor that is in `shard` already."""
        if len(self.duplicates) < MAX_PROBLEMS:
            both = f"both {self.names[shard]} and {tensor.file}"
            where = both if self.names[shard] != tensor.file else f"{tensor.file} under two names"
            self.duplicates.append(SourceError(f"{quoted(tensor.key)} is in {where}", kind="tensors are there twice"))

    def _add_fault(self, text: str, kind: str) -> None:
        self.num_faults += 1
        if len(self.faults) < MAX_PROBLEMS:
            self.faults.append(SourceError(text, kind=kind))
        else:
            self.faults[-1].num_more += 1

    def _shards_of_others(self, index: Index, is_buffer: bool) -> Iterator[tuple[str, int, int]]:
        """(name, shard in the index, actual shard) of tensors that the model does not have; -1 for no shard."""
        return ((key, index.others.get(key, -1), self._others.get(key, -1))
                for key in sorted(index.others.keys() | self._others.keys()) if (_BUFFER in key) == is_buffer)

    def differences(self, indexed: array[int], shards: Shards) -> Iterator[SourceError]:
        """Tensors in another shard than in the index. `indexed`: per parameter 1 + its shard in the index, or 0."""
        index, index_name = shards.index, shards.kind.index
        actual = array("I", (code and shard + 1 for shard, code in zip(self._shard_numbers, self._codes)))
        if index.num_more:
            yield SourceError(f"{index_name} names {index.num_more} tensors and more that a {self.model.config.family} "
                              f"model of this config does not have")
        differ = ((self.model.parameter(number).hugging_face, indexed[number] - 1, actual[number] - 1)
                  for number in range(len(indexed) if indexed != actual else 0) if indexed[number] != actual[number]
                  and not self.model.is_tied(self.model.row_of(number)[0]))
        rows = (row for row in chain(differ, self._shards_of_others(index, False)) if row[1] != row[2])
        for key, in_index, shard in islice(rows, MAX_PROBLEMS):
            entry = f"names {quoted(self.names[in_index])}" if in_index >= 0 else "does not name it"
            yield SourceError(f"{quoted(key)} is in {self._name(shard)}, but {index_name} {entry}",
                              kind=f"tensors are not in the shards that {index_name} names")

    def _untrue(self, indexed: array[int], shards: Shards) -> Iterator[str]:
        """Remarks on wrong entries of the index for tensors that are not read: a tied head, buffers."""
        index = shards.index
        firsts = self.model.firsts
        tied = ((self.model.parameter(firsts[row]).hugging_face, indexed[firsts[row]] - 1,
                 self._shard_numbers[firsts[row]] if self._codes[firsts[row]] else -1)
                for row in self.model.tied_rows)
        for key, in_index, shard in chain(tied, self._shards_of_others(index, True)):
            if in_index != shard:
                verb = "names" if in_index >= 0 else "does not name"
                yield f"{shards.kind.index} {verb} {quoted(key)}, which is in {self._name(shard)}; it is not needed"

    def _name(self, shard: int) -> str:
        return self.names[shard] if shard >= 0 else "no shard"

    def missing(self) -> Iterator[SourceError]:
        """Stored parameters without a tensor."""
        num_more = max(0, sum(1 for _ in self._absent()) - MAX_PROBLEMS)
        for i, parameter in enumerate(map(self.model.parameter, islice(self._absent(), MAX_PROBLEMS))):
            hint = "; is the model tied? then config.json must say so" if parameter.name == "lm_head" else ""
            yield SourceError(f"{parameter.hugging_face} is missing{hint}", kind="tensors are missing",
                              num_more=0 if i else num_more)

    def _absent(self) -> Iterator[int]:
        return (number for row in self.model.stored_rows for number in self.model.numbers_of(row)
                if not self._codes[number])

    def layout(self, root: Path, indexed: array[int], shards: Shards) -> HuggingFaceLayout:
        """The layout, when there are no faults. `indexed`: per parameter 1 + its shard in the index, or 0."""
        firsts = self.model.firsts
        ignored = {self.model.parameter(firsts[row]).hugging_face: f"tied to {self._key_of('embedding')}"
                   for row in self.model.tied_rows if self._codes[firsts[row]]}
        ignored |= dict.fromkeys(self._others, "follows from config.json")
        untrue = self._untrue(indexed, shards) if shards.index.shards else ()
        notes = (*shards.kind.notes, *self._respelled(), *untrue)
        return HuggingFaceLayout(root, self.model, self.names, self._sizes, self._shard_numbers, self._begins,
                                 self._codes, ignored, notes)

    def _respelled(self) -> Iterator[str]:
        """Remarks on tensors under another spelling of their name: their count, and an example."""
        codes = [code % TRANSPOSED for code in self._codes]
        for spelling, count in sorted(Counter(code // SPELLING for code in codes if code).items()):
            number = next(number for number, code in enumerate(codes) if code // SPELLING == spelling)
            names = self.model.spellings(number)
            if spelling:
                yield (f"{count} tensors have names with {('', 'one more', 'no')[spelling]} 'model.' in front, such as "
                       f"{quoted(names[spelling])}; read as {quoted(names[0])}, as transformers reads them")

    def _key_of(self, name: str) -> str:
        return self.model.parameter(self.model.number_of(name)).hugging_face


def _fault(tensor: StoredTensor, shape: tuple[int, ...]) -> tuple[str, str]:
    """(reason to refuse a tensor for a parameter of this shape, plural noun phrase for such tensors)."""
    if tensor.shape != shape:
        return (f"{tensor.key} has the shape {tensor.shape}, but config.json asks for {shape}",
                "tensors have other shapes than config.json asks for")
    return (f"{tensor.key} has the dtype {tensor.dtype}: it is quantised; dequantise the model first",
            "tensors are quantised")
