"""Both ends of a conversion: the source and the target that the options choose."""
from __future__ import annotations

from functools import partial
from typing import Any

from stream_reshard.destination.refusals import destination_problems, occupation_problems
from stream_reshard.errors import Problems, SourceError, UsageError, quoted
from stream_reshard.formats.base import Described, Source, Target
from stream_reshard.formats.hugging_face.target import ToHuggingFace
from stream_reshard.formats.nanotron.names import NAMING
from stream_reshard.formats.nanotron.source import NanotronSource
from stream_reshard.formats.nanotron.target import ToNanotron
from stream_reshard.formats.nanotron.template import LikeTemplate
from stream_reshard.formats.nanotron.training.files import has_state
from stream_reshard.formats.registry import open_any
from stream_reshard.formats.unsupported import unsupported_problems
from stream_reshard.machine import memory
from stream_reshard.model.truncation import truncated
from stream_reshard.options import Options
from stream_reshard.options.conversion import flags_of


def open_ends(options: Options, problems: Problems) -> tuple[Source, Target[Any]]:
    """Open the source and choose the target. Raises Refused with all problems of source, flags and destination, and
    those already in `problems`."""
    limit = memory.parse_limit(options.allowed_memory, memory.resident())
    moves_state = options.to == "nanotron" and has_state(options.source) and not (
        options.weights_only or options.template or options.layers)
    source = open_any(options.source, limit, None if moves_state else options.vocab_size, problems,
                      truncate=partial(truncated, layers=options.layers), keeps_rows=moves_state)
    if source is not None and options.from_masters:
        source = problems.collect(_from_masters, options, source, limit) or source
    if options.destination is not None:
        problems.extend(destination_problems(options.source, options.destination))
    target = problems.collect(_chosen, options, source, limit, moves_state) if source else None
    if source is not None and target is not None:
        problems.extend(unsupported_problems(target.unsupported(source), options.allow, source.config_name))
        if isinstance(source, Source):
            source = target.taken(source)
        if source.model is not None:
            problems.extend(target.problems(source.model))
    if problems and options.destination is not None:
        problems.extend(occupation_problems(options.destination, options.overwrite, NAMING))
    return problems.required(source if isinstance(source, Source) else None), problems.required(target)


def _from_masters(options: Options, source: Described, max_nbytes: int) -> Source | None:
    """The source with its fp32 masters in the place of its weights; None where these are refused. Raises UsageError,
    SourceError or Refused."""
    from stream_reshard.formats.nanotron.training.layout import MASTERS
    from stream_reshard.formats.nanotron.training.source import open_state
    if options.to != "hf" or source.config_class is None or not has_state(source.root):
        raise UsageError("--from-masters: it needs --to hf, and a Nanotron checkpoint with optimizer/")
    if not isinstance(source, NanotronSource):
        return None
    state = open_state(source.root, source.layout, max_nbytes)
    if MASTERS not in state.layout.kinds:
        raise SourceError(f"{quoted(source.root)} keeps no fp32 masters (accumulate_grad_in_fp32 was false): its "
                          f"weights are all it knows; leave --from-masters out")
    return Source(**{**vars(source), "layout": state.layout.masters, "router_dtype": None,
                     "identities": {**source.identities, **state.identities}})


def _chosen(options: Options, source: Described, max_nbytes: int, moves_state: bool) -> Target[Any] | None:
    """The target that the flags choose; None where the weights beside a training state are refused. Raises UsageError
    or Refused."""
    for flag in flags_of(options, ("zero", "schedule")) if not moves_state else ():
        raise UsageError(f"{flag}: no training state is moved; it needs --to nanotron, and a source with optimizer/")
    if moves_state:  # Most conversions do without the memory of these modules.
        from stream_reshard.formats.nanotron.training.moved import WithTraining
        return WithTraining.moved(options, source, max_nbytes) if isinstance(source, NanotronSource) else None
    if options.template is not None:
        return LikeTemplate.chosen_like(options.template, options, source, max_nbytes)
    if options.to == "hf":
        return ToHuggingFace.chosen(options, source)
    if options.to is None and source.config_class is not None:
        raise UsageError("the source is a Nanotron checkpoint: add --to hf for shards, or --to nanotron for another "
                         "topology")
    return ToNanotron.chosen(options, source)
