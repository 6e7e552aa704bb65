"""Two models run over the same tokens, step beside step, and the distances between their results."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from stream_reshard.check.forward.result import Comparison, Difference, LogitsDifference, StepDifference
from stream_reshard.check.forward.steps import HIDDEN, Model, Step
from stream_reshard.errors import DifferenceError, SourceError
from stream_reshard.machine.stop import Stop


def compare(source: Model, copy: Model, tokens: Sequence[int], vocab_sizes: tuple[int, int], tolerance: float,
            band: int, stop: Stop, progress: Callable[[int], None] = lambda done: None) -> Comparison:
    """Run both models. `vocab_sizes`: (rows of the head that are compared, all rows in the copy); `band`: rows of the
    head taken at a time. `progress(done)` counts finished parts: embedding, layers, final norm.

    Raises DifferenceError for models with different steps.
    """
    rows: list[StepDifference] = []
    first: Difference | None = None
    with torch.inference_mode():
        for source_step, copy_step in zip_longest(source.steps(tokens), copy.steps(tokens)):
            stop.check()
            found = difference(source_step, copy_step)
            if first is None and found.relative > tolerance:
                first = found
            if copy_step.layer is None or copy_step.name == HIDDEN:
                rows.append(StepDifference(found, first))
                first = None
                progress(len(rows))
        logits, (source_hidden, copy_hidden) = _LogitsComparison(tokens), (source_step.value, copy_step.value)
        whole, padded = vocab_sizes
        for begin in range(0, whole, band):
            stop.check()
            end = min(begin + band, whole)
            logits.add(begin, source.logits(source_hidden, begin, end), copy.logits(copy_hidden, begin, end))
        for begin in range(whole, padded, band):
            logits.add_padding(copy.logits(copy_hidden, begin, min(begin + band, padded)))
    return Comparison(len(tokens), tolerance, tuple(rows), logits.result())


def difference(source: Step | None, copy: Step | None) -> Difference:
    """Difference of a step of the copy from the source's. Raises DifferenceError for steps that do not match,
    SourceError for values of the source that are no numbers."""
    if source is None or copy is None or (source.layer, source.name) != (copy.layer, copy.name):
        titles = [step.title if step else "nothing" for step in (source, copy)]
        raise DifferenceError(f"the two do not compute the same: where the source has {titles[0]}, the copy has "
                              f"{titles[1]}")
    if source.value.shape != copy.value.shape:
        raise DifferenceError(f"{copy.title} makes {copy.value.shape[1]} features in the copy, "
                              f"{source.value.shape[1]} in the source")
    if not bool(source.value.isfinite().all()):
        raise SourceError(f"the source itself computes values that are not numbers at {source.title}, so a forward "
                          f"pass proves nothing; inspect --values counts NaN and infinities among its weights")
    apart = (copy.value - source.value).abs_()
    relative = _relative(apart.amax(-1), source.value.abs().amax(-1))
    token = int(relative.argmax())
    feature = int(apart[token].nan_to_num(nan=math.inf).argmax())
    weight = copy.weight
    if weight and copy.num_parts > 1:
        weight += f", tensor-parallel rank {feature * copy.num_parts // apart.shape[1]} of {copy.num_parts}"
    return Difference(copy.layer, copy.title, _number(apart.max()), _number(apart.mean()), float(relative[token]),
                      token, feature, weight, (source.settings, copy.settings))


def _relative(apart: Tensor, scale: Tensor) -> Tensor:
    """Relative difference of each token; infinite if a value is not a number."""
    return (apart / scale.clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num(nan=math.inf)


def _number(value: Tensor) -> float:
    return math.inf if math.isnan(value) else float(value)


class _LogitsComparison:
    """Difference of logits that arrive in bands of the vocabulary; a few numbers per token are kept."""

    def __init__(self, tokens: Sequence[int]):
        number = len(tokens)
        self._next = torch.tensor([*tokens[1:], -1])
        """The next token after each token; -1 after the last."""
        self._apart, self._scale = torch.zeros(number), torch.zeros(number)
        self._sum, self._count = 0.0, 0
        self._weighted = torch.zeros(number, dtype=torch.float64)
        """Mean of (source - copy), weighted with the source's probabilities, over the bands added so far."""
        self._log_sums = torch.full((2, number), -math.inf, dtype=torch.float64)
        self._with_padding: Tensor | None = None
        """Log sums of the copy, rows of padding included."""
        self._best = torch.full((2, number), -math.inf)
        self._argmax = torch.full((2, number), -1)
        self._chosen = torch.zeros(2, number, dtype=torch.float64)
        """Logits of the next tokens."""

    def add(self, first: int, source: Tensor, copy: Tensor) -> None:
        """Add the logits of a band of the vocabulary from row `first` on: (num_tokens, rows) each."""
        apart = (source - copy).abs()
        self._apart = torch.maximum(self._apart, apart.amax(-1).nan_to_num(nan=math.inf))
        self._scale = torch.maximum(self._scale, source.abs().amax(-1))
        self._sum += float(apart.sum())
        self._count += apart.numel()
        inside = (self._next >= first) & (self._next < first + source.shape[1])
        positions = inside.nonzero().flatten()
        for side, logits in enumerate((source, copy)):
            best, index = logits.max(-1)
            better = best > self._best[side]
            self._best[side][better], self._argmax[side][better] = best[better], index[better] + first
            self._chosen[side, positions] = logits[positions, self._next[positions] - first].double()
        before = self._log_sums[0].clone()
        for side, logits in enumerate((source, copy)):
            self._log_sums[side] = torch.logaddexp(self._log_sums[side], logits.double().logsumexp(-1))
        now = self._log_sums[0]
        shares = (source.double() - now[:, None]).exp_()
        self._weighted = self._weighted * (before - now).exp() + (shares * (source.double() - copy.double())).sum(-1)

    def add_padding(self, copy: Tensor) -> None:
        """Add the copy's logits of a band of padding rows."""
        before = self._log_sums[1] if self._with_padding is None else self._with_padding
        self._with_padding = torch.logaddexp(before, copy.double().logsumexp(-1))

    def result(self) -> LogitsDifference:
        """The difference over all bands."""
        divergence = (self._weighted - (self._log_sums[0] - self._log_sums[1])).clamp_min(0)
        return LogitsDifference(
            _number(self._apart.max()), self._sum / self._count, float(_relative(self._apart, self._scale).max()),
            float(divergence.mean()), float(divergence.max()), self._num_same_argmax(),
            (self._perplexity(0, self._log_sums[0]), self._perplexity(1, self._log_sums[1])),
            None if self._with_padding is None else self._perplexity(1, self._with_padding))

    def _num_same_argmax(self) -> int:
        """Tokens after which both passes predict the same token; a pass whose logits are not numbers predicts none."""
        return int(((self._argmax[0] == self._argmax[1]) & (self._argmax[0] >= 0)).sum())

    def _perplexity(self, side: int, log_sums: Tensor) -> float:
        return float((log_sums - self._chosen[side])[:-1].mean().exp())
