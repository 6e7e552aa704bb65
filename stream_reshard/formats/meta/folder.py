"""Reading a folder of Meta's parts: settings, and tensors that are matched with the parameters."""
from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from stream_reshard.errors import Cause, Problems, SourceError, explained, quoted
from stream_reshard.formats.causes import above, unfinished
from stream_reshard.formats.config_json import (
    CONFIG_NAME, INDEX_NAME, PICKLED_INDEX_NAME, PICKLED_NAME, SINGLE_NAME, SourceConfig, read_config)
from stream_reshard.formats.meta.layout import MetaLayout, Split
from stream_reshard.formats.meta.names import BUFFERS, EMBEDDING_KEY, FIRST_Q_KEY, HEAD_KEY, NAMES, key_of, templates_of
from stream_reshard.formats.meta.params import PARAMS_NAME, read_params
from stream_reshard.model.architectures import build_model
from stream_reshard.model.parameters import Model
from stream_reshard.model.truncation import Truncate, is_in_layers, left_out, untruncated
from stream_reshard.storage.dtypes import TORCH_DTYPES
from stream_reshard.storage.header import StoredTensor
from stream_reshard.storage.small_files import names_in
from stream_reshard.storage.source_file import same_bytes
from stream_reshard.storage.torch_file import read_torch_file
from stream_reshard.storage.torch_weights import TorchWeights

_PATTERN = "consolidated*.pth"

_MAX_PROBLEMS = 1000
"""Limit on listed faults of tensors."""


def is_meta(root: Path) -> bool:
    """True for a folder with Meta's parts that has no shards of Hugging Face, which transformers would take."""
    shards = (SINGLE_NAME, INDEX_NAME, PICKLED_NAME, PICKLED_INDEX_NAME)
    return os.path.isdir(root) and not any(os.path.lexists(root / name) for name in shards) and any(found_parts(root))


def found_parts(root: Path) -> Iterator[str]:
    """Names of files that look like parts, in no order. Raises SourceError where the folder may not be read."""
    return (name for name in names_in(root) if fnmatch(name, _PATTERN))


def open_folder(root: Path, max_nbytes: int, problems: Problems, truncate: Truncate = untruncated
                ) -> tuple[SourceConfig | None, Model | None, MetaLayout | None]:
    """Read the settings and the names, sizes and places of all tensors, each of at most `max_nbytes`; of norms, which
    all parts repeat, also the bytes. All problems are added to `problems`; a part with problems is None."""
    found, model, layout = Problems(), None, None
    names = found.collect(_part_names, root)
    first = found.collect(_read_part, root, names[0], max_nbytes) if names else None
    whole = found.collect(_read_settings, root, first, len(names), max_nbytes) if names and first else None
    taken = found.collect(truncate, whole.model) if whole else None
    config = replace(whole, model=taken) if whole and taken else whole
    if names and first and whole and config and taken:
        split = found.collect(_split_of, root, first, whole, len(names))
        model = found.collect(_model_of, config, split, len(first.tensors)) if split else None
        layout = found.collect(_layout_of, root, model, split, names, config.name, max_nbytes,
                               left_out(whole.model, taken)) if model and split else None
    problems.extend(explained(found))
    return config, model, layout


def _part_names(root: Path) -> tuple[str, ...]:
    """The parts in their order. Raises SourceError for a hole in the numbers, or a folder without settings."""
    if not any(os.path.lexists(root / name) for name in (CONFIG_NAME, PARAMS_NAME)):
        raise above(root) or Cause(f"{quoted(root)} holds parts of Meta's format, but neither {PARAMS_NAME} nor "
                                   f"{CONFIG_NAME}, which give the sizes of the model; download {PARAMS_NAME} too")
    found = set(found_parts(root))
    wanted = [f"consolidated.{number:02}.pth" for number in range(len(found))]
    if missing := next((name for name in wanted if name not in found), None):
        raise Cause(f"{quoted(root)} holds {quoted(max(found - {*wanted}))}, but no {missing}: parts are numbered from "
                    f"00 on, without a hole; {unfinished(root) or 'download every part under its own name'}")
    return tuple(wanted)


