"""Parameter, Model: logical weights with their true dims, before any format split, fused or transposed them."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from stream_reshard.box import Box


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
    """The dims that make up each dim of the array as formats store it: ((0, 1, 2), (3,)) for a query projection."""
    split: str | None
    """The dim that tensor parallelism splits; None where every rank holds the whole parameter."""
    layer: int | None
    """Index of the transformer layer it belongs to, if any."""
    hugging_face: str
    """Name of the tensor that holds it in a Hugging Face checkpoint."""
    nanotron: str
    """Name of the (maybe fused) parameter that holds it in Nanotron, below `model.`."""
    tied_to: str | None = None
    """Name of the parameter whose values it shares; a tied parameter is stored nowhere itself."""

    @property
    def whole(self) -> Box:
        """The box of all its elements."""
        return Box.whole(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of the array as formats store it, in elements."""
        return tuple(math.prod(self.shape[dim] for dim in group) for group in self.matrix)

    @property
    def num_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint's config says about the model, in one spelling. Sizes in elements."""

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
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    @property
    def head_dim(self) -> int:
        """Extent of one attention head. Nanotron knows no other rule (nanotron/models/llama.py)."""
        return self.hidden_size // self.num_attention_heads

    @property
    def sizes(self) -> dict[str, int]:
        """Extent of every named dim of the architecture tables."""
        return {"vocab": self.vocab_size, "hidden": self.hidden_size, "ffn": self.intermediate_size,
                "heads": self.num_attention_heads, "kv_heads": self.num_key_value_heads,
                "head_dim": self.head_dim, "half": 2, "pair": self.head_dim // 2}


@dataclass(frozen=True)
class Model:
    """A model: its config and its parameters in the order of the forward pass."""

    config: ModelConfig
    parameters: tuple[Parameter, ...]

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        """Parameters by their name."""
        return {parameter.name: parameter for parameter in self.parameters}

    def stored(self) -> Iterator[Parameter]:
        """The parameters that checkpoints hold themselves: all but the tied ones."""
        return (parameter for parameter in self.parameters if parameter.tied_to is None)

    @property
    def num_elements(self) -> int:
        """Number of weights, tied ones counted once."""
        return sum(parameter.num_elements for parameter in self.stored())
