"""The commands: flags to `api`, results to stdout, progress and messages to stderr, errors to exit codes."""
from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stream_reshard import api
from stream_reshard.cli.flags import COMMANDS, parser_of
from stream_reshard.destination.staging import staging_of
from stream_reshard.errors import (
    DifferenceError, Problems, ResourceError, StreamReshardError, UsageError, quoted, shell_word)
from stream_reshard.machine import memory
from stream_reshard.machine.stop import Stop
from stream_reshard.options import ForwardOptions, Options, VerifyOptions
from stream_reshard.options.declaring import Declared, options_of
from stream_reshard.report import Report, Reported

if TYPE_CHECKING:
    from stream_reshard.check.forward.report import ForwardResult

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to stop; batch systems send SIGUSR1 some time before the time limit."""


def _choices(arguments: argparse.Namespace, options: type[Declared]) -> dict[str, Any]:
    """The values of the declared options, by name."""
    return {own.name: getattr(arguments, own.name) for own in options_of(options)}


def _planned(arguments: argparse.Namespace, stop: Stop) -> api.Conversion:
    """The conversion that the flags choose."""
    return api.plan(arguments.source, arguments.destination, **_choices(arguments, Options), stop=stop)


def _print(arguments: argparse.Namespace, report: Reported) -> None:
    if arguments.json:
        _print_result(json.dumps(report.facts, indent=1))
    elif not arguments.quiet:
        _print_result(str(report))


def _print_result(text: str) -> None:
    """Print to stdout. Raises ResourceError if that fails."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # The rest of the buffer is written there.
        raise ResourceError(f"standard output: {error.strerror}") from error


def _print_message(text: str) -> None:
    """Print to stderr. A failure is ignored: the exit code holds the outcome."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _bar(total: int, quiet: bool, **look: Any) -> Any:
    """A progress bar; None if stderr is no terminal."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        return None
    from tqdm import tqdm
    return tqdm(total=total, file=sys.stderr, **look)


def convert_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`SRC DST`: plan, print the plan, run it, print the summary."""
    conversion = _planned(arguments, stop)
    if not (arguments.json or arguments.quiet or (conversion.is_done and not arguments.overwrite)):
        _print_result(str(conversion))
    bar = _bar(conversion.plan.nbytes, arguments.quiet, unit="B", unit_scale=True)

    def advance(done: int, total: int) -> None:
        if bar is not None:
            bar.update(done - bar.n)
            bar.set_postfix_str(f"memory {memory.human(memory.resident())}")

    try:
        result = api.run(conversion, advance, stop)
    except StreamReshardError as error:
        if error.exit_code == ResourceError.exit_code or error.exit_code > 128:
            kept = staging_of(conversion.output.destination)
            error.hint = (f"{quoted(kept)} keeps what is done; " if kept.exists() else "") + (
                f"to go on: {_resume_command(arguments)}")
        raise
    finally:
        if bar is not None:
            bar.close()
    _print(arguments, result)


def _resume_command(arguments: argparse.Namespace) -> str:
    """The command that resumes an interrupted run: its own, without flags that would discard its files."""
    kept = [word for word in arguments.argv if word not in ("--restart", "--break-lock")]
    return " ".join(map(shell_word, ["python", "-m", "stream_reshard", *kept]))


def plan_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`plan SRC [DST]`: print the plan, and write nothing."""
    _print(arguments, _planned(arguments, stop))


