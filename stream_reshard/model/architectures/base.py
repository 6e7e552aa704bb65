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
    """What transformers goes by."""
    nanotron_configs: tuple[str, ...]
    """Nanotron's config classes that express the family, the usual one first."""
    rows: tuple[Row, ...]
    """In the order of the forward pass; the rows of one layer stand together."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What config.json says of every model of the family."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What a config.json means that does not mention a key, where the family has its own word."""
    tie_by_default: bool = False
    """What a config.json that does not mention `tie_word_embeddings` means."""

    @property
    def has_attention_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return any(row.parameter.endswith("attention.q_bias") for row in self.rows)


def build_model(family: Family, config: ModelConfig) -> Model:
    """The family's parameters at the sizes that `config` gives."""
    return Model(config, family.rows)
