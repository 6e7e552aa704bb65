"""Family: an architecture table, and the Model made from it."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stream_reshard.model.parameters import Model, ModelConfig, Row


@dataclass(frozen=True)
class Family:
    """An architecture table."""

    name: str
    hugging_face_class: str
    """The class name in config.json's `architectures`."""
    model_type: str
    """Key by which transformers chooses a class: `model_type` in config.json."""
    nanotron_configs: tuple[str, ...]
    """Nanotron's config classes that express the family, the usual one first."""
    rows: tuple[Row, ...]
    """The parameters in the order of the forward pass; the rows of a layer follow each other."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that every written config.json of the family gets."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """The family's own defaults for keys that a config.json leaves out."""
    tie_by_default: bool = False
    """Default of `tie_word_embeddings` in config.json."""

    @property
    def has_attention_bias(self) -> bool:
        """The query, key and value projections have biases."""
        return any(row.parameter.endswith("attention.q_bias") for row in self.rows)


def build_model(family: Family, config: ModelConfig) -> Model:
    """The family's parameters at the sizes that `config` gives."""
    return Model(config, family.rows)
