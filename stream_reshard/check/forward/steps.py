"""Step, Model: what a forward pass shows of itself on its way, and what has one."""
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
"""What rotary embedding turns with each other: elements of the two halves of a head, or neighbours."""


@dataclass(frozen=True)
class Step:
    """What one module made of the tokens, in the order of features that Hugging Face has."""

    layer: int | None
    """None outside of the layers."""
    name: str
    """Of the module, as transformers calls it."""
    value: Tensor
    """(num_tokens, features), float32."""
    weight: str = ""
    """Which weight it is the work of."""
    settings: str = ""
    """Which settings of the config went into it."""
    num_parts: int = 1
    """Tensor-parallel ranks that made the features, equally many each, one after the other."""

    @property
    def title(self) -> str:
        """`layers.3.self_attn.k_proj`."""
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"


Work = Generator[Step, None, Tensor]
"""Shows steps, and returns what it made in the end."""


class Model(Protocol):
    """A checkpoint that can be run forward."""

    def steps(self, tokens: Sequence[int]) -> Iterator[Step]:
        """One forward pass over one text, up to the final norm."""

    def logits(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """(num_tokens, last - first): logits of these rows of the vocabulary, from the final norm's output."""
