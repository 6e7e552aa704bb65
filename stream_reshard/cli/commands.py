"""The command line: flags to `api`, results to stdout, progress and messages to stderr, errors to exit codes."""
from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from stream_reshard import api
from stream_reshard.cli.flags import COMMANDS, parser_of
from stream_reshard.destination.staging import staging_of
from stream_reshard.errors import (
    DifferenceError, Problems, ResourceError, StreamReshardError, UsageError, quoted, shell_word)
from stream_reshard.machine import memory
from stream_reshard.machine.stop import Stop

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to stop; batch systems send the last one some time before the limit."""


def _planned(arguments: argparse.Namespace, stop: Stop) -> api.Conversion:
    """The conversion that the flags choose."""
    return api.plan(
        arguments.source, arguments.destination, tp=arguments.tp, pp=arguments.pp, dp=arguments.dp, to=arguments.to,
        max_memory=arguments.max_memory, num_workers=arguments.workers, max_shard_size=arguments.max_shard_size,
        vocab_size=arguments.vocab_size, vocab_multiple=arguments.vocab_multiple, template=arguments.template,
        tokenizer=arguments.tokenizer, config_class=arguments.nanotron_config, version=arguments.checkpoint_version,
        rope=arguments.rope, dtype=arguments.dtype, allow=arguments.allow, io=arguments.io, digests=arguments.digests,
        restart=arguments.restart, overwrite=arguments.overwrite, break_lock=arguments.break_lock,
        verify=arguments.verify, source_sha256=arguments.source_sha256, stop=stop)


def _percent(text: str) -> float:
    """"10%" as 0.1. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%?", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise UsageError(f"--sample {quoted(text)} is not a part between 0% and 100%; write it as 10%")
    return float(match[1]) / 100


def _print(arguments: argparse.Namespace, document: dict[str, Any], lines: Iterable[str]) -> None:
    if arguments.json:
        _say(json.dumps(document, indent=1))
    elif not arguments.quiet:
        _say("\n".join(lines))


def _notes(facts: dict[str, Any]) -> list[str]:
    return [f"note     {note}" for note in facts.get("notes", ())]


def _say(text: str) -> None:
    """Print to stdout. Raises ResourceError where it takes nothing more."""
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # What is left in the buffer goes there.
        raise ResourceError(f"standard output: {error.strerror}") from error


def _tell(text: str) -> None:
    """Print to stderr. Where nobody listens the exit code has to do."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _bar(total: int, quiet: bool, **look: Any) -> Any:
    """A progress bar; None when stderr is no terminal."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        return None
    from tqdm import tqdm
    return tqdm(total=total, file=sys.stderr, **look)


def convert_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`SRC DST`: plan, print the plan, run it, print the summary."""
    conversion = _planned(arguments, stop)
    if not (arguments.json or arguments.quiet or (conversion.is_done and not arguments.overwrite)):
        _say(api.described(conversion))
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
    _print(arguments, result.facts, result.lines)


def _resume_command(arguments: argparse.Namespace) -> str:
    """The command that takes up an interrupted run: the same, but for what would throw it away."""
    kept = [word for word in arguments.argv if word not in ("--restart", "--break-lock")]
    return " ".join(map(shell_word, ["python", "-m", "stream_reshard", *kept]))


def plan_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`plan SRC [DST]`: everything up to and without the writing."""
    conversion = _planned(arguments, stop)
    _print(arguments, api.facts_of(conversion), [api.described(conversion)])


def verify_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`verify SRC DST`. With --forward all checks run even after a difference; all are reported at the end."""
    from stream_reshard.check.weights import lines
    found, forward = Problems(), None
    for name in ("text", "tokens", "tolerance", "plot"):
        if getattr(arguments, name) is not None and not arguments.forward:
            raise UsageError(f"--{name} means nothing without --forward")
    plan = found.collect(_planned_forward, arguments) if arguments.forward else None
    _raise_other_than_differences(found)
    facts = found.collect(_verified, arguments, stop)
    _raise_other_than_differences(found)
    if plan is not None:
        forward = found.collect(_run_forward, arguments, plan, stop)
        found.extend(filter(None, [forward and forward.difference]))
    if facts is not None or forward is not None:
        document = (facts or {"equal": False}) | ({"forward": forward.facts} if forward else {})
        _print(arguments, document, [*(lines(facts) if facts else ()), *_notes(facts or {}),
                                     *(forward.lines if forward else ())])
    found.raise_if_any()


def _raise_other_than_differences(found: Problems) -> None:
    if not all(isinstance(problem, DifferenceError) for problem in found):
        found.raise_if_any()


def _verified(arguments: argparse.Namespace, stop: Stop) -> dict[str, Any]:
    with _counted(arguments.quiet, "part") as advance:
        return api.verify(
            arguments.source, arguments.destination, max_memory=arguments.max_memory, num_workers=arguments.workers,
            quick=arguments.quick, sample=_percent(arguments.sample), seed=arguments.seed, dtype=arguments.dtype,
            vocab_size=arguments.vocab_size, allow=tuple(arguments.allow), edited=tuple(arguments.edited), stop=stop,
            progress=advance)


def _planned_forward(arguments: argparse.Namespace) -> Any:
    choices = {"text": arguments.text, "plot": arguments.plot, "num_tokens": arguments.tokens,
               "tolerance": arguments.tolerance, "num_threads": arguments.workers}
    plan = api.plan_forward(
        arguments.source, arguments.destination, max_memory=arguments.max_memory, seed=arguments.seed,
        dtype=arguments.dtype, allow=tuple(arguments.allow),
        **{name: value for name, value in choices.items() if value is not None})
    if not (arguments.json or arguments.quiet):
        _say(api.described_forward(plan))
    return plan


def _run_forward(arguments: argparse.Namespace, plan: Any, stop: Stop) -> api.ForwardResult:
    with _counted(arguments.quiet, "layer") as advance:
        return api.run_forward(plan, advance, stop)


@contextmanager
def _counted(quiet: bool, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function for what is done and the total of it, which moves a progress bar where there is one."""
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
    """`inspect DIR`."""
    facts = api.inspect(arguments.source, arguments.values, stop)
    _print(arguments, facts, (f"{key:<22} {value}" for key, value in facts.items()))


def diff_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`diff A B`."""
    from stream_reshard.check.diff import lines
    facts = api.diff(arguments.source, arguments.destination)
    _print(arguments, facts, [*lines(facts), *_notes(facts)])
    if not facts["same"]:
        raise DifferenceError(f"the layouts of {quoted(arguments.source)} and {quoted(arguments.destination)} differ")


def demo_command(arguments: argparse.Namespace, stop: Stop) -> None:
    """`demo`."""
    from stream_reshard.cli.demo import demo
    facts = demo(arguments.quiet or arguments.json, stop)
    _print(arguments, facts, [f"demo     converted and verified {facts['num_elements']} weights: all equal"])


_RUN = {"convert": convert_command, "plan": plan_command, "verify": verify_command, "inspect": inspect_command,
        "diff": diff_command, "demo": demo_command}


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
            _tell(f"error: {line}")
        if error.hint:
            _tell(error.hint)
        return error.exit_code
    except OSError as error:
        _tell("error: " + (f"{quoted(error.filename)}: " if error.filename else "") + (error.strerror or str(error)))
        return ResourceError.exit_code


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