def verify_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`verify SRC DST`. With --forward all checks run even after a difference; all are reported at the end."""
    found, forward = Problems(), None
    _refuse_forward_flags(arguments)
    plan = found.collect(_planned_forward, arguments) if arguments.forward else None
    _raise_other_than_differences(found)
    report = found.collect(_verified, arguments, stop)
    _raise_other_than_differences(found)
    if plan is not None:
        forward = found.collect(_run_forward, arguments, plan, stop)
        found.extend(filter(None, [forward.difference if forward else None]))
    if report is not None or forward is not None:
        facts = (report.facts if report else {"equal": False}) | ({"forward": forward.facts} if forward else {})
        _print(arguments, Report(facts, (*(report.lines if report else ()), *(forward.lines if forward else ()))))
    found.raise_if_any()


def _refuse_forward_flags(arguments: argparse.Namespace) -> None:
    """Raises UsageError for a flag that has no effect without --forward."""
    shared = {own.name for own in options_of(VerifyOptions)}
    for own in options_of(ForwardOptions):
        if own.name not in shared and not arguments.forward and getattr(arguments, own.name) != own.default:
            raise UsageError(f"{own.flag} has no effect without --forward; add it, or leave {own.flag} out")


def _raise_other_than_differences(found: Problems) -> None:
    if not all(isinstance(problem, DifferenceError) for problem in found):
        found.raise_if_any()


def _verified(arguments: argparse.Namespace, stop: Stop) -> Report:
    with _counted(arguments.quiet, "part") as advance:
        return api.verify(arguments.source, arguments.destination, **_choices(arguments, VerifyOptions), stop=stop,
                          progress=advance)


def _planned_forward(arguments: argparse.Namespace) -> Any:
    plan = api.plan_forward(arguments.source, arguments.destination, **_choices(arguments, ForwardOptions))
    if not (arguments.json or arguments.quiet):
        _print_result(str(plan))
    return plan


def _run_forward(arguments: argparse.Namespace, plan: Any, stop: Stop) -> ForwardResult:
    with _counted(arguments.quiet, "layer") as advance:
        return api.run_forward(plan, advance, stop)


@contextmanager
def _counted(quiet: bool, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that moves a progress bar, if there is one."""
    bar = _bar(0, quiet, unit=unit)

    def advance(done: int, total: int) -> None:
        if bar is not None:
            bar.total = total
            bar.update(done - bar.n)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


def inspect_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`inspect DIR`: print the contents of a folder."""
    _print(arguments, api.inspect(arguments.source, values=arguments.values, stop=stop))


def diff_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`diff A B`: print the differences of two layouts."""
    report = api.diff(arguments.source, arguments.destination)
    _print(arguments, report)
    if not report.facts["same"]:
        raise DifferenceError(f"the layouts of {quoted(arguments.source)} and {quoted(arguments.destination)} differ")


def demo_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`demo`: convert and verify a small Llama."""
    from stream_reshard.cli.demo import demo
    _print(arguments, demo(arguments.quiet or arguments.json, stop))


_RUN = {"convert": convert_command, "plan": plan_command, "verify": verify_command, "inspect": inspect_command,
        "diff": diff_command, "demo": demo_command}


@contextmanager
def _listening(stop: Stop) -> Iterator[None]:
    """Let signals request a stop: between blocks while files are written, else at once. A second signal ends the
    process immediately; only the unfinished files are lost."""
    def handle(number: int, frame: object) -> None:
        if stop.signal_number:
            os._exit(128 + number)
        stop.request(number)
        if not stop.is_awaited:
            raise stop.interruption()

    # Signals that nohup, or a shell for its background jobs, had ignored stay ignored.
    before = {number: signal.signal(number, handle) for number in _SIGNALS
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command, rest = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("convert", argv)
    arguments = parser_of(command).parse_args(rest)
    arguments.argv = argv
    stop = Stop()
    try:
        with _listening(stop), memory.granted():
            _RUN[command](arguments, stop)
        return 0
    except StreamReshardError as error:
        for line in str(error).splitlines():
            _print_message(f"error: {line}")
        if error.hint:
            _print_message(error.hint)
        return error.exit_code
    except OSError as error:
        name = f"{quoted(error.filename)}: " if error.filename else ""
        _print_message(f"error: {name}{error.strerror or error}")
        return ResourceError.exit_code


def _mend_streams() -> None:
    """Make the three standard streams accept every text. A closed one becomes /dev/null: else the next file that is
    opened would get its number, and messages. Characters that the encoding of a stream lacks are escaped."""
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
