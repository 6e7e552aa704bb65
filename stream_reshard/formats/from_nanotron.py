"""A Nanotron checkpoint, opened to be converted."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from stream_reshard.errors import Problems, SourceError, UsageError, quoted
from stream_reshard.formats.base import Source
from stream_reshard.layouts.nanotron_config import (
    METADATA_NAME, MODEL_CONFIG_NAME, NanotronModelConfig, read_model_config)
from stream_reshard.layouts.nanotron_layout import NanotronLayout
from stream_reshard.layouts.nanotron_source import format_of, layout_of_files, read_weight_files
from stream_reshard.manifest import open_manifest


def open_nanotron(root: Path, max_nbytes: int, vocab_size: int | None, problems: Problems,
                  is_exact: bool = True) -> Source | None:
    """Read config and headers, none of more than `max_nbytes`; everything wrong goes to `problems`. None where not even
    the config makes sense. `vocab_size`: rows of the embedding without padding, where a user says it; where it
    need not be exact, padding counts."""
    if not (root / MODEL_CONFIG_NAME).is_file():
        problems.append(SourceError(f"{quoted(root)} holds no {MODEL_CONFIG_NAME}: it is not a committed checkpoint"))
        return None
    config = problems.collect(read_model_config, root, max_nbytes)
    files = problems.collect(read_weight_files, root, max_nbytes)
    if config is None:
        return None
    known = problems.collect(vocab_size_of, root, max_nbytes) if is_exact else None
    if None not in (known, vocab_size) and known != vocab_size:
        problems.append(UsageError(f"--vocab-size {vocab_size}: the manifest of {quoted(root)} says {known}"))
    told = vocab_size if vocab_size is not None else known if is_exact else config.model.vocab_size
    size = problems.collect(_true_vocab_size, config, told)
    layout = problems.collect(layout_of_files, root, config, size, files) if files and size else None
    model_config = replace(config.model, vocab_size=size or config.model.vocab_size)
    rules = format_of(config, files) if files else None
    return Source(root, MODEL_CONFIG_NAME, config.family, model_config, tuple(config.extras.values()),
                  tuple(_notes(layout)) if layout else (),
                  rules.rope_interleaved if rules else False, config.config_class, layout.model if layout else None,
                  layout, (MODEL_CONFIG_NAME, METADATA_NAME, *(files.by_path if files else ())))


def vocab_size_of(root: Path, max_nbytes: int) -> int | None:
    """Rows of the embedding without padding, as a manifest says it, if there is one. Raises SourceError."""
    manifest = open_manifest(root, max_nbytes)
    return manifest.facts["vocab_size"] if manifest else None


def _true_vocab_size(config: NanotronModelConfig, told: int | None) -> int:
    """Rows of the embedding without padding, which Nanotron does not keep. Raises UsageError where it is not known."""
    rows = config.model.vocab_size
    if told is None:
        raise UsageError(f"--vocab-size is needed: the embedding has {rows} rows, Nanotron pads it and keeps no count "
                         f"of the true ones; say --vocab-size {rows} if none is padding")
    if not 0 < told <= rows:
        raise UsageError(f"--vocab-size {told}: the embedding has {rows} rows")
    return told


def _notes(layout: NanotronLayout) -> list[str]:
    """What is unusual."""
    moved = layout.moved_blocks
    return [f"{len(moved)} blocks such as {moved[0]} stand on other stages than Nanotron's balancing gives them"
            ] if moved else []
