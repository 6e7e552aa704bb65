"""A Nanotron checkpoint, opened to be converted."""
from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stream_reshard.errors import Problems, UsageError, quoted
from stream_reshard.formats.base import Source
from stream_reshard.identity import identities_of
from stream_reshard.layouts.nanotron_config import (
    METADATA_NAME, MODEL_CONFIG_NAME, NanotronModelConfig, read_model_config, with_known_ids)
from stream_reshard.layouts.nanotron_folder import litter_notes, not_committed
from stream_reshard.layouts.nanotron_layout import NanotronLayout
from stream_reshard.layouts.nanotron_source import format_of, layout_of_files, read_weight_files
from stream_reshard.manifest import open_manifest


def open_nanotron(root: Path, max_nbytes: int, vocab_size: int | None, problems: Problems,
                  is_exact: bool = True) -> Source | None:
    """Read config and headers, none of more than `max_nbytes`; everything wrong goes to `problems`. None where not even
    the config makes sense. `vocab_size`: rows of the embedding without padding, where a user says it; where it
    need not be exact, padding counts."""
    if not os.path.isfile(root / MODEL_CONFIG_NAME):
        problems.append(not_committed(root))
        return None
    seen = identities_of(root, (MODEL_CONFIG_NAME, METADATA_NAME))
    config = problems.collect(read_model_config, root, max_nbytes)
    files = problems.collect(read_weight_files, root, max_nbytes)
    if config is None:
        return None
    facts = (problems.collect(_facts_of, root, max_nbytes) or {}) if is_exact else {}
    known = facts.get("vocab_size")
    if None not in (known, vocab_size) and known != vocab_size:
        problems.append(UsageError(f"--vocab-size {vocab_size}: the manifest of {quoted(root)} says {known}"))
    told = vocab_size if vocab_size is not None else known if is_exact else config.model.vocab_size
    size = problems.collect(_true_vocab_size, config, told)
    layout = problems.collect(layout_of_files, root, config, size, files) if files and size else None
    known_ids = with_known_ids(config.model, config.family, facts.get("token_ids"))
    model_config = replace(known_ids or config.model, vocab_size=size or config.model.vocab_size)
    rules = format_of(config, files) if files else None
    return Source(root, MODEL_CONFIG_NAME, config.family, model_config, tuple(config.extras.values()),
                  (*litter_notes(root), *_notes(layout)) if layout else (),
                  rules.rope_interleaved if rules else False, config.config_class, layout.model if layout else None,
                  layout,
                  seen | {path: file.identity for path, file in (files.by_path if files else {}).items()
                          if file.identity},
                  facts.get("router_dtype"), known_ids is not None)


def _facts_of(root: Path, max_nbytes: int) -> Mapping[str, Any]:
    """The facts that a manifest tells, if there is one. Raises SourceError."""
    manifest = open_manifest(root, max_nbytes)
    return manifest.facts if manifest else {}


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
