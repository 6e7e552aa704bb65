"""Report: the one shape of all results, facts for programs and lines for people; and progress on the way to them."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from textwrap import wrap
from typing import Any


class Reported(ABC):
    """A plan or an outcome, as facts and lines."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """All facts, for JSON; sizes in bytes."""

    @property
    @abstractmethod
    def lines(self) -> tuple[str, ...]:
        """The facts as lines of text, for a person."""

    def __repr__(self) -> str:
        first = " ".join(self.lines[0].split()) if self.lines else "nothing"
        return f"<{type(self).__name__}: {first}>"

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def _repr_html_(self) -> str:
        """The lines, as a notebook shows them."""
        from html import escape
        return f"<pre>{escape(str(self))}</pre>"


class Report(Reported):
    """The outcome of a command that writes no checkpoint."""

    def __init__(self, facts: dict[str, Any], lines: tuple[str, ...]):
        self._facts, self._lines = facts, lines

    @property
    def facts(self) -> dict[str, Any]:
        return self._facts

    @property
    def lines(self) -> tuple[str, ...]:
        return self._lines


_INDENT = " " * 9
"""Place of the texts of a screen, behind their words."""


def wrapped(text: str, first: str = _INDENT) -> list[str]:
    """A text in lines of 80 columns; words are never cut."""
    return wrap(text, 80, initial_indent=first, subsequent_indent=_INDENT, break_long_words=False,
                break_on_hyphens=False)


def note_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The notes among facts, for a person."""
    return (f"note     {note}" for note in facts["notes"])


def layers_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The layers of a truncated model among facts, for a person; nothing for a whole model."""
    if facts["whole_num_layers"] is not None:
        yield f"layers   first {facts['num_layers']} of {facts['whole_num_layers']}: a trial, not the whole model"


Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@contextmanager
def shown(progress: Progress | bool, unit: str) -> Iterator[Progress]:
    """The function itself; for True one that moves a bar of tqdm, for False one that does nothing. `unit`: "B" for
    bytes, else the name of a counted thing."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield lambda done, total: None
    else:
        from tqdm.auto import tqdm
        with tqdm(unit=unit, unit_scale=unit == "B", unit_divisor=1024) as bar:
            def draw(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield draw