def _read_part(root: Path, name: str, max_nbytes: int) -> TorchWeights:
    return read_torch_file(root, name, max_nbytes).weights()


def _tensor_in(part: TorchWeights, key: str) -> StoredTensor | None:
    return next((tensor for tensor in part.tensors if tensor.key == key), None)


def _matrix_in(part: TorchWeights, key: str) -> StoredTensor:
    """A matrix that every part has. Raises SourceError."""
    tensor = _tensor_in(part, key)
    if tensor is None or len(tensor.shape) != 2:
        raise SourceError(f"{quoted(part.path)} has no matrix {key}: it is no part of a Llama in Meta's format")
    return tensor


def _read_settings(root: Path, first: TorchWeights, num_parts: int, max_nbytes: int) -> SourceConfig:
    """The settings by config.json, or else by params.json and the first part. Raises SourceError or Refused."""
    if not os.path.lexists(root / CONFIG_NAME):
        embedding, head = _matrix_in(first, EMBEDDING_KEY), _tensor_in(first, HEAD_KEY)
        # Llama 3.2 is tied and stores its head nevertheless; models of several parts are not tied.
        is_tied = head is None or (num_parts == 1 and same_bytes(root, head, embedding))
        return read_params(root, embedding, num_parts, is_tied, max_nbytes)
    config = read_config(root, max_nbytes)
    if strange := next((row.parameter for row in config.family.rows if row.parameter not in NAMES), None):
        raise SourceError(f"{CONFIG_NAME}: {config.family.name} has parameters ({strange}) without a name in Meta's "
                          f"format; the parts are of another model")
    return config


def _split_of(root: Path, first: TorchWeights, config: SourceConfig, num_parts: int) -> Split:
    """The split by the shapes in the first part. Raises SourceError where there are too few parts, or too many."""
    hidden, q = config.model.hidden_size, _matrix_in(first, FIRST_Q_KEY)
    rows, columns = q.shape
    if columns == hidden and 0 < rows <= hidden and hidden % rows == 0 and hidden // rows != num_parts:
        cure = "download the others" if num_parts < hidden // rows else "remove those of another model"
        raise Cause(f"{quoted(root)} holds {num_parts} parts, but {first.path} is one of {hidden // rows}: {q.key} has "
                    f"the shape {q.shape} there, and {hidden} rows in all; {cure}")
    return Split(num_parts, "vocab" if _matrix_in(first, EMBEDDING_KEY).shape[1] == hidden else "hidden")


def _model_of(config: SourceConfig, split: Split, num_tensors: int) -> Model:
    """The model. Raises SourceError where the parts cannot hold it, before anything large is derived from it."""
    num_layers = config.model.num_hidden_layers
    if num_layers > num_tensors:
        raise SourceError(f"{config.name}: the model has {num_layers} layers, but each part holds {num_tensors} "
                          f"tensors in all")
    model = build_model(config.family, config.model)
    for dim, size in split.uneven(model):
        raise SourceError(f"{config.name}: {size} {dim} cannot be split evenly by the {split.num_parts} parts")
    return model


def _layout_of(root: Path, model: Model, split: Split, names: tuple[str, ...], config_name: str, max_nbytes: int,
               absent: range) -> MetaLayout:
    """Match the tensors of all parts with the parameters. Raises Refused."""
    found = _Found(model, split, names, config_name, absent)
    for part, name in enumerate(names):
        found.add(part, _read_part(root, name, max_nbytes))
    found.add_missing()
    found.problems.raise_if_any()
    layout = found.layout(root)
    for tensor, other in layout.repeats():
        if not same_bytes(root, tensor, other):
            raise SourceError(f"{tensor.key} in {tensor.file} differs from {other.key} in {other.file}: " + (
                "the parts are of several models; download all parts of one" if tensor.key == other.key else
                f"set tie_word_embeddings in {config_name} to false if the model has a head of its own"))
    return layout


