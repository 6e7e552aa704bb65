"""The Hugging Face layout to be written: each stored parameter is one tensor, in shards of a bounded size.

Each tensor is in the shard in which `save_pretrained` would put it (`split_torch_state_dict_into_shards`,
huggingface_hub/serialization/_base.py): tensors follow the order of the modules, and a new shard begins when the next
tensor would make the current one too large.
"""
from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from stream_reshard.formats.config_json import SINGLE_NAME
from stream_reshard.formats.layout import Group, Layout, Slice
from stream_reshard.model.box import Box
from stream_reshard.storage.dtypes import ITEMSIZE
from stream_reshard.storage.header import StoredTensor, TensorFile, placed, planned_file

DEFAULT_MAX_SHARD_NBYTES = 5 * 10**9
"""The default of huggingface_hub."""

_METADATA = {"format": "pt"}
"""Metadata that transformers requires in a header."""

_MODULES = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
"""The modules of a layer, in the order of LlamaDecoderLayer in transformers (modeling_llama.py)."""

_NUM_CACHED = 4
"""Shards whose tensors are remembered."""


@dataclass(frozen=True, eq=False)
class HuggingFaceTarget(Layout):
    """The layout that `save_pretrained` would write for a model."""

    format = "Hugging Face"
    dtypes: Callable[[int], str]
    """The safetensors dtype of each parameter, by its number."""
    max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES
    """Largest number of bytes in the tensors of a shard; a larger tensor has a shard of its own."""
    begins: Callable[[Group], Sequence[int]] | None = None
    """Offset of the data in each file of a group, in bytes; None for the shortest headers."""
    _cached: list[tuple[int, dict[int, StoredTensor]] | None] = field(default_factory=lambda: [None] * _NUM_CACHED,
                                                                      repr=False)
    """(position, tensor per parameter) of a few shards. Threads need no lock: all compute the same entry."""

    @cached_property
    def _order(self) -> array[int]:
        """The stored parameters, in the order of the modules in transformers."""
        model = self.model
        modules: dict[str, int] = {}
        sort_keys: dict[int, tuple[int, int, int]] = {}
        for row in model.stored_rows:
            name = model.rows[row].hugging_face
            module = modules.setdefault(name.rpartition(".")[0], row)  # A module's bias follows its weight.
            sort_keys[row] = _position_in_layer(name), module, row
        layered = sorted((row for row in sort_keys if model.rows[row].per_layer), key=sort_keys.__getitem__)
        order = array("I", (model.firsts[row] for row in sort_keys if row < min(layered)))
        for layer in range(model.config.num_hidden_layers):
            for row in layered:
                order.extend(model.numbers_in(row, layer))
        order.extend(model.firsts[row] for row in sort_keys if row > max(layered))
        return order

    @cached_property
    def _shards(self) -> tuple[array[int], array[int]]:
        """(index in `_order` of the first parameter of each shard, shard of each parameter)."""
        starts, shard_numbers, nbytes = array("I", [0]), array("I", [0]) * self.model.firsts[-1], 0
        for index, number in enumerate(self._order):
            own = self.model.parameter(number).num_elements * ITEMSIZE[self.dtypes(number)]
            if nbytes and nbytes + own > self.max_shard_nbytes:
                starts.append(index)
                nbytes = 0
            nbytes += own
            shard_numbers[number] = len(starts) - 1
        return starts, shard_numbers

    @property
    def num_groups(self) -> int:
        return len(self._shards[0])

    @property
    def num_files(self) -> int:
        return self.num_groups

    def group(self, position: int) -> Group:
        starts = self._shards[0]
        stop = starts[position + 1] if position + 1 < len(starts) else len(self._order)
        return Group(position, position, tuple(self._order[starts[position]:stop]))

    def paths_of(self, group: Group) -> list[str]:
        return [self._name(group.position)]

    def _name(self, position: int) -> str:
        if self.num_groups == 1:
            return SINGLE_NAME
        return f"model-{position + 1:05d}-of-{self.num_groups:05d}.safetensors"

    def files_of(self, group: Group) -> tuple[TensorFile, ...]:
        path = self._name(group.position)
        parameters = map(self.model.parameter, group.numbers)
        file = planned_file(path, [(parameter.hugging_face, self.dtypes(number), parameter.matrix_shape)
                                   for number, parameter in zip(group.numbers, parameters)], _METADATA)
        return (placed(file, path, self.begins(group)[0]) if self.begins else file,)

    def _tensor_of(self, number: int) -> StoredTensor:
        position = self._shards[1][number]
        cached = self._cached[position % _NUM_CACHED]
        if cached is None or cached[0] != position:
            group = self.group(position)
            cached = position, dict(zip(group.numbers, self.files_of(group)[0].tensors))
            self._cached[position % _NUM_CACHED] = cached
        return cached[1][number]

    def slices_of(self, number: int) -> tuple[Slice, ...]:
        parameter = self.model.parameter(number)
        if parameter.tied_to:
            return ()
        tensor = self._tensor_of(number)
        return (Slice(parameter.name, parameter.whole, tensor, Box.whole(tensor.shape), parameter.matrix),)

    def dtype_at(self, number: int) -> str:
        return self.dtypes(number)

    def storage_class(self, number: int) -> str:
        return self.dtypes(number)

    def locations_of(self, number: int) -> tuple[tuple[int, int], ...]:
        return ((self._shards[1][number], self._tensor_of(number).begin),)

    def aligned(self, begins: Callable[[Group], Sequence[int]]) -> HuggingFaceTarget:
        return replace(self, begins=begins, _cached=[None] * _NUM_CACHED)

    def weight_map(self) -> Iterator[tuple[str, str]]:
        """(tensor, shard) of each stored parameter, in the order of the shards."""
        return ((self.model.parameter(number).hugging_face, self._name(self._shards[1][number]))
                for number in self._order)

    @property
    def total_nbytes(self) -> int:
        """Bytes of all tensors: `total_size` in the index."""
        return sum(self.model.parameter(number).num_elements * ITEMSIZE[self.dtypes(number)] for number in self._order)


def _position_in_layer(key: str) -> int:
    """Position of a tensor's module in its layer."""
    return next((position for position, name in enumerate(_MODULES) if f".{name}." in key), 0)
