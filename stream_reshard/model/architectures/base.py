"""Family: an architecture table, and how it becomes a Model."""
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
    """In the order of the forward pass; the rows of one layer stand together."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings in config.json that every model of the family has."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Values of keys that a config.json leaves out, where the family has a default of its own."""
    tie_by_default: bool = False
    """Value of `tie_word_embeddings` where a config.json leaves it out."""

    @property
    def has_attention_bias(self) -> bool:
        """The query, key and value projections have biases."""
        return any(row.parameter.endswith("attention.q_bias") for row in self.rows)


def build_model(family: Family, config: ModelConfig) -> Model:
    """The family's parameters at the sizes that `config` gives."""
    return Model(config, family.rows)
