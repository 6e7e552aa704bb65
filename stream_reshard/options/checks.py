"""Options of the two ways in which checkpoints are compared."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stream_reshard.errors import UsageError, quoted
from stream_reshard.machine import memory
from stream_reshard.options.declaring import option
from stream_reshard.options.resources import Dtype, Resources


def parse_part(text: str) -> float:
    """"10%" as 0.1. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%?", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise UsageError(f"--sample {quoted(text)} is not a part between 0% and 100%; write it as 10%")
    return float(match[1]) / 100


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Resources):
    """Scope and resources of the comparison of two checkpoints."""

    dtype: Dtype = option("keep", "dtype to which SRC is cast before the comparison; keep: the one in DST's manifest, "
                          "else none")
    allow: tuple[str, ...] = option((), "accept a difference by its name: padding (rows of padding that are not zero), "
                                    "stages (blocks on other stages than Nanotron's balancing gives them), config.yaml "
                                    "and checkpoint_metadata.json (missing, or starting elsewhere), a token id, "
                                    "initializer_range, or a name that a conversion accepts", metavar="NAME")
    quick: bool = option(False, "structure, configs and digests only; no weight of SRC is read")
    sample: float = option(1.0, "seeded part of the weights that is compared, such as 10%%", metavar="PERCENT",
                           parse=parse_part, shown="100%%")
    seed: int = option(0, "seed of the sample, and of random tokens", metavar="N", least=0)
    vocab_size: int | None = option(None, "rows of the embedding without padding, of a Nanotron SRC that was not made "
                                    "by this tool", metavar="N", least=1)
    edited: tuple[str, ...] = option((), "a file of DST that was edited on purpose, such as config.yaml: its digest is "
                                     "not compared, its contents are", metavar="PATH")
    ignored: tuple[str, ...] = ()
    """Paths in the copy that are not part of it."""
    name: Path | None = None
    """Final path of the copy; None: its present path."""
    plan: memory.MemoryPlan | None = None
    """Memory plan of a run that read or wrote both folders itself; their small files then need no cap."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sample <= 1:
            raise UsageError(f"--sample {self.sample:g} is not a part above 0 and up to 1")


@dataclass(frozen=True, kw_only=True)
class ForwardOptions(Resources):
    """Scope, tolerance and resources of two forward passes."""

    text: Path | None = option(None, "text whose first tokens are run, by the tokenizer.json of the model",
                               metavar="FILE", shown="random tokens")
    tokens: int = option(128, "tokens that are run, at most", metavar="N", least=2)
    seed: int = option(0, "seed of random tokens", metavar="N", least=0)
    tolerance: float = option(1e-4, "largest difference of a forward pass, relative to the largest value of a token",
                              metavar="X")
    plot: Path | None = option(None, "picture of the differences by layer, to be drawn; needs the extra [plot]",
                               metavar="FILE.png")
    dtype: Dtype = option("keep", "dtype to which weights of SRC are rounded first; keep: the one in DST's manifest, "
                          "else none")
    allow: tuple[str, ...] = option((), "stages: layers of DST may stand on other stages than Nanotron's balancing "
                                    "gives them", metavar="NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tolerance > 0:
            raise UsageError(f"--tolerance {self.tolerance:g} is not above 0; rounding alone is a difference")
