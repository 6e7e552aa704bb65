"""Every error a user can cause, and the exit code each one ends with.

::

    StreamReshardError                1   anything that is none of the below
    ├── UsageError                    2   flags that contradict each other, the model or the machine
    ├── SourceError                   3   the source is refused, unreadable, or changed under the run
    │   └── Cause                     3   the one fault that explains the others
    ├── DestinationError              4   the destination is refused
    ├── DifferenceError               5   two checkpoints do not hold the same model
    ├── ResourceError                 6   disk, memory or I/O gave out; the run can be resumed
    ├── LockedError                   7   another run writes to the same destination
    ├── Interrupted                 130   SIGINT (143: SIGTERM); the run can be resumed
    └── Refused                           several of the above, found before anything was written

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
    """Root of the tree. `exit_code` is what the command line ends with."""

    exit_code = 1
    severity = 9
    """Position in a list of problems: lower is worse and is printed first."""
    hint = ""
    """Next thing to do, on a line of its own."""

    def __init__(self, *words: str, kind: str = "", num_more: int = 0):
        super().__init__(*words)
        self.kind = kind
        """Plural noun phrase for faults of this kind, as in "and 7 more tensors are missing"; "" for none."""
        self.num_more = num_more
        """Number of further faults of the kind, found and not kept."""


class UsageError(StreamReshardError):
    """Flags that contradict each other, the model or the machine."""

    exit_code = 2
    severity = 1


class SourceError(StreamReshardError):
    """The source is refused, unreadable, or changed under the run."""

    exit_code = 3
    severity = 0


class Cause(SourceError):
    """The one fault of a source that explains the others: it is told alone, with its cure."""

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
        super().__init__("\n".join(told(self.problems)))
        self.exit_code = self.problems[0].exit_code


class Problems(list[StreamReshardError]):
    """Collects problems, so that a user sees all of them at once instead of one per attempt."""

    def collect(self, function: Callable[Parameters, Returned], *args: Parameters.args,
                **kwargs: Parameters.kwargs) -> Returned | None:
        """Return `function(...)`, or None after adding what it raised to the list."""
        try:
            return function(*args, **kwargs)
        except Interrupted:
            raise
        except Refused as error:
            self.extend(error.problems)
        except StreamReshardError as error:
            # With its traceback it would keep what the function held, such as a header parsed half.
            error.__cause__ = error.__context__ = None
            self.append(error.with_traceback(None))
        return None

    def raise_if_any(self) -> None:
        """Raises Refused when there is at least one problem."""
        if self:
            raise Refused(self)

    def required(self, value: Returned | None) -> Returned:
        """`value`, which is None only where a problem says why. Raises Refused with all problems."""
        self.raise_if_any()
        if value is None:
            raise StreamReshardError("this is a fault of stream_reshard: a part is missing and no problem says why")
        return value


_MAX_OF_A_KIND = 10
"""Faults of one kind that are told; of more only how many."""

_MAX_OTHERS = 50
"""Faults without a kind that are told."""


def explained(problems: Iterable[StreamReshardError]) -> list[StreamReshardError]:
    """The same problems; where a cause is among them, without the faults of the source that follow from it."""
    listed = list(problems)
    if not any(isinstance(problem, Cause) for problem in listed):
        return listed
    return [problem for problem in listed if isinstance(problem, Cause) or not isinstance(problem, SourceError)]


def told(problems: Iterable[StreamReshardError]) -> list[str]:
    """The lines that a person reads of problems: of each kind at most ten, and how many more there are. Causes of one
    kind are one line."""
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
    """A name from a file, safe to print: no control characters, no surprises from other scripts, not endless. Of a long
    path the end is kept."""
    text = ascii(str(name))
    head, tail = (200, 300) if isinstance(name, PurePath) else (120, 60)
    return text if len(text) <= head + tail + 8 else f"{text[:head]}...{text[-tail:]}"


def shown(path: object) -> str:
    """A path for people: as it is where it can be printed, else quoted."""
    return str(path) if str(path).isprintable() else quoted(path)


def shell_word(text: object) -> str:
    """A word for a command line that a person copies; one that cannot be printed is spelled as bash reads it."""
    if str(text).isprintable():
        return shlex.quote(str(text))
    return "$'" + "".join(chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}"
                          for byte in os.fsencode(str(text))) + "'"
