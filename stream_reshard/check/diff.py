"""Diff: the differences between two layouts of one model, tensor by tensor; no weight is read."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import filterfalse, islice
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
"""Limit on listed differences; the rest are counted."""


def diff(one: Path, other: Path) -> dict[str, Any]:
    """The differences between two checkpoints, as lines of text. Raises Refused with the problems of both."""
    left, right = _opened(one, other)
    differences = _differences(left, right)
    listed = list(islice(differences, MAX_LISTED))
    return {"same": not listed, "differences": listed, "num_more": sum(1 for _ in differences),
            "formats": [left.layout.format, right.layout.format]}


def lines(facts: dict[str, Any]) -> Iterator[str]:
    """The result of `diff` as lines for a person."""
    yield from facts["differences"]
    if facts["num_more"]:
        yield f"and {facts['num_more']} more"
    if facts["formats"][0] != facts["formats"][1]:
        yield (f"compared the model, its settings and vocabulary: {' and '.join(facts['formats'])} keep weights in "
               f"other files; `verify` compares the weights")
    if facts["same"]:
        yield "the same layout: files, names, versions, slices and dtypes"
    yield from note_lines(facts)


def _opened(one: Path, other: Path) -> Iterator[Source]:
    """Both checkpoints, in order. The size of a Nanotron checkpoint's vocabulary without padding is that of a Hugging
    Face checkpoint beside it."""
    problems, vocab_size = Problems(), None
    limit = memory.parse_limit(min(memory.DEFAULT_ALLOWED, memory.machine_limit()), memory.resident())
    opened: dict[Path, Described | None] = {}
    for root in filterfalse(is_nanotron, (one, other)):
        opened[root] = source = open_any(root, limit, None, problems, is_exact=False)
        vocab_size = source.config.vocab_size if source else None
    for root in filter(is_nanotron, (one, other)):
        opened[root] = open_any(root, limit, vocab_size, problems, is_exact=False)
    for root in (one, other):
        source = opened[root]
        yield problems.required(source if isinstance(source, Source) else None)


def _settings(config: ModelConfig) -> dict[str, Any]:
    """The settings of a config, by name; of its token ids those that every format can hold."""
    settings = {field.name: getattr(config, field.name) for field in fields(config)
                if field.name not in ("unsaid_ids", "whole_num_hidden_layers")}
    return settings | ids_written(config)


def _differences(one: Source, other: Source) -> Iterator[str]:
    left, right = _settings(one.config), _settings(other.config)
    yield from (f"{key}: {quoted(left[key])} and {quoted(right[key])}" for key in left if left[key] != right[key])
    yield from layout_differences(one.layout, other.layout)
