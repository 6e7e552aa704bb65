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
    """Largest absolute difference; infinite where a value is no number."""
    mean: float
    relative: float
    """The largest of any token, each relative to the largest value that the source has for that token."""
    token: int
    """Index of the token with that difference."""
    feature: int
    weight: str = ""
    """The copy's weight that made the step's values; empty where no weight did."""
    settings: tuple[str, str] = ("", "")
    """Settings that the step depends on: (in the source, in the copy)."""


@dataclass(frozen=True)
class StepDifference:
    """A layer, or a step outside of the layers: its output, and the first difference within it."""

    output: Difference
    first: Difference | None
    """The first step that is further apart than tolerated; None without one."""


@dataclass(frozen=True)
class LogitsDifference:
    """Distance between the logits, over the vocabulary without padding."""

    largest: float
    mean: float
    relative: float
    """As in `Difference`."""
    kl_mean: float
    """Kullback-Leibler divergence of the copy's distribution from the source's, in nats per token."""
    kl_largest: float
    num_same_argmax: int
    """Tokens after which both think the same token the likeliest."""
    perplexities: tuple[float, float]
    """Perplexities of the text, by the source and by the copy."""
    perplexity_with_padding: float | None
    """Perplexity by the copy, as Nanotron's training loss counts it: rows of padding take part; None without any."""


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
        """The first step that is further apart than tolerated; None where there is none, even if the logits differ."""
        return next((row.first for row in self.rows if row.first), None)

    @property
    def agrees(self) -> bool:
        """True where nothing is further apart than tolerated."""
        return self.first is None and self.logits.relative <= self.tolerance
