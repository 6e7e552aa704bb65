"""Difference, LogitsDifference, Comparison: how far two forward passes are apart. Plain numbers, without torch."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """How far the two are apart at one step."""

    layer: int | None
    """None outside of the layers."""
    title: str
    """Of the step."""
    largest: float
    """Absolute; infinite where a value is no number."""
    mean: float
    relative: float
    """The largest of any token, each relative to the largest value that the source has for that token."""
    token: int
    """Where that is."""
    feature: int
    weight: str = ""
    """What made it, in the copy; empty where no weight did."""
    settings: tuple[str, str] = ("", "")
    """What of the configs went into it: of the source, of the copy."""


@dataclass(frozen=True)
class Row:
    """A layer, or what stands outside of the layers: its output, and where within it the first difference is."""

    output: Difference
    first: Difference | None
    """The first step that is further apart than tolerated; None without one."""


@dataclass(frozen=True)
class LogitsDifference:
    """How far the logits are apart, over the vocabulary without padding."""

    largest: float
    mean: float
    relative: float
    """As of a `Difference`."""
    kl_mean: float
    """Kullback-Leibler divergence of the copy's distribution from the source's, in nats per token."""
    kl_largest: float
    num_same_argmax: int
    """Tokens after which both think the same token the likeliest."""
    perplexities: tuple[float, float]
    """Of the text, by the source and by the copy."""
    perplexity_with_padding: float | None
    """By the copy, as Nanotron's training loss counts it: rows of padding take part; None without any."""


@dataclass(frozen=True)
class Comparison:
    """Two forward passes over the same tokens."""

    num_tokens: int
    tolerance: float
    """What `relative` may be."""
    rows: tuple[Row, ...]
    """Embedding, layers, final norm."""
    logits: LogitsDifference

    @property
    def first(self) -> Difference | None:
        """Where they begin to be further apart than tolerated; None where they agree, up to the logits."""
        return next((row.first for row in self.rows if row.first), None)

    @property
    def agrees(self) -> bool:
        """Whether nothing is further apart than tolerated."""
        return self.first is None and self.logits.relative <= self.tolerance
