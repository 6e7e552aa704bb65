"""Row and Family: the shape of an architecture table, and how a table becomes a Model."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stream_reshard.model import Model, ModelConfig, Parameter


@dataclass(frozen=True)
class Row:
    """One parameter, or one per layer where the name holds `{layer}`."""

    parameter: str
    """Format-neutral name."""
    dims: str
    """The true dims, outermost first. A `|` separates what formats merge: "hidden | heads head_dim" is a matrix."""
    split: str | None
    """The dim that tensor parallelism splits (section 4 of Nanotron's format: column and row parallel layers)."""
    hugging_face: str
    """Tensor name in Hugging Face."""
    nanotron: str
    """Parameter name in Nanotron, below `model.`. Rows that share a name are fused along dim 0, in table order."""

    @property
    def per_layer(self) -> bool:
        """Whether there is one such parameter in each layer."""
        return "{layer}" in self.parameter

    def parameter_of(self, config: ModelConfig, layer: int | None) -> Parameter:
        """The parameter this row describes, in one layer."""
        dims: list[str] = []
        matrix = []
        for group in self.dims.split("|"):
            names = group.split()
            matrix.append(tuple(range(len(dims), len(dims) + len(names))))
            dims += names
        tied = self.parameter == "lm_head" and config.tie_word_embeddings
        return Parameter(
            name=self.parameter.format(layer=layer), dims=tuple(dims), shape=tuple(config.sizes[dim] for dim in dims),
            matrix=tuple(matrix), split=self.split, layer=layer, hugging_face=self.hugging_face.format(layer=layer),
            nanotron=self.nanotron.format(layer=layer), tied_to="embedding" if tied else None)


@dataclass(frozen=True)
class Family:
    """An architecture table."""

    name: str
    hugging_face_class: str
    """The class name in config.json's `architectures`."""
    nanotron_configs: tuple[str, ...]
    """Nanotron's config classes that express the family, the usual one first."""
    rows: tuple[Row, ...]
    """In the order of the forward pass; the rows of one layer stand together."""
    tie_by_default: bool = False
    """What a config.json that does not mention `tie_word_embeddings` means."""

    @property
    def has_attention_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return any(row.parameter.endswith("attention.q_bias") for row in self.rows)


def _expanded(rows: tuple[Row, ...], num_layers: int) -> Iterator[tuple[Row, int | None]]:
    """Every row once, and the rows of a layer once per layer, in the order of the forward pass."""
    first = next(i for i, row in enumerate(rows) if row.per_layer)
    last = max(i for i, row in enumerate(rows) if row.per_layer)
    yield from ((row, None) for row in rows[:first])
    yield from ((row, layer) for layer in range(num_layers) for row in rows[first:last + 1])
    yield from ((row, None) for row in rows[last + 1:])


def build_model(family: Family, config: ModelConfig) -> Model:
    """The family's parameters at the sizes that `config` gives."""
    return Model(config, tuple(row.parameter_of(config, layer)
                               for row, layer in _expanded(family.rows, config.num_hidden_layers)))
