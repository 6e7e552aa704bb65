"""JSON made by others: each fault is reported with its key, line and column."""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stream_reshard.errors import quoted

_KEY = re.compile(r'"([^"\\\n]{1,200})"\s*:')
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]', re.DOTALL)
_LONG_NUMBER = re.compile(r"\d{4301}")
"""A number with more digits than Python converts to int (sys.set_int_max_str_digits)."""

Path = tuple[str, ...]
"""The keys that lead to a value, the outermost first; positions in lists are left out."""

MAX_DOUBTFUL = 10
"""Doubtful values that are described; the rest is only counted."""


@dataclass
class DoubtfulValues:
    """Values on which readers of JSON disagree: keys that occur twice with different values, NaN and infinities."""

    entries: list[tuple[Path, str]] = field(default_factory=list)
    """(keys that lead to the value, fault) of each; at most `MAX_DOUBTFUL`."""
    texts: list[str] = field(default_factory=list)
    """The entries described, with key and line."""
    num_more: int = 0
    """Number of further doubtful values."""

    def add(self, entry: tuple[Path, str]) -> None:
        """Add an entry, or only count it. Equal neighbours, such as the NaNs of one list, are one entry."""
        if len(self.entries) < MAX_DOUBTFUL and entry not in self.entries:
            self.entries.append(entry)
        elif entry != self.entries[-1]:
            self.num_more += 1


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {quoted(next(key for key in counts if counts[key] > 1))} occurs twice")
    return table


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def strict_json(text: bytes) -> Any:
    """A value by the standard alone: NaN, Infinity and duplicate keys are refused. Raises ValueError."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_reject_duplicate_keys,
                          parse_constant=_reject_constant)
    except RecursionError as error:
        raise ValueError(str(error)) from error


class _WithDuplicates(dict[str, Any]):
    """An object that holds the last value of each key, as Python's reader does."""

    duplicates: tuple[str, ...]
    """Keys that occur twice with different values."""


def _noting_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) == len(pairs):
        return table
    first: dict[str, Any] = {}
    differing: dict[str, None] = {}
    for key, value in pairs:
        other = first.setdefault(key, value)
        if type(other) is not type(value) or other != value:
            differing[key] = None
    if not differing:
        return table
    noted = _WithDuplicates(table)
    noted.duplicates = tuple(differing)
    return noted


def read_json_text(content: bytes, matters: Container[str] | None) -> tuple[Any, DoubtfulValues, DoubtfulValues]:
    """(value, doubtful values that matter, doubtful values that do not). Those below the outermost keys in `matters`
    matter; with None all do. A byte order mark is skipped. Raises ValueError, with key, line and column, for text that
    is not JSON."""
    text = _decoded(content)
    value = _parsed(text)
    faults, others = DoubtfulValues(), DoubtfulValues()
    for path, fault in _doubtful(value):
        does_matter = matters is None or not path or path[0] in matters
        (faults if does_matter else others).add((path, fault))
    found = faults.entries + others.entries
    lines = _lines(text, {path for path, _ in found}) if found else {}
    for doubtful in (faults, others):
        doubtful.texts = [_described(path, fault, lines) for path, fault in doubtful.entries]
    return value, faults, others


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[:error.start].decode("utf-8-sig", "replace")
        raise ValueError(f"it is not UTF-8: byte {content[error.start]:#x} in "
                         f"{position_in(before, len(before))}") from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_noting_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(syntax_fault(error, position_in(text, error.pos))) from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except ValueError as error:
        found = _LONG_NUMBER.search(text)
        raise ValueError(f"a number has too many digits in "
                         f"{position_in(text, found.start() if found else 0)}") from error


def syntax_fault(error: json.JSONDecodeError, where: str) -> str:
    """A syntax error in words; `where` is its position. The parsed text must be all that there is."""
    is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    return f"{error.msg.removesuffix(' at')} in {where}{'; it is cut off, download it again' if is_cut else ''}"


def position_in(text: str, at: int, line: int = 1, column: int = 1) -> str:
    """Position of a character, in words: line, column, and the last key before it. `line` and `column` are those of the
    text's first character."""
    newline = text.rfind("\n", 0, at)
    column = at - newline if newline >= 0 else column + at
    keys = _KEY.findall(text, max(0, at - 1000), at)
    after = f", after the key {quoted(keys[-1])}" if keys else ""
    return f"line {line + text.count(chr(10), 0, at)}, column {column}{after}"


def _doubtful(value: Any) -> Iterator[tuple[Path, str]]:
    """(keys that lead to it, fault) of every doubtful value in a value."""
    waiting: list[tuple[Path, Iterator[tuple[str | int, Any]]]] = [((), iter([(0, value)]))]
    while waiting:
        above, entries = waiting[-1]
        part, item = next(entries, (None, None))
        path = (*above, part) if isinstance(part, str) else above
        if part is None:
            waiting.pop()
        elif isinstance(item, float) and (item != item or item in (float("inf"), float("-inf"))):
            yield path, f"is {item}, which is not a number in JSON"
        elif isinstance(item, (dict, list)):
            if isinstance(item, _WithDuplicates):
                yield from (((*path, key), "occurs twice with different values") for key in item.duplicates)
            waiting.append((path, iter(item.items() if isinstance(item, dict) else enumerate(item))))


def _described(path: Path, fault: str, lines: Mapping[Path, list[int]]) -> str:
    numbers = " and ".join(map(str, lines.get(path, ())))
    where = f" in line{'s' * (' ' in numbers)} {numbers}" if numbers else ""
    return f"{quoted('.'.join(path))}{where} {fault}"


def _lines(text: str, paths: set[Path]) -> dict[Path, list[int]]:
    """The lines of the keys at the end of these paths, by path; of each path the first five lines."""
    found: dict[Path, list[int]] = {}
    stack: list[str | None] = []
    last, lengths = None, set(map(len, paths))
    for token in _TOKEN.finditer(text):
        sign = token[0]
        if sign in "{[":
            stack.append(None)
        elif sign in "}]":
            stack.pop()
        elif sign == ":" and last is not None:
            stack[-1] = json.loads(last[0])
            path = tuple(key for key in stack if key is not None) if len(stack) - stack.count(None) in lengths else ()
            if path in paths and len(found.setdefault(path, [])) < 5:
                found[path].append(text.count("\n", 0, last.start()) + 1)
        elif sign != ",":
            last = token
    return found
