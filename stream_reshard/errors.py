"""Every error a user can cause, and its exit code.

::

    StreamReshardError                1   anything else
    ├── UsageError                    2   flags that contradict each other, the model or the machine
    ├── SourceError                   3   the source is refused, unreadable, or changed under the run
    │   └── Cause                     3   the one fault that explains the others
    ├── DestinationError              4   the destination is refused
    ├── DifferenceError               5   two checkpoints do not hold the same model
    ├── ResourceError                 6   disk, memory or I/O gave out; the run can be resumed
    ├── LockedError                   7   another run writes to the same destination
    ├── Interrupted                 130   SIGINT (143: SIGTERM); the run can be resumed
    └── Refused                           several errors, found before anything was written

An error's text is one line: what, where, the two numbers, what to do.
"""
from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class StreamReshardError(Exception):
    """Root of the tree."""

    exit_code = 1
    """Exit code of the command line."""
    severity = 9
    """Position in a list of problems: lower is worse and is printed first."""
    hint = ""
    """Next step for the user, printed on a line of its own; "" for none."""

    def __init__(self, *words: str, kind: str = "", num_more: int = 0):
        super().__init__(*words)
        self.kind = kind
        """Plural noun phrase for faults of this kind, as in "and 7 more tensors are missing"; "" for none."""
        self.num_more = num_more
        """Number of further faults of this kind, counted but not kept."""

    def reword(self, change: Callable[[str], str]) -> None:
        """Change every text, in place: the error is raised already."""
        self.args = tuple(change(word) if isinstance(word, str) else word for word in self.args)


class UsageError(StreamReshardError):
    """Flags that contradict each other, the model or the machine."""

    exit_code = 2
    severity = 1


class SourceError(StreamReshardError):
    """The source is refused, unreadable, or changed under the run."""

    exit_code = 3
    severity = 0


class Cause(SourceError):
    """The one fault of a source that explains the others: it is reported alone, with its cure."""

    severity = -1


class DestinationError(StreamReshardError):
    """The destination is refused."""

    exit_code = 4
    severity = 2


class DifferenceError(StreamReshardError):
    """Two checkpoints do not hold the same model."""

    exit_code = 5
    severity = 4


class ResourceError(StreamReshardError):
    """Disk, memory or I/O gave out."""

    exit_code = 6
    severity = 3


class LockedError(StreamReshardError):
    """Another run writes to the same destination."""

    exit_code = 7
    severity = 2


class Interrupted(StreamReshardError):
    """A signal asked the run to stop."""

    exit_code = 130

    def __init__(self, text: str, signal_number: int = 2):
        super().__init__(text)
        self.exit_code = 128 + signal_number


class Refused(StreamReshardError):
    """All problems found before the first byte was written, worst first; ends with the exit code of the worst."""

    def __init__(self, problems: Iterable[StreamReshardError]):
        self.problems = tuple(sorted(explained(problems), key=lambda problem: problem.severity))
        super().__init__("\n".join(lines_of(self.problems)))
        self.exit_code = self.problems[0].exit_code

    def reword(self, change: Callable[[str], str]) -> None:
        super().reword(change)
        for problem in self.problems:
            problem.reword(change)


class Problems(list[StreamReshardError]):
    """Collects problems, so that a user sees all of them at once instead of one per attempt."""

    def collect(self, function: Callable[Parameters, Returned], *args: Parameters.args,
                **kwargs: Parameters.kwargs) -> Returned | None:
        """Return `function(...)`; where it raises an error of this module, add the error and return None."""
        try:
            return function(*args, **kwargs)
        except Interrupted:
            raise
        except Refused as error:
            self.extend(error.problems)
        except StreamReshardError as error:
            # A traceback would keep the locals of the function in memory, such as a half parsed header.
            error.__cause__ = error.__context__ = None
            self.append(error.with_traceback(None))
        return None

    def raise_if_any(self) -> None:
        """Raises Refused if there is at least one problem."""
        if self:
            raise Refused(self)

    def required(self, value: Returned | None) -> Returned:
        """Return `value`. Raises Refused if there are problems. None without a problem is a fault of this tool."""
        self.raise_if_any()
        if value is None:
            raise StreamReshardError("this is a fault of stream_reshard: a part is missing, and no problem names it")
        return value


_MAX_OF_A_KIND = 10
"""Faults of one kind that are listed; the rest is only counted."""

_MAX_OTHERS = 50
"""Faults without a kind that are listed; the rest is only counted."""


def explained(problems: Iterable[StreamReshardError]) -> list[StreamReshardError]:
    """The problems; if a `Cause` is among them, without the other faults of the source, which follow from it."""
    listed = list(problems)
    if not any(isinstance(problem, Cause) for problem in listed):
        return listed
    return [problem for problem in listed if isinstance(problem, Cause) or not isinstance(problem, SourceError)]


def lines_of(problems: Iterable[StreamReshardError]) -> list[str]:
    """The lines that report problems: of each kind at most `_MAX_OF_A_KIND` and the number of the others. Causes of one
    kind make one line."""
    groups: dict[tuple[int, str], list[StreamReshardError]] = {}
    for problem in problems:
        groups.setdefault((problem.severity, problem.kind), []).append(problem)
    lines: list[str] = []
    for (severity, kind), group in groups.items():
        limit = 1 if severity < 0 and kind else _MAX_OF_A_KIND if kind else _MAX_OTHERS
        num_more = max(0, len(group) - limit) + sum(problem.num_more for problem in group)
        more = f"and {num_more} more {kind}".rstrip()
        lines += map(str, group[:limit])
        if num_more and severity < 0:
            lines[-1] += f" ({more})"
        elif num_more:
            lines.append(more)
    return lines


def quoted(name: object) -> str:
    """A name from a file, safe to print: in quotes, ASCII only, of limited length. Of a long path more of the end is
    kept."""
    text = ascii(str(name))
    head, tail = (200, 300) if isinstance(name, PurePath) else (120, 60)
    return text if len(text) <= head + tail + 8 else f"{text[:head]}...{text[-tail:]}"


def shown(path: object) -> str:
    """A path for people: unchanged if it is printable, else `quoted`."""
    return str(path) if str(path).isprintable() else quoted(path)


def shell_word(text: object) -> str:
    """A word of a command line, for a person to copy; unprintable bytes are escaped as bash reads them ($'...')."""
    if str(text).isprintable():
        return shlex.quote(str(text))
    return "$'" + "".join(chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
                          for byte in os.fsencode(str(text))) + "'"
