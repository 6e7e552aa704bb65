"""Difference, LogitsDifference, Comparison: distances between two forward passes. Plain numbers, without torch."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Distance between the two passes at one step."""

    layer: int | None
    """None outside of the layers."""
    title: str
    """Title of the step."""
    largest: float
    """Largest absolute difference; infinite if a value is not a number."""
    mean: float
    relative: float
    """Largest relative difference: that of a token is relative to the largest value of the source for the token."""
    token: int
    """Index of the token with the largest relative difference."""
    feature: int
    weight: str = ""
    """The copy's weight that made the values of the step; "" for a step without weights."""
    settings: tuple[str, str] = ("", "")
    """Settings that the step depends on, as text: (in the source, in the copy)."""


@dataclass(frozen=True)
class StepDifference:
    """A layer, or a step outside of the layers: its output, and the first difference within it."""

    output: Difference
    first: Difference | None
    """The first step beyond the tolerance; None without one."""


@dataclass(frozen=True)
class LogitsDifference:
    """Distance between the logits, over the vocabulary without padding."""

    largest: float
    mean: float
    relative: float
    """Largest relative difference, as in `Difference`."""
    kl_mean: float
    """Kullback-Leibler divergence of the copy's distribution from the source's, in nats per token."""
    kl_largest: float
    num_same_argmax: int
    """Number of tokens after which both passes predict the same token."""
    perplexities: tuple[float, float]
    """Perplexities of the text, by the source and by the copy."""
    perplexity_with_padding: float | None
    """Perplexity by the copy with its rows of padding, as in Nanotron's training loss; None without such rows."""


@dataclass(frozen=True)
class Comparison:
    """Two forward passes over the same tokens."""

    num_tokens: int
    tolerance: float
    """Largest `relative` that is tolerated."""
    rows: tuple[StepDifference, ...]
    """Embedding, layers, final norm."""
    logits: LogitsDifference

    @property
    def first(self) -> Difference | None:
        """The first step beyond the tolerance; None without one. Logits are no step."""
        return next((row.first for row in self.rows if row.first), None)

    @property
    def agrees(self) -> bool:
        """True if no step and no logit is beyond the tolerance."""
        return self.first is None and self.logits.relative <= self.tolerance
