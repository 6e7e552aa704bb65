"""Entry of the command line: streams, signals, exit codes, and one JSON document whatever the outcome."""
from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stream_reshard import __version__, api
from stream_reshard.cli.commands import RUN, Outcome, allow_list
from stream_reshard.cli.flags import parse, parser
from stream_reshard.cli.screen import error_word, say, tell
from stream_reshard.errors import Refused, ResourceError, StreamReshardError, UsageError, quoted
from stream_reshard.machine import memory
from stream_reshard.machine.stop import Stop

JSON_FORMAT = 1
"""Version of the keys in documents of --json. Keys are added without a new version, never changed or removed."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to stop; batch systems send the last one some time before the limit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv:
        tell(parser().format_help().rstrip())
        return UsageError.exit_code
    is_json, is_quiet = "--json" in argv, "--quiet" in argv
    try:
        outcome = _outcome(argv)
    except StreamReshardError as error:
        outcome = Outcome(None, error)
    except OSError as error:
        where = f"{quoted(error.filename)}: " if error.filename else ""
        outcome = Outcome(None, ResourceError(where + (error.strerror or str(error))))
    except Exception as error:
        if is_json:
            say(json.dumps(_document(Outcome(None, StreamReshardError(f"unexpected: {error!r}"))), indent=1))
        raise
    try:
        _show(outcome, is_json, is_quiet)
    except ResourceError as error:
        outcome = Outcome(None, error)
        _show_error(error)
    return outcome.error.exit_code if outcome.error else 0


def _outcome(argv: Sequence[str]) -> Outcome:
    stop = Stop()
    with api.in_words_of_flags(), _listening(stop), memory.granted():
        if (names := allow_list(argv)) is not None:
            return names
        arguments = parse(argv)
        return RUN[arguments.command](arguments, stop)


def _show(outcome: Outcome, is_json: bool, is_quiet: bool) -> None:
    if is_json:
        say(json.dumps(_document(outcome), indent=1))
    elif outcome.report is not None and not is_quiet:
        say(str(outcome.report))
    if outcome.error is not None:
        _show_error(outcome.error)


def _show_error(error: StreamReshardError) -> None:
    for line in str(error).splitlines():
        tell(f"{error_word()} {line}")
    if error.hint:
        tell(error.hint)


def _document(outcome: Outcome) -> dict[str, Any]:
    """The JSON document of an outcome: the facts of its report, and every problem."""
    error = outcome.error
    document: dict[str, Any] = {"format": JSON_FORMAT, "version": __version__, "ok": error is None,
                                "exit_code": error.exit_code if error else 0}
    if outcome.report is not None:
        document |= outcome.report.facts
    if error is not None:
        problems = error.problems if isinstance(error, Refused) else (error,)
        document["problems"] = [{"kind": type(problem).__name__, "exit_code": problem.exit_code, "text": str(problem)}
                                for problem in problems]
        if error.hint:
            document["hint"] = error.hint
    return document


@contextmanager
def _listening(stop: Stop) -> Iterator[None]:
    """Let signals ask for a stop: between blocks while files are written, at once while nothing is. A second one ends
    the process as it stands, which costs the files under way and nothing else."""
    def handle(number: int, frame: object) -> None:
        if stop.signal_number:
            os._exit(128 + number)
        stop.request(number)
        if not stop.is_awaited:
            raise stop.interruption()

    # What is ignored stays ignored: nohup means it, and so does a shell for what it runs in the background.
    before = {number: signal.signal(number, handle) for number in _SIGNALS
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _mend_streams() -> None:
    """Have three streams that take every text. One that was closed leads nowhere: the next file that is opened would
    have its number, and messages would be written into that. Characters that an encoding lacks are escaped."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")


def script() -> None:
    """The installed command `stream-reshard`."""
    _mend_streams()
    sys.exit(main())
