"""Options of the two comparisons of checkpoints: of weights, and of forward passes."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stream_reshard.errors import UsageError, quoted
from stream_reshard.machine import memory
from stream_reshard.options.declaring import ACCEPTED, option
from stream_reshard.options.resources import Dtype, Resources

SCOPE, FORWARD = "scope", "with --forward"
"""Headings for groups of flags."""


def parse_part(text: str) -> float:
    """The fraction of a percentage: 0.1 of "10%". Raises UsageError."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%?", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise UsageError(f"--sample {quoted(text)} is not between 0% and 100%; write it as 10%")
    return float(match[1]) / 100


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Resources):
    """Scope and resources of the comparison of two checkpoints."""

    dtype: Dtype = option("keep", "dtype to which SRC is cast before the comparison; keep: the one in DST's manifest, "
                          "else none")
    allow: tuple[str, ...] = option((), "accept a difference by its name: padding (rows of padding that are not zero), "
                                    "stages (blocks on other stages than in Nanotron's balancing), "
                                    "states (no training state where SRC has one, or not to be compared), "
                                    "checkpoint_metadata.json (missing), config.yaml (missing, or starting from other "
                                    "weights), a token id, initializer_range, or a name that a conversion accepts",
                                    metavar="NAME", group=ACCEPTED)
    quick: bool = option(False, "compare structure, configs and digests only; no weight of SRC is read", group=SCOPE)
    sample: float = option(1.0, "part of the weights that is compared, such as 10%%, chosen by --seed",
                           metavar="PERCENT", parse=parse_part, shown="100%%", group=SCOPE)
    seed: int = option(0, "seed of the sample, and of random tokens", metavar="N", least=0, group=SCOPE)
    vocab_size: int | None = option(None, "rows of the embedding without padding, for a Nanotron SRC without a "
                                    "manifest of this tool", metavar="N", least=1)
    edited: tuple[str, ...] = option((), "a file of DST that was edited on purpose, such as config.yaml: its content "
                                     "is compared, its digest is not", metavar="PATH", group=ACCEPTED)
    ignored: tuple[str, ...] = ()
    """Paths in the copy's folder that do not belong to the checkpoint."""
    name: Path | None = None
    """Final path of the copy; None: its present path."""
    plan: memory.MemoryPlan | None = None
    """Memory plan of a run that wrote the copy itself; small files of both folders then need no cap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sample <= 1:
            raise UsageError(f"--sample {self.sample:g} is not above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class ForwardOptions(Resources):
    """Scope, tolerance and resources of two forward passes."""

    text: Path | None = option(None, "text whose first tokens the models read, by their own tokenizer.json",
                               metavar="FILE", shown="random tokens", group=FORWARD)
    tokens: int = option(128, "largest number of tokens that the models read", metavar="N", least=2, group=FORWARD)
    seed: int = option(0, "seed of random tokens", metavar="N", least=0)
    tolerance: float = option(1e-4, "largest accepted difference, relative to the largest value of the token",
                              metavar="X", group=FORWARD)
    plot: Path | None = option(None, "write a picture of the differences by layer; needs the extra [plot]",
                               metavar="FILE.png", group=FORWARD)
    dtype: Dtype = option("keep", "dtype to which weights of SRC are rounded first; keep: the one in DST's manifest, "
                          "else none")
    allow: tuple[str, ...] = option((), "stages: blocks of DST may stand on other stages than in Nanotron's balancing",
                                    metavar="NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tolerance > 0:
            raise UsageError(f"--tolerance {self.tolerance:g} is not above 0: rounding alone makes a difference")
