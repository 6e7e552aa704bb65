"""Step, Model: an intermediate result of a forward pass, and a checkpoint that can be run forward."""
from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

EMBEDDING, FINAL_NORM = "embed_tokens", "norm"
"""Names of the steps outside of the layers: transformers' names of the modules."""

HIDDEN = "hidden_states"
"""Name of the last step of a layer: its output, the residual included."""

HALVES, INTERLEAVED = "heads in halves", "heads interleaved"
"""Pairs of elements that rotary embedding turns: one from each half of a head, or two neighbours."""


@dataclass(frozen=True)
class Step:
    """Output of one module, in Hugging Face's order of features."""

    layer: int | None
    """None outside of the layers."""
    name: str
    """transformers' name of the module."""
    value: Tensor
    """(num_tokens, features), float32."""
    weight: str = ""
    """The weight that made the value; "" for a step without weights."""
    settings: str = ""
    """Settings of the config that the value depends on, as text."""
    num_parts: int = 1
    """Number of tensor-parallel ranks that made the features, in order and in equal parts."""

    @property
    def title(self) -> str:
        """Layer and name, as in `layers.3.self_attn.k_proj`."""
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"


Work = Generator[Step, None, Tensor]
"""Generator that yields steps and returns its final value."""


class Model(Protocol):
    """A checkpoint that can be run forward."""

    def steps(self, tokens: Sequence[int]) -> Iterator[Step]:
        """A forward pass over one text; the last step is the final norm."""

    def logits(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Logits of rows `first` to `last` of the vocabulary, from the output of the final norm: (num_tokens, rows)."""
