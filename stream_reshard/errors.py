"""Every error a user can cause, and the exit code each one ends with.

::

    StreamReshardError                1   anything that is none of the below
    ├── UsageError                    2   flags that contradict each other, the model or the machine
    ├── SourceError                   3   the source is refused, unreadable, or changed under the run
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
from collections.abc import Iterable
from pathlib import PurePath


class StreamReshardError(Exception):
    """Root of the tree. `exit_code` is what the command line ends with."""

    exit_code = 1
    severity = 9
    """Where it stands in a list of problems: lower is worse and is printed first."""
    hint = ""
    """What to do next, on a line of its own."""


class UsageError(StreamReshardError):
    """Flags that contradict each other, the model or the machine."""

    exit_code = 2
    severity = 1


class SourceError(StreamReshardError):
    """The source is refused, unreadable, or changed under the run."""

    exit_code = 3
    severity = 0


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
        self.problems = tuple(sorted(problems, key=lambda problem: problem.severity))
        super().__init__("\n".join(map(str, self.problems)))
        self.exit_code = self.problems[0].exit_code


class Problems(list[StreamReshardError]):
    """Collects problems, so that a user sees all of them at once instead of one per attempt."""

    def collect(self, function, *args, **kwargs):
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
