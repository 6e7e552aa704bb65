"""Both ends of a conversion, as the options ask for them: any source with any target."""
from __future__ import annotations

from stream_reshard.destination.refusals import destination_problems, occupation_problems
from stream_reshard.errors import Problems, UsageError
from stream_reshard.formats.base import Source, Target
from stream_reshard.formats.hugging_face.target import ToHuggingFace
from stream_reshard.formats.nanotron.names import NAMING
from stream_reshard.formats.nanotron.target import ToNanotron
from stream_reshard.formats.nanotron.template import LikeTemplate
from stream_reshard.formats.registry import open_any
from stream_reshard.formats.unsupported import unsupported_problems
from stream_reshard.machine import memory
from stream_reshard.options import Options


def open_ends(options: Options, problems: Problems) -> tuple[Source, Target]:
    """Open the source and choose the target. Raises Refused with everything that is wrong with source, flags and
    destination; what was found before is in `problems`."""
    limit = memory.parse_limit(options.allowed_memory, memory.resident())
    source = open_any(options.source, limit, options.vocab_size, problems)
    if options.destination is not None:
        problems.extend(destination_problems(options.source, options.destination))
    target = problems.collect(_chosen, options, source, limit) if source else None
    if source is not None and target is not None:
        problems.extend(unsupported_problems(target.unsupported(source), options.allow, source.config_name))
        if source.model is not None:
            problems.extend(target.problems(source.model))
    if problems and options.destination is not None:
        problems.extend(occupation_problems(options.destination, options.overwrite, NAMING))
    problems.raise_if_any()
    assert source and target, "without them there is a problem"
    return source, target


def _chosen(options: Options, source: Source, max_nbytes: int) -> Target:
    """The target that the flags ask for. Raises UsageError or Refused."""
    if options.template is not None:
        return LikeTemplate.of(options, source, max_nbytes)
    if options.to == "hf":
        return ToHuggingFace.chosen(options, source)
    if options.to is None and source.config_class is not None:
        raise UsageError("the source is a Nanotron checkpoint: say --to hf for shards, or --to nanotron for another "
                         "topology")
    return ToNanotron.chosen(options, source)
