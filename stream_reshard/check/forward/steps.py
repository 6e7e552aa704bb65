"""Step, Model: an intermediate result of a forward pass, and a checkpoint that can be run forward."""
from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

EMBEDDING, FINAL_NORM = "embed_tokens", "norm"
"""Steps outside of the layers, by transformers' names of the modules."""

HIDDEN = "hidden_states"
"""The last step of a layer: its output, the residual included."""

HALVES, INTERLEAVED = "heads in halves", "heads interleaved"
"""Elements that rotary embedding turns with each other: those of the two halves of a head, or neighbours."""


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
    """The weight that made the value; empty where no weight did."""
    settings: str = ""
    """Settings of the config that the value depends on."""
    num_parts: int = 1
    """Tensor-parallel ranks that made the features, equally many each, one after the other."""

    @property
    def title(self) -> str:
        """`layers.3.self_attn.k_proj`."""
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"


Work = Generator[Step, None, Tensor]
"""Generator that yields steps and returns its final value."""


class Model(Protocol):
    """A checkpoint that can be run forward."""

    def steps(self, tokens: Sequence[int]) -> Iterator[Step]:
        """One forward pass over one text, up to the final norm."""

    def logits(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """(num_tokens, last - first): logits of these rows of the vocabulary, from the final norm's output."""
