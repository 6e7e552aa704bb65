"""Plan and outcome of two forward passes: for a person, and as JSON."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stream_reshard.check.forward import ForwardPlan
from stream_reshard.check.forward.result import Comparison, Difference
from stream_reshard.errors import DifferenceError, quoted, shown
from stream_reshard.machine.memory import counted, human
from stream_reshard.report import Reported, wrapped


def plan_lines(plan: ForwardPlan) -> Iterator[str]:
    """The planned work, and the memory it needs."""
    options = plan.options
    origin = f"random tokens, seed {options.seed}" if options.text is None else f"tokens of {shown(options.text)}"
    cast = "" if plan.dtype == "keep" else f", SRC rounded to {plan.dtype}"
    yield f"forward  {len(plan.tokens)} {origin}, {plan.source.config.num_layers} layers, float32 on CPU{cast}"
    for name, side in (("SRC", plan.source), ("DST", plan.copy)):
        yield f"{name}      {shown(side.root)}, {side.title}"
    yield from wrapped(f"{human(plan.projected)} projected, {human(plan.allowed)} allowed; {human(plan.reserved)} held "
                       f"now, libraries {human(plan.to_import)}, tokens {human(plan.activations_nbytes)}, matrices in "
                       f"bands of {human(plan.band_nbytes)}", "memory   ")


@dataclass(frozen=True, repr=False)
class ForwardResult(Reported):
    """Two forward passes, compared."""

    plan: ForwardPlan
    comparison: Comparison
    seconds: float
    peak_nbytes: int
    """Highest resident set of this process."""

    @property
    def facts(self) -> dict[str, Any]:
        """Plan and differences, as JSON; sizes in bytes, null for numbers that are not finite."""
        logits, first = self.comparison.logits, self.comparison.first
        return plan_facts(self.plan) | {
            "agrees": self.comparison.agrees,
            "first_difference": None if first is None else _facts(first) | {
                "made_by": first.weight, "settings": list(first.settings)},
            "layers": [_facts(row.output) | {"first_difference": row.first.title if row.first else None}
                       for row in self.comparison.rows],
            "logits": {"largest": _finite(logits.largest), "mean": _finite(logits.mean),
                       "relative": _finite(logits.relative), "kl_mean": _finite(logits.kl_mean),
                       "kl_largest": _finite(logits.kl_largest), "num_same_argmax": logits.num_same_argmax},
            "perplexity": {"source": _finite(logits.perplexities[0]), "copy": _finite(logits.perplexities[1]),
                           "copy_with_padding": _finite(logits.perplexity_with_padding)},
            "seconds": self.seconds, "peak_nbytes": self.peak_nbytes}

    @property
    def lines(self) -> tuple[str, ...]:
        """Differences by layer and of the logits, time and memory, for a person."""
        return (*_table(self.comparison), *self._summary())

    def _summary(self) -> Iterator[str]:
        comparison, logits = self.comparison, self.comparison.logits
        yield (f"likeliest token the same after {logits.num_same_argmax} of {comparison.num_tokens}; KL divergence "
               f"{logits.kl_mean:.2g} nats in the mean, {logits.kl_largest:.2g} at most")
        num_padding = self.plan.copy.config.vocab_size - self.plan.vocab_size
        padded = (f" ({logits.perplexity_with_padding:.6g} with its {counted(num_padding, 'row')} of padding)"
                  if logits.perplexity_with_padding is not None else "")
        yield f"perplexity {logits.perplexities[0]:.6g} in SRC, {logits.perplexities[1]:.6g} in DST{padded}"
        if comparison.agrees:
            worst = max(logits.relative, *(row.output.relative for row in comparison.rows))
            yield f"the same   up to {worst:.2g}, {comparison.tolerance:g} is allowed"
        yield (f"done       in {self.seconds:.1f} s, peak memory {human(self.peak_nbytes)} of "
               f"{human(self.plan.projected)} projected")

    @property
    def difference(self) -> DifferenceError | None:
        """The first difference beyond the tolerance, as an error; None without one."""
        if self.comparison.agrees:
            return None
        name, tail = quoted(self.plan.copy.root), f"; --tolerance is {self.comparison.tolerance:g}"
        first = self.comparison.first
        if first is None:
            logits = self.comparison.logits
            return DifferenceError(f"{name}: the logits differ by {logits.largest:.3g}, relative {logits.relative:.3g}"
                                   f"; all steps before agree, so lm_head makes it{tail}")
        made = f", made by {first.weight}" if first.weight else ""
        settings = (f"; SRC has {first.settings[0]}, DST {first.settings[1]}"
                    if first.settings[0] != first.settings[1] else "")
        return DifferenceError(f"{name}: the first difference is at {first.title}: {_magnitude(first)} at token "
                               f"{first.token}, feature {first.feature}{made}{settings}{tail}")


def _table(comparison: Comparison) -> Iterator[str]:
    yield f"{'':<14}{'largest':>10}{'mean':>10}{'relative':>10}   first step beyond tolerance"
    for row in comparison.rows:
        output, first = row.output, row.first
        name = output.title if output.layer is None else f"layer {output.layer}"
        where = f"   {first.title}" if first else ""
        yield f"{name:<14}{output.largest:>10.2g}{output.mean:>10.2g}{output.relative:>10.2g}{where}"
    logits = comparison.logits
    yield f"{'logits':<14}{logits.largest:>10.2g}{logits.mean:>10.2g}{logits.relative:>10.2g}"


def _magnitude(difference: Difference) -> str:
    if math.isinf(difference.largest):
        return "not a number"
    return f"{difference.largest:.3g}, relative {difference.relative:.3g}"


def plan_facts(plan: ForwardPlan) -> dict[str, Any]:
    """The plan as JSON; sizes in bytes."""
    options = plan.options
    return {"tolerance": options.tolerance, "num_tokens": len(plan.tokens),
            "text": None if options.text is None else str(options.text), "seed": options.seed, "dtype": plan.dtype,
            "memory": {"allowed": plan.allowed, "reserved": plan.reserved, "projected": plan.projected,
                       "activations_nbytes": plan.activations_nbytes, "band_nbytes": plan.band_nbytes}}


def _facts(difference: Difference) -> dict[str, Any]:
    return {"step": difference.title, "layer": difference.layer, "largest": _finite(difference.largest),
            "mean": _finite(difference.mean), "relative": _finite(difference.relative), "token": difference.token,
            "feature": difference.feature}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
