"""Scope of the comparison of two checkpoints, by the wish of a user and by what the two are."""
from __future__ import annotations

import os
from dataclasses import replace

from stream_reshard.check.weights.agreement import WITHOUT_EFFECT
from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.compare import Rule
from stream_reshard.check.weights.files import CONFIG_YAML
from stream_reshard.check.weights.side import Side
from stream_reshard.errors import UsageError, quoted
from stream_reshard.formats.nanotron.config import METADATA_NAME, NEUTRAL
from stream_reshard.formats.nanotron.rules import STAGES
from stream_reshard.options import ALLOWABLE, VerifyOptions
from stream_reshard.storage.dtypes import SAFETENSORS_DTYPES

PADDING = "padding"
"""Name in `allow` for padding rows that are not zero: Nanotron itself leaves them to chance."""


def check_names(other: Side, options: VerifyOptions) -> None:
    """Raises UsageError for names that mean nothing: what they should have let through would be missed."""
    names = dict.fromkeys([*ALLOWABLE, *NEUTRAL, *WITHOUT_EFFECT, PADDING, STAGES, CONFIG_YAML, METADATA_NAME])
    for name in options.allow:
        if name not in names:
            raise UsageError(f"--allow {quoted(name)}: the names are {', '.join(names)}")
    for path in options.edited:
        if not os.path.lexists(other.root / path):
            raise UsageError(f"--edited {quoted(path)}: there is no such file in {quoted(other.root)}")


def with_vocabulary(original: Side, options: VerifyOptions) -> Side:
    """The source with as many rows of the embedding as a user says. Raises UsageError where that cannot be."""
    checkpoint, told = original.checkpoint, options.vocab_size
    if checkpoint is None or told is None:
        return original
    if not checkpoint.is_nanotron:
        raise UsageError("--vocab-size is for a Nanotron SRC, which keeps no count of its true rows")
    if checkpoint.vocab_size not in (None, told):
        raise UsageError(f"--vocab-size {told}: the manifest of {quoted(original.root)} says {checkpoint.vocab_size}")
    if not 0 < told <= checkpoint.config.vocab_size:
        raise UsageError(f"--vocab-size {told}: the embedding has {checkpoint.config.vocab_size} rows")
    return replace(original, checkpoint=replace(checkpoint, vocab_size=told))


def rule_of(source: Checkpoint, copy: Checkpoint, other: Side, options: VerifyOptions, block_nbytes: int) -> Rule:
    return Rule(block_nbytes, true_vocab_size(source, copy), cast_to(other, options), options.sample, options.seed,
                PADDING not in options.allow, source.vocab_size is not None)


def cast_to(other: Side, options: VerifyOptions) -> str | None:
    """The safetensors dtype that the source is cast to; None where it is compared as it is."""
    return SAFETENSORS_DTYPES.get(options.dtype if options.dtype != "keep" else other.dtype)


def true_vocab_size(source: Checkpoint, copy: Checkpoint) -> int:
    """Rows of the embedding without padding. The source's count comes first, so that nobody can make the copy smaller;
    without it the copy's is taken, and the rows after it in the source must be zero."""
    return source.vocab_size or copy.vocab_size or min(copy.config.vocab_size, source.config.vocab_size)
