"""Diff: the differences between two layouts of one model, tensor by tensor. No weight is read."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from stream_reshard.errors import Problems, quoted
from stream_reshard.formats.base import Described, Source
from stream_reshard.formats.differences import layout_differences
from stream_reshard.formats.nanotron.config import ids_written
from stream_reshard.formats.registry import is_nanotron, open_any
from stream_reshard.machine import memory
from stream_reshard.model.parameters import ModelConfig
from stream_reshard.report import note_lines

MAX_LISTED = 1000
"""Differences that are listed; the rest are only counted."""


def diff(one: Path, other: Path) -> dict[str, Any]:
    """The differences between two checkpoints, as lines of text. Raises Refused where one of them makes no sense."""
    problems = Problems()
    limit = memory.parse_limit(min(memory.DEFAULT_ALLOWED, memory.machine_limit()), memory.resident())
    opened: dict[Path, Described | None] = {}
    vocab_size = None
    for root in sorted((one, other), key=is_nanotron):
        # Nanotron does not know its vocabulary without padding: beside Hugging Face it has that of the other.
        opened[root] = source = open_any(root, limit, vocab_size if is_nanotron(root) else None, problems, False)
        vocab_size = source.config.vocab_size if source and not is_nanotron(root) else None
    left, right = (problems.required(source if isinstance(source, Source) else None)
                   for source in (opened[one], opened[other]))
    found, num_more = list[str](), 0
    for difference in _differences(left, right):
        if len(found) < MAX_LISTED:
            found.append(difference)
        else:
            num_more += 1
    return {"same": not found, "differences": found, "num_more": num_more}


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The result of `diff` as lines for a person."""
    yield from facts["differences"]
    if facts["num_more"]:
        yield f"and {facts['num_more']} more"
    if facts["same"]:
        yield "the same layout: files, names, versions, slices and dtypes"
    yield from note_lines(facts)


def _settings(config: ModelConfig) -> dict[str, Any]:
    """The settings of a config, by name; of its token ids only those that every format can hold."""
    settings = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "unsaid_ids"}
    return settings | ids_written(config)


def _differences(one: Source, other: Source) -> Iterator[str]:
    mine, theirs = _settings(one.config), _settings(other.config)
    yield from (f"{key}: {quoted(mine[key])} and {quoted(theirs[key])}" for key in mine if mine[key] != theirs[key])
    yield from layout_differences(one.layout, other.layout)
