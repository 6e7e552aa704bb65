"""JSON that somebody else wrote: what is wrong with it is named by its key, line and column."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Union

from stream_reshard.errors import quoted

_KEY = re.compile(r'"([^"\\\n]{1,200})"\s*:')
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]', re.DOTALL)
_LONG_NUMBER = re.compile(r"\d{4301}")
"""What Python refuses to make an int of (sys.set_int_max_str_digits)."""

Path = tuple[Union[str, int], ...]
"""The keys and positions that lead to a value."""


@dataclass(frozen=True)
class Doubt:
    """A value on which readers of JSON disagree: a key that occurs twice, a number that is none."""

    key: str
    """The outermost key above it."""
    text: str
    """What it is, with its own key and line."""


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
    differing = {key: None for key, value in pairs if repr(first.setdefault(key, value)) != repr(value)}
    if not differing:
        return table
    twins = _Twins(table)
    twins.keys_ = tuple(differing)
    return twins


def read_json_text(content: bytes) -> tuple[Any, list[Doubt]]:
    """The value of a text as Python's reader reads it, after a byte order mark if there is one; and what is doubtful
    in it. Raises ValueError with key, line and column where the text is no JSON."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[:error.start].decode("utf-8-sig", "replace")
        raise ValueError(f"it is not UTF-8: byte {content[error.start]:#x} in {place(before, len(before))}") from error
    try:
        value = json.loads(text, object_pairs_hook=_last_of_twins)
    except json.JSONDecodeError as error:
        raise ValueError(syntax_fault(error, place(text, error.pos))) from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except ValueError as error:
        found = _LONG_NUMBER.search(text)
        raise ValueError(f"a number has too many digits in {place(text, found.start() if found else 0)}") from error
    return value, [_doubt(text, path, what) for path, what in _doubtful(value)]


def syntax_fault(error: json.JSONDecodeError, where: str) -> str:
    """What is wrong with a text that ends with what was parsed."""
    is_cut = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
    return f"{error.msg.removesuffix(' at')} in {where}{'; it is cut off, download it again' if is_cut else ''}"


def place(text: str, at: int, line: int = 1, column: int = 1) -> str:
    """Where a character stands, for people: line, column, and the last key before it. The text begins in `line` and
    `column`."""
    newline = text.rfind("\n", 0, at)
    column = at - newline if newline >= 0 else column + at
    keys = _KEY.findall(text, max(0, at - 1000), at)
    after = f", after the key {quoted(keys[-1])}" if keys else ""
    return f"line {line + text.count(chr(10), 0, at)}, column {column}{after}"


def _doubtful(value: Any) -> Iterator[tuple[Path, str]]:
    """(path, what it is) of everything in a value on which readers disagree."""
    waiting: list[tuple[Path, Iterator[tuple[str | int, Any]]]] = [((), iter([("", value)]))]
    while waiting:
        above, entries = waiting[-1]
        part, item = next(entries, (None, None))
        if part is None:
            waiting.pop()
        elif isinstance(item, float) and (item != item or item in (float("inf"), float("-inf"))):
            yield (*above, part), f"is {item}, which is not a number that may stand there"
        elif isinstance(item, (dict, list)):
            if isinstance(item, _Twins):
                yield from (((*above, part, key), "occurs twice with different values") for key in item.keys_)
            waiting.append(((*above, part), iter(item.items() if isinstance(item, dict) else enumerate(item))))


def _doubt(text: str, path: Path, what: str) -> Doubt:
    keys = path[1:1 + max((i for i, part in enumerate(path) if isinstance(part, str)), default=0)]
    lines = [str(text.count("\n", 0, at) + 1) for at in _offsets(text, keys)][:5]
    return Doubt(str((*keys, "")[0]),
                 f"{quoted('.'.join(map(str, keys)))} in line{'s' * (len(lines) > 1)} {' and '.join(lines)} {what}")


def _offsets(text: str, path: Path) -> Iterator[int]:
    """Where in a text that is JSON the key at a path stands; several times where it occurs so."""
    stack: list[str | int | None] = []
    last = None
    for token in _TOKEN.finditer(text):
        sign = token[0]
        if sign in "{[":
            stack.append(0 if sign == "[" else None)
        elif sign in "}]":
            stack.pop()
        elif sign == "," and isinstance(stack[-1], int):
            stack[-1] += 1
        elif sign == ":":
            assert last is not None, "a name stands before it"
            stack[-1] = json.loads(last[0])
            if len(stack) == len(path) and tuple(stack) == path:
                yield last.start()
        else:
            last = token
