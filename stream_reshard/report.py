"""Report: the shape of every plan and outcome: facts for programs, lines for people."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
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


def note_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The notes among facts, for a person."""
    return (f"note     {note}" for note in facts["notes"])
