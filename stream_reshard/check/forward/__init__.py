"""Forward: prove that two checkpoints compute the same, by running both over the same tokens, layer by layer.

- tokens:                          the tokens that both models read
- side:                            one of the two folders, of either format
- settings:                        values of a config, checked
- hugging_face(_config, _tensors): the computation of transformers, its settings and tensors
- nanotron(_config, _tensors):     the computation of Nanotron's ranks, its settings and tensors
- weights:                         products with matrices that are read by bands of rows
- steps:                           intermediate results of a forward pass
- compare, result:                 the two passes side by side
- report, plot:                    the outcome as text, JSON, picture

Neither pass uses the planner, the layouts, the table of names, or the other's arithmetic; both use the reader of files.
Both compute in float32 on a CPU. Only `run_forward` imports torch.
"""
from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stream_reshard.check.forward.result import Comparison
from stream_reshard.check.forward.side import Side, open_side
from stream_reshard.check.forward.tokens import random_tokens, tokens_of
from stream_reshard.errors import DifferenceError, Problems, ResourceError, UsageError, quoted
from stream_reshard.machine import memory
from stream_reshard.machine.stop import Stop
from stream_reshard.options import ForwardOptions
from stream_reshard.report import Reported

_MAX_BAND_NBYTES = 8 * 2**20
_MIN_BAND_NBYTES = 2**18
_MAX_HEAD_ROWS = 4096
_SLACK_NBYTES = 48 * 2**20
"""Memory of the libraries that multiply matrices, and of small objects."""
_TORCH_NBYTES = 230 * 2**20
"""Memory that importing torch adds."""
_PLOT_NBYTES = 64 * 2**20
"""Memory that importing matplotlib and drawing a plot add."""


