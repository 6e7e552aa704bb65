"""JSON that somebody else wrote: what is wrong with it is named by its key, line and column."""
from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stream_reshard.errors import quoted

_KEY = re.compile(r'"([^"\\\n]{1,200})"\s*:')
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]', re.DOTALL)
_LONG_NUMBER = re.compile(r"\d{4301}")
"""Numbers of which Python refuses to make an int (sys.set_int_max_str_digits)."""

Path = tuple[str, ...]
"""The keys that lead to a value, the outermost first; positions in lists are left out."""


MAX_DOUBTS = 10
"""Doubtful values that are described; of more only how many."""


@dataclass
class Doubts:
    """Values on which readers of JSON disagree: keys that occur twice with different values, numbers that are none."""

    texts: list[str] = field(default_factory=list)
    """Descriptions of the values, with key and line; at most `MAX_DOUBTS`."""
    num_more: int = 0


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twin = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(twin)} occurs twice")
    return table


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that may stand there")


def strict_json(text: bytes) -> Any:
    """JSON without the extensions of Python's reader: no NaN or Infinity, no key twice. Raises ValueError."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError(str(error)) from error


class _Twins(dict[str, Any]):
    """An object in which `keys_` occur twice with different values; the last one counts, as for Python's reader."""

    keys_: tuple[str, ...]


def _last_of_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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
    twins = _Twins(table)
    twins.keys_ = tuple(differing)
    return twins


def read_json_text(content: bytes, matters: Container[str] | None) -> tuple[Any, Doubts, Doubts]:
    """The value of a text as Python's reader reads it, after a byte order mark if there is one; what is doubtful in it
    below the outermost keys that matter (None: all do), and what is so below others. Raises ValueError with key, line
    and column where the text is no JSON."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[:error.start].decode("utf-8-sig", "replace")
        raise ValueError(f"it is not UTF-8: byte {content[error.start]:#x} in "
                         f"{position_in(before, len(before))}") from error
    try:
        value = json.loads(text, object_pairs_hook=_last_of_twins)
    except json.JSONDecodeError as error:
        raise ValueError(syntax_fault(error, position_in(text, error.pos))) from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except ValueError as error:
        found = _LONG_NUMBER.search(text)
        raise ValueError(f"a number has too many digits in "
                         f"{position_in(text, found.start() if found else 0)}") from error
    wrong: list[tuple[Path, str]] = []
    others: list[tuple[Path, str]] = []
    faults, notes = Doubts(), Doubts()
    for path, what in _doubtful(value):
        does_matter = matters is None or path[:1] == () or path[0] in matters
        kept, doubts = (wrong, faults) if does_matter else (others, notes)
        if len(kept) < MAX_DOUBTS and (path, what) not in kept:
            kept.append((path, what))
        elif (path, what) != kept[-1]:
            doubts.num_more += 1
    lines = _lines(text, {path for path, _ in wrong + others}) if wrong or others else {}
    faults.texts = [_described(path, what, lines) for path, what in wrong]
    notes.texts = [_described(path, what, lines) for path, what in others]
    return value, faults, notes


def syntax_fault(error: json.JSONDecodeError, where: str) -> str:
    """Fault of a text that ends with what was parsed."""
    is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    return f"{error.msg.removesuffix(' at')} in {where}{'; it is cut off, download it again' if is_cut else ''}"


def position_in(text: str, at: int, line: int = 1, column: int = 1) -> str:
    """Place of a character, for people: line, column, and the last key before it. The text begins in `line` and
    `column`."""
    newline = text.rfind("\n", 0, at)
    column = at - newline if newline >= 0 else column + at
    keys = _KEY.findall(text, max(0, at - 1000), at)
    after = f", after the key {quoted(keys[-1])}" if keys else ""
    return f"line {line + text.count(chr(10), 0, at)}, column {column}{after}"


def _doubtful(value: Any) -> Iterator[tuple[Path, str]]:
    """(keys that lead there, what it is) of everything in a value on which readers disagree."""
    waiting: list[tuple[Path, Iterator[tuple[str | int, Any]]]] = [((), iter([(0, value)]))]
    while waiting:
        above, entries = waiting[-1]
        part, item = next(entries, (None, None))
        path = (*above, part) if isinstance(part, str) else above
        if part is None:
            waiting.pop()
        elif isinstance(item, float) and (item != item or item in (float("inf"), float("-inf"))):
            yield path, f"is {item}, which is not a number that may stand there"
        elif isinstance(item, (dict, list)):
            if isinstance(item, _Twins):
                yield from (((*path, key), "occurs twice with different values") for key in item.keys_)
            waiting.append((path, iter(item.items() if isinstance(item, dict) else enumerate(item))))


def _described(path: Path, what: str, lines: Mapping[Path, list[int]]) -> str:
    numbers = " and ".join(map(str, lines.get(path, ())))
    where = f" in line{'s' * (' ' in numbers)} {numbers}" if numbers else ""
    return f"{quoted('.'.join(path))}{where} {what}"


def _lines(text: str, paths: set[Path]) -> dict[Path, list[int]]:
    """The lines in which keys stand, by what leads to them; of each the first few. Keys in lists count as those of what
    the list belongs to."""
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
