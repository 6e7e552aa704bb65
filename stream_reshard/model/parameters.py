"""Parameter, Model: logical weights with their true dims, before any format split, fused or transposed them."""
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from stream_reshard.errors import quoted
from stream_reshard.model.box import Box
from stream_reshard.model.names import Templates, fields_of, indices_of

_BASE = "model."
"""The base_model_prefix of every family here in transformers."""


@dataclass(frozen=True)
class Parameter:
    """One logical weight.

    A query projection is (heads, half, pair, hidden), not a matrix: a head-aligned split is then "split dim heads", and
    the interleaved order of rotary embeddings is an order of the dims half and pair.
    """

    name: str
    """Format-neutral and unique in the model, such as `layers.3.attention.q`."""
    dims: tuple[str, ...]
    """Names of the dims, outermost first."""
    shape: tuple[int, ...]
    """Extent per dim, in elements, without any padding."""
    matrix: tuple[tuple[int, ...], ...]
    """For each dim of the stored array, the dims merged into it: ((0, 1, 2), (3,)) for a query projection."""
    split: str | None
    """The dim that tensor parallelism splits; None where every rank holds the whole parameter."""
    hugging_face: str
    """Name of its tensor in a Hugging Face checkpoint."""
    nanotron: str
    """Name of its parameter in Nanotron, below `model.`; several parameters fused into one share a name."""
    tied_to: str | None = None
    """Name of the parameter whose values it shares; a tied parameter is not stored itself."""
    stacked: int | None = None
    """Index of its expert; None outside of experts. Nanotron stacks all experts in one array (expert, column, row) of
    transposed matrices; the rows of fused matrices stand beside each other."""
    is_float32: bool = False
    """Nanotron keeps the parameter in float32, whatever the dtype of the others."""

    @property
    def whole(self) -> Box:
        """The box of all its elements."""
        return Box.whole(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the stored array, in elements."""
        return tuple(math.prod(self.shape[dim] for dim in group) for group in self.matrix)

    @property
    def num_elements(self) -> int:
        """Count of its weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in every layer, in place of the MLP. Sizes in elements."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    """Intermediate size of one expert."""
    shared_expert_intermediate_size: int
    """Intermediate size of the expert that sees every token."""
    router_aux_loss_coef: float


TokenId = int | tuple[int, ...] | None
"""The id of a special token; a tuple for several ids, as chat models have to end a text; None for no such token."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of the special tokens in the configs of both formats."""

MAX_IDS, MAX_ID = 1000, 2**48
"""Limits on the number of ids for one purpose, and on an id; no model reaches them."""


def parse_token_id(value: Any) -> TokenId:
    """The token id in a JSON value; a list becomes a tuple. Raises ValueError for any other value."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > MAX_IDS or not all(type(id) is int and -1 <= id < MAX_ID for id in ids):
        raise ValueError(f"{quoted(value)} is not a token id")
    return tuple(ids) if isinstance(value, list) else value


def first_id(ids: TokenId) -> int | None:
    """The first of several ids, for a config with room for one."""
    return next(iter(ids), None) if isinstance(ids, tuple) else ids


@dataclass(frozen=True)
class ModelConfig:
    """Settings of a model, under the same names for both formats. Sizes in elements."""

    family: str
    """Name of the architecture table."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    """Rows of the embedding, without padding."""
    tie_word_embeddings: bool
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    initializer_range: float
    hidden_act: str
    bos_token_id: TokenId
    eos_token_id: TokenId
    pad_token_id: TokenId
    unsaid_ids: frozenset[str] = frozenset()
    """Keys of token ids that the config leaves out; their fields hold the defaults of the family."""
    no_rope_layer: int | None = None
    """n: layers n, 2n, 3n ... (counted from 1) have no rotary embedding. None: all layers have it."""
    experts: Experts | None = None
    """The mixture of experts; None where every layer has a plain MLP."""
    whole_num_hidden_layers: int | None = None
    """Number of layers of the whole model, where these are its first ones only; None where they are all."""

    @property
    def token_ids(self) -> dict[str, TokenId]:
        """The token ids that the config gives, by key."""
        return {key: getattr(self, key) for key in TOKEN_IDS if key not in self.unsaid_ids}

    @property
    def head_dim(self) -> int:
        """Extent of one attention head. Nanotron supports no other (nanotron/models/llama.py)."""
        return self.hidden_size // self.num_attention_heads

    @property
    def counts(self) -> dict[str, int]:
        """Extent of each field in the names of parameters: number of layers, and of experts per layer."""
        return {"layer": self.num_hidden_layers} | ({"expert": self.experts.num_experts} if self.experts else {})

    @property
    def sizes(self) -> dict[str, int]:
        """Extent of every named dim of the architecture tables."""
        sizes = {"vocab": self.vocab_size, "hidden": self.hidden_size, "ffn": self.intermediate_size,
                 "heads": self.num_attention_heads, "kv_heads": self.num_key_value_heads,
                 "head_dim": self.head_dim, "half": 2, "pair": self.head_dim // 2, "one": 1}
        if self.experts is None:
            return sizes
        return sizes | {"experts": self.experts.num_experts, "expert_ffn": self.experts.moe_intermediate_size,
                        "shared_ffn": self.experts.shared_expert_intermediate_size}


@dataclass(frozen=True)
class Row:
    """A line of an architecture's table: one parameter, or one per `{layer}` and `{expert}` in the names."""

    parameter: str
    """Format-neutral name."""
    dims: str
    """The true dims, outermost first, with `|` between the dims of the stored array: "hidden | heads head_dim" is a
    matrix."""
    split: str | None
    """The dim that tensor parallelism splits; None where every rank holds the whole parameter."""
    hugging_face: str
    """Tensor name in Hugging Face."""
    nanotron: str
    """Parameter name in Nanotron, below `model.`. Rows that share a name are fused along dim 0, in table order."""
    is_stacked: bool = False
    """Nanotron keeps all experts in one array; see `Parameter.stacked`."""
    is_float32: bool = False
    """Nanotron keeps the parameter in float32."""

    @property
    def per_layer(self) -> bool:
        """The row stands for parameters in each layer."""
        return "{layer}" in self.parameter


@dataclass(frozen=True)
class Model:
    """A model: its config, and the table of its parameters. These are numbered row by row as in the table, and layer by
    layer within a row; each is derived from its number when it is needed."""

    config: ModelConfig
    rows: tuple[Row, ...]
    """In the order of the forward pass; the rows of one layer stand together."""

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Number of the first parameter of each row; the last entry is the count of all parameters."""
        counts = (math.prod(self.config.counts[field] for field in fields_of(row.parameter)) for row in self.rows)
        return tuple(accumulate(counts, initial=0))

    @cached_property
    def _names(self) -> Templates:
        return Templates([row.parameter for row in self.rows], self.config.counts)

    def row_of(self, number: int) -> tuple[int, int]:
        """(index of the row, index within the row) of a parameter."""
        row = bisect_right(self.firsts, number) - 1
        return row, number - self.firsts[row]

    def number_of(self, name: str) -> int:
        """The number of the parameter with this name. Raises KeyError where the model has none."""
        if (found := self._names.find(name)) is None:
            raise KeyError(name)
        return self.firsts[found[0]] + found[1]

    @cached_property
    def _tensors(self) -> Templates:
        return Templates([row.hugging_face for row in self.rows], self.config.counts)

    def number_of_tensor(self, key: str) -> int | None:
        """The number of the parameter in a Hugging Face tensor of this name, in any of its `spellings`; None where the
        model has no such parameter."""
        for spelled in (key, key.removeprefix(_BASE), _BASE + key):
            if found := self._tensors.find(spelled):
                return self.firsts[found[0]] + found[1]
        return None

    def spelling_of(self, number: int, key: str) -> int:
        """Index in `spellings` of the name of a parameter's tensor."""
        return self.spellings(number).index(key)

    def spellings(self, number: int) -> tuple[str, str, str]:
        """The names under which transformers 5 loads a parameter: its own, one with another `model.` in front, and one
        without `model.` (rename_source_key in core_model_loading.py strips or adds that prefix, name by name)."""
        own = self.parameter(number).hugging_face
        return own, _BASE + own, own.removeprefix(_BASE)

    def parameter(self, number: int) -> Parameter:
        """The parameter with this number."""
        index, instance = self.row_of(number)
        row, sizes = self.rows[index], self.config.sizes
        groups = [group.split() for group in row.dims.split("|")]
        dims, ends = [dim for group in groups for dim in group], tuple(accumulate(map(len, groups), initial=0))
        indices = indices_of(row.parameter, self.config.counts, instance)
        return Parameter(
            name=row.parameter.format(**indices), dims=tuple(dims), shape=tuple(sizes[dim] for dim in dims),
            matrix=tuple(tuple(range(first, last)) for first, last in zip(ends, ends[1:])), split=row.split,
            hugging_face=row.hugging_face.format(**indices), nanotron=row.nanotron.format(**indices),
            tied_to="embedding" if self.is_tied(index) else None,
            stacked=indices["expert"] if row.is_stacked else None, is_float32=row.is_float32)

    def is_tied(self, row: int) -> bool:
        """True where the parameters of a row share the values of others; checkpoints need not hold them."""
        return self.rows[row].parameter == "lm_head" and self.config.tie_word_embeddings

    @property
    def stored_rows(self) -> list[int]:
        """The rows whose parameters are stored: all but the tied ones."""
        return [row for row in range(len(self.rows)) if not self.is_tied(row)]

    @property
    def tied_rows(self) -> list[int]:
        """The rows whose parameters are tied."""
        return [row for row in range(len(self.rows)) if self.is_tied(row)]

    def numbers_of(self, row: int) -> range:
        """The numbers of the parameters of a row."""
        return range(self.firsts[row], self.firsts[row + 1])

    def numbers_in(self, row: int, layer: int) -> range:
        """The numbers of the parameters of a row in one layer."""
        numbers = self.numbers_of(row)
        num_each = len(numbers) // self.config.num_hidden_layers
        return numbers[layer * num_each:(layer + 1) * num_each]

    @property
    def num_stored(self) -> int:
        """Count of the stored parameters."""
        return sum(len(self.numbers_of(row)) for row in self.stored_rows)

    @property
    def parameters(self) -> Iterator[Parameter]:
        """Every parameter, in the order of the forward pass."""
        layered = [row for row, _ in enumerate(self.rows) if self.rows[row].per_layer]
        yield from map(self.parameter, self.firsts[:layered[0]])
        for layer in range(self.config.num_hidden_layers):
            for row in layered:
                yield from map(self.parameter, self.numbers_in(row, layer))
        yield from map(self.parameter, self.firsts[layered[-1] + 1:-1])

    def stored(self) -> Iterator[Parameter]:
        """The stored parameters: all but the tied ones."""
        return (parameter for parameter in self.parameters if parameter.tied_to is None)

    @property
    def num_elements(self) -> int:
        """Count of weights, tied ones counted once."""
        return sum(len(self.numbers_of(row)) * self.parameter(self.firsts[row]).num_elements
                   for row in self.stored_rows)