class _Found:
    """The tensors of the parts, matched with the parameters of a model."""

    def __init__(self, model: Model, split: Split, names: tuple[str, ...], config_name: str, absent: range):
        """`absent`: layers whose tensors are passed over."""
        self.problems = Problems()
        """Faults of tensors; at most _MAX_PROBLEMS."""
        self._model, self._split, self._names = model, split, names
        self._config_name, self._absent, self._templates = config_name, absent, templates_of(model)
        self._shapes = [split.shape_of(model.parameter(first)) for first in model.firsts[:-1]]
        self._begins = tuple(array("Q", [0]) * model.firsts[-1] for _ in names)
        self._dtypes = [""] * model.firsts[-1]
        self._sizes: list[int] = []
        self._ignored: dict[str, str] = {}

    def add(self, part: int, file: TorchWeights) -> None:
        """Add the tensors of a part."""
        self._sizes.append(file.nbytes)
        for tensor in file.tensors:
            if is_in_layers(tensor.key, self._absent):
                continue
            if place := self._templates.find(tensor.key):
                self._add(part, tensor, place, file.strides.get(tensor.key))
            elif tensor.key in BUFFERS:
                self._ignored[tensor.key] = f"follows from {self._config_name}"
            else:
                self._complain(f"unexpected tensor {quoted(tensor.key)} in {tensor.file}: a Llama of Meta does not "
                               f"have it", "tensors are unexpected")

    def _add(self, part: int, tensor: StoredTensor, place: tuple[int, int], strides: tuple[int, ...] | None) -> None:
        row, number = place[0], self._model.firsts[place[0]] + place[1]
        self._begins[part][number] = tensor.begin
        dtype = self._dtypes[number] = self._dtypes[number] or tensor.dtype
        if tensor.shape != self._shapes[row]:
            self._complain(f"{tensor.key} has the shape {tensor.shape} in {tensor.file}, but {self._config_name} asks "
                           f"for {self._shapes[row]} in each of {len(self._names)} parts",
                           f"tensors have other shapes than {self._config_name} asks for")
        elif tensor.dtype not in TORCH_DTYPES:
            self._complain(f"{tensor.key} has the dtype {tensor.dtype} in {tensor.file}: it is quantised; take the "
                           f"model before it was quantised", "tensors are quantised")
        elif tensor.dtype != dtype:
            self._complain(f"{tensor.key} has the dtype {tensor.dtype} in {tensor.file}, and {dtype} in another part; "
                           f"download all parts of one model", "tensors have several dtypes")
        elif strides:
            self._complain(f"{tensor.key} of shape {tensor.shape} has the strides {strides} in {tensor.file}, so it is "
                           f"not in one piece; save it again after .contiguous()", "tensors are not in one piece")

    def add_missing(self) -> None:
        """Add a problem for every tensor that a part lacks. A tied head may be in all parts or in none."""
        for number in range(self._model.firsts[-1]):
            if self._dtypes[number] or not self._model.is_tied(self._model.row_of(number)[0]):
                for name, begins in zip(self._names, self._begins):
                    if not begins[number]:
                        self._complain(f"{key_of(self._model, number)} is missing in {name}", "tensors are missing")

    def _complain(self, text: str, kind: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(SourceError(text, kind=kind))
        else:
            self.problems[-1].num_more += 1

    def layout(self, root: Path) -> MetaLayout:
        """The layout, when there are no problems."""
        if any(self._dtypes[self._model.firsts[row]] for row in self._model.tied_rows):
            self._ignored[HEAD_KEY] = f"tied to {EMBEDDING_KEY}"
        return MetaLayout(root, self._model, self._names, self._sizes, self._split, self._begins, self._dtypes,
                          self._ignored)