@dataclass(frozen=True, repr=False)
class ForwardPlan(Reported):
    """Two checkpoints to be run, and the memory this needs."""

    options: ForwardOptions
    source: Side
    copy: Side
    tokens: tuple[int, ...]
    dtype: str
    """Dtype to which weights of the source are rounded first, or `keep`."""
    vocab_size: int
    """Rows of the head that are compared."""
    allowed: int
    reserved: int
    to_import: int
    """Bytes that importing torch, and matplotlib, will add."""
    band_nbytes: int
    """Bytes of a stored matrix that are read at a time."""

    @property
    def facts(self) -> dict[str, Any]:
        """The plan as JSON; sizes in bytes."""
        from stream_reshard.check.forward.report import plan_facts
        return plan_facts(self)

    @property
    def lines(self) -> tuple[str, ...]:
        """The planned work, and the memory it needs, for a person."""
        from stream_reshard.check.forward.report import plan_lines
        return tuple(plan_lines(self))

    @property
    def num_parts(self) -> int:
        """Parts of the work, for a progress bar: embedding, layers, final norm, logits."""
        return self.source.config.num_layers + 3

    @property
    def activations_nbytes(self) -> int:
        """Bytes that both passes hold for the tokens."""
        return 4 * sum(len(self.tokens) * side.config.num_features + len(self.tokens) ** 2 * side.config.num_scores
                       for side in (self.source, self.copy))

    @property
    def num_head_rows(self) -> int:
        """Rows of the vocabulary whose logits are held at a time."""
        return min(self.vocab_size, max(1, self.band_nbytes // (2 * self.source.config.hidden_size)), _MAX_HEAD_ROWS)

    @property
    def projected(self) -> int:
        """Projected peak of the process tree, in bytes: a band as it is stored and in float32, logits of both sides in
        several forms, the activations."""
        logits = 48 * len(self.tokens) * self.num_head_rows
        return (self.reserved + self.to_import + _SLACK_NBYTES + 3 * self.band_nbytes + logits
                + self.activations_nbytes)


def plan_forward(source: Path, copy: Path, options: ForwardOptions = ForwardOptions()) -> ForwardPlan:
    """Open both folders, find every tensor, choose the tokens; reads headers and configs only, and imports no torch.

    Raises Refused or SourceError for a source that cannot be run, Refused with a DifferenceError for each reason why
    the copy cannot be run, UsageError, and ResourceError for a limit on memory that is too small.
    """
    _check(options)
    allowed = options.allowed_memory
    limit = memory.parse_limit(allowed, memory.resident())
    sides = source_side, copy_side = _sides(source, copy, limit, options)
    vocab_size = min(size for side in sides for size in (side.vocab_size, side.config.vocab_size) if size is not None)
    number = min(options.tokens, *(side.config.max_num_tokens for side in sides))
    tokens = (random_tokens(number, vocab_size, options.seed) if options.text is None else
              tokens_of(options.text, (source, copy), number, vocab_size))
    dtype = options.dtype if options.dtype != "keep" else copy_side.dtype
    to_import = 0 if "torch" in sys.modules else _TORCH_NBYTES
    to_import += _PLOT_NBYTES if options.plot and "matplotlib" not in sys.modules else 0
    return _fitted(ForwardPlan(options, source_side, copy_side, tuple(tokens), dtype, vocab_size, allowed,
                               memory.resident(), to_import, _MAX_BAND_NBYTES))


def _sides(source: Path, copy: Path, max_nbytes: int, options: ForwardOptions) -> tuple[Side, Side]:
    """Source and copy. Reasons why the copy cannot be run are told if the source can."""
    found = Problems()
    copy_side = found.collect(open_side, copy, max_nbytes, options.allow)
    source_side = open_side(source, max_nbytes, copy=copy_side)
    return source_side, Problems(DifferenceError(str(problem)) for problem in found).required(copy_side)


def _check(options: ForwardOptions) -> None:
    """Raises Refused for missing packages and for a plot that cannot be written, before any file is opened."""
    problems = Problems()
    if importlib.util.find_spec("torch") is None:
        problems.collect(_import_torch)
    if options.plot is not None:
        problems.collect(_check_plot, options.plot)
    problems.raise_if_any()


def _import_torch() -> Any:
    """The torch module. Raises UsageError if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UsageError("a forward pass needs torch: pip install 'stream_reshard[torch]'") from error
    return torch


def _check_plot(path: Path) -> None:
    if path.suffix != ".png" or path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--plot {quoted(path)} is not the name of a .png file in a folder that can be written to")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'stream_reshard[plot]', or leave it out")


def _fitted(plan: ForwardPlan) -> ForwardPlan:
    """The plan with the largest bands that keep the limit. Raises ResourceError if the smallest bands exceed it."""
    while plan.projected > plan.allowed and plan.band_nbytes > _MIN_BAND_NBYTES:
        plan = replace(plan, band_nbytes=plan.band_nbytes // 2)
    if plan.projected > plan.allowed:
        raise ResourceError(
            f"--max-memory {memory.human(plan.allowed)} cannot be kept: a forward pass of {len(plan.tokens)} tokens "
            f"would reach {memory.human(plan.projected)}, {memory.human(plan.activations_nbytes)} of it for the "
            f"tokens; raise it, or lower --tokens")
    return plan


def run_forward(plan: ForwardPlan, progress: Callable[[int, int], None] = lambda done, total: None,
                stop: Stop | None = None) -> Comparison:
    """Run both models and draw the plot. `progress(done, total)` counts parts of the work.

    Raises DifferenceError for models with different steps, SourceError for a file that shrank since the plan,
    ResourceError for a file that cannot be read, Interrupted.
    """
    torch, stop = _import_torch(), stop or Stop()
    from stream_reshard.check.forward.compare import compare
    from stream_reshard.check.forward.weights import Bands, Weights
    bands, dtype = Bands(plan.band_nbytes), None if plan.dtype == "keep" else getattr(torch, plan.dtype)
    source = plan.source.model(Weights(plan.source.root, bands, stop, dtype))
    copy = plan.copy.model(Weights(plan.copy.root, bands, stop))
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(plan.options.workers or num_threads)
        with stop.awaited():
            comparison = compare(source, copy, plan.tokens, (plan.vocab_size, plan.copy.config.vocab_size),
                                 plan.options.tolerance, plan.num_head_rows, stop,
                                 lambda done: progress(done, plan.num_parts))
    finally:
        torch.set_num_threads(num_threads)
    progress(plan.num_parts, plan.num_parts)
    if plan.options.plot is not None:
        from stream_reshard.check.forward.plot import draw
        draw(comparison, (plan.source.root.name, plan.copy.root.name), plan.options.plot)
    return comparison
