"""The declaration of an option: a field of a dataclass, from which flag, keyword and documentation are made."""
from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from stream_reshard.errors import Problems, UsageError, quoted

RESULT, ACCEPTED, SAFETY, RUN = "the result", "acceptance", "safety", "running"
"""Headings for groups of flags."""

T = TypeVar("T")
Own = TypeVar("Own", bound="Declared")


@dataclass(frozen=True)
class Option:
    """One declared option."""

    help: str
    """Meaning, without the default; each `%` is doubled."""
    metavar: str = ""
    """Name of the value in a usage line."""
    least: int | None = None
    """Smallest accepted int."""
    parse: Callable[[str], Any] | None = None
    """Function from the user's text to the value. Raises UsageError."""
    shown: str = ""
    """Default as a person reads it; "" where it is the value itself."""
    group: str = ""
    """Heading in the help under which the flag stands."""
    name: str = ""
    kind: Any = None
    """Type of the value, without None: bool, int, float, str, Path, tuple[str, ...] or a Literal."""
    is_optional: bool = False
    default: Any = None

    @property
    def flag(self) -> str:
        """The flag on a command line."""
        return flag_of(self.name)

    @property
    def choices(self) -> tuple[str, ...]:
        """The accepted values; () if every value of the type is accepted."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def text(self) -> str:
        """Meaning and default."""
        shown = self.shown or (str(self.default) if self.default not in (None, False, ()) else "")
        return f"{self.help} (default {shown})" if shown else self.help

    def value_of(self, given: Any) -> Any:
        """The value for what a user gave: the value itself, a size or percentage as text, a path as str or PathLike,
        one name or several. Raises UsageError."""
        if self.parse is not None and isinstance(given, str):
            return self.parse(given)
        if self.kind is Path and isinstance(given, (str, PathLike)):
            if not fspath(given):
                raise UsageError(f"{self.flag}: the path is empty")
            return Path(given)
        if get_origin(self.kind) is tuple:
            return (given,) if isinstance(given, str) else tuple(given)
        return given

    def check(self, value: Any) -> None:
        """Raises UsageError for a value that is not accepted."""
        if value is None and self.is_optional:
            return
        if self.choices:
            if value not in self.choices:
                raise UsageError(f"{self.flag} {quoted(value)}: choose {_listed(self.choices)}"
                                 f"{did_you_mean(str(value), self.choices)}")
        elif not self._is_of_kind(value):
            raise UsageError(f"{self.flag} {quoted(value)} is not {_WORDS.get(self.kind, 'a list of names')}")
        elif self.least is not None and value < self.least:
            raise UsageError(f"{self.flag} {value}: it is at least {self.least}")

    def _is_of_kind(self, value: Any) -> bool:
        if get_origin(self.kind) is tuple:
            return isinstance(value, tuple) and all(isinstance(word, str) for word in value)
        if self.kind is float:
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        return isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool))


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}

_KEY = "option"


def option(default: T, help: str, *, metavar: str = "", least: int | None = None,
           parse: Callable[[str], Any] | None = None, shown: str = "", group: str = RESULT) -> T:
    """A field that declares an option; the parameters are those of `Option`."""
    return field(default=default, metadata={_KEY: Option(help, metavar, least, parse, shown, group)})


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Declared:
    """Base of classes whose fields are options; an instance holds accepted values only."""

    def __post_init__(self) -> None:
        """Raises UsageError with a line for every wrong choice."""
        problems = Problems()
        for own in options_of(type(self)):
            problems.collect(own.check, getattr(self, own.name))
        _raise_all(problems)

    @classmethod
    def of(cls: type[Own], **given: Any) -> Own:
        """The options for what a user gave (`Option.value_of`). Raises UsageError with a line for each wrong choice."""
        problems, values = Problems(), dict(given)
        for own in options_of(cls):
            if given.get(own.name) is not None:
                values[own.name] = problems.collect(own.value_of, given[own.name])
        _raise_all(problems)
        return cls(**values)


def _raise_all(problems: Problems) -> None:
    if problems:
        raise UsageError("\n".join(map(str, problems)))


_FOUND: dict[type[Declared], tuple[Option, ...]] = {}
"""Options of the classes that were asked for: to resolve the types of a class takes a fifth of the plan of a small
model, and a run asks six times."""


def options_of(cls: type[Declared]) -> tuple[Option, ...]:
    """The options of a class: its own, then those of its base classes."""
    if cls not in _FOUND:
        _FOUND[cls] = tuple(sorted(_options_of(cls), key=lambda own: own.name not in cls.__annotations__))
    return _FOUND[cls]


def _options_of(cls: type[Declared]) -> Iterator[Option]:
    hints = get_type_hints(cls)
    for own in fields(cls):
        if _KEY in own.metadata:
            kinds = [kind for kind in _members(hints[own.name]) if kind is not type(None)]
            yield replace(own.metadata[_KEY], name=own.name, kind=kinds[0], default=own.default,
                          is_optional=len(kinds) < len(_members(hints[own.name])))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def did_you_mean(word: str, known: tuple[str, ...]) -> str:
    """The end of a message about an unknown word: the most similar known word; "" if none is similar."""
    import difflib
    near = difflib.get_close_matches(word.lower(), known, 1)
    near = near or [name for name in known if name.startswith(word.lower()) or word.lower().startswith(name)][:1]
    return f"; did you mean {near[0]}?" if near else ""


def _listed(words: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
