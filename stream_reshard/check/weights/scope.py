"""Scope of the comparison of two checkpoints: what the user, the manifest and the two formats ask for."""
from __future__ import annotations

import os
from dataclasses import replace

from stream_reshard.check.weights.agreement import WITHOUT_EFFECT
from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.compare import Rule
from stream_reshard.check.weights.side import Side
from stream_reshard.errors import UsageError, quoted
from stream_reshard.formats.nanotron.config import METADATA_NAME, NEUTRAL
from stream_reshard.formats.nanotron.rules import PADDING, STAGES
from stream_reshard.formats.nanotron.yaml_text import CONFIG_YAML
from stream_reshard.options import ALLOWABLE, VerifyOptions
from stream_reshard.storage.dtypes import SAFETENSORS_DTYPES

STATES = "states"
"""Name in `allow` for a copy without the training state that the source has, and to compare weights alone."""


def allowable() -> dict[str, str]:
    """The names of differences that a user may accept, with the meaning of each."""
    return {PADDING: "rows of padding that are not zero; Nanotron itself fills them with random values",
            STATES: "no training state beside the weights of DST, or one that is not to be compared",
            STAGES: "blocks on other stages than Nanotron's balancing gives them",
            CONFIG_YAML: "config.yaml is missing, or starts from other weights",
            METADATA_NAME: f"{METADATA_NAME} is missing",
            **dict.fromkeys(WITHOUT_EFFECT, "another value, which changes no forward pass"),
            **dict.fromkeys([*ALLOWABLE, *NEUTRAL], "another value of the setting")}


def check_names(copy_side: Side, options: VerifyOptions) -> None:
    """Raises UsageError for unknown names in --allow, and for missing files in --edited."""
    names = allowable()
    for name in options.allow:
        if name not in names:
            raise UsageError(f"--allow {quoted(name)}: the names are {', '.join(names)}")
    for path in options.edited:
        if not os.path.lexists(copy_side.root / path):
            raise UsageError(f"--edited {quoted(path)}: there is no such file in {quoted(copy_side.root)}")


def with_vocabulary(source: Checkpoint, options: VerifyOptions) -> Checkpoint:
    """The source with the vocabulary of --vocab-size, if given. Raises UsageError if it contradicts the source."""
    size = options.vocab_size
    if size is None:
        return source
    if not source.is_nanotron:
        raise UsageError("--vocab-size is for a Nanotron SRC; of any other the size is known")
    if source.vocab_size not in (None, size):
        raise UsageError(f"--vocab-size {size}: the manifest of {quoted(source.root)} states {source.vocab_size}")
    if not 0 < size <= source.config.vocab_size:
        raise UsageError(f"--vocab-size {size}: the embedding has {source.config.vocab_size} rows")
    return replace(source, vocab_size=size)


def rule_of(source: Checkpoint, copy: Checkpoint, copy_side: Side, options: VerifyOptions, block_nbytes: int) -> Rule:
    """The settings of the comparison of all parameters."""
    return Rule(block_nbytes, true_vocab_size(source, copy), cast_to(copy_side, options), options.sample, options.seed,
                PADDING not in {*options.allow, *copy_side.allowed}, source.vocab_size is not None)


def cast_to(copy_side: Side, options: VerifyOptions) -> str | None:
    """The safetensors dtype to which the source is cast; None without a cast."""
    return SAFETENSORS_DTYPES.get(options.dtype if options.dtype != "keep" else copy_side.dtype)


def true_vocab_size(source: Checkpoint, copy: Checkpoint) -> int:
    """Rows of the embedding without padding: the source's count, so that a copy cannot hide lost rows, else the copy's;
    rows of the source past the copy's count must be zero. Rows of padding that both have are part of a training, which
    changes them, so they are compared."""
    if source.state is not None and copy.state is not None:
        return min(copy.config.vocab_size, source.config.vocab_size)
    return source.vocab_size or copy.vocab_size or min(copy.config.vocab_size, source.config.vocab_size)
