"""The commands: each calls `api` and gives its report, and the error that it ends with, if any."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from stream_reshard import api
from stream_reshard.cli.flags import PROGRAM
from stream_reshard.cli.screen import Progress, say
from stream_reshard.destination.staging import staging_of
from stream_reshard.errors import (
    DifferenceError, Interrupted, Problems, Refused, ResourceError, StreamReshardError, UsageError, quoted, shell_word)
from stream_reshard.machine.stop import Stop
from stream_reshard.options import ALLOWABLE, ForwardOptions, Options, VerifyOptions
from stream_reshard.options.declaring import Declared, options_of
from stream_reshard.report import Report, Reported

if TYPE_CHECKING:
    from stream_reshard.check.forward import ForwardPlan
    from stream_reshard.check.forward.report import ForwardResult


class Outcome(NamedTuple):
    """The end of a command."""

    report: Reported | None
    error: StreamReshardError | None = None
    """Differences, with which a report can stand beside an exit code that is not 0."""


def _choices(arguments: argparse.Namespace, options: type[Declared]) -> dict[str, Any]:
    """The declared options among the flags, by name."""
    return {own.name: getattr(arguments, own.name) for own in options_of(options)}


def _planned(arguments: argparse.Namespace, stop: Stop) -> api.Conversion:
    """The conversion that the flags choose."""
    return api.plan(arguments.source, arguments.destination, **_choices(arguments, Options), stop=stop)


def convert_command(arguments: argparse.Namespace, stop: Stop) -> Outcome:
    """`convert SRC DST`: plan, print the plan, run it, report the result."""
    conversion = _planned(arguments, stop)
    if not (arguments.json or arguments.quiet or (conversion.is_done and not arguments.overwrite)):
        say(str(conversion))
    try:
        with (Progress("converting", "B", arguments.quiet) as advance,
              Progress("verifying", "part", arguments.quiet) as check):
            return Outcome(api.run(conversion, advance, stop, check_progress=check))
    except (ResourceError, Interrupted) as error:
        kept = staging_of(conversion.output.destination)
        error.hint = (f"{quoted(kept)} keeps what is done; " if kept.exists() else "") + (
            f"to go on: {_resume_command(arguments)}")
        raise


def _resume_command(arguments: argparse.Namespace) -> str:
    """The command that takes up an interrupted run: as it was typed, but for what would throw the work away."""
    program = [PROGRAM] if sys.argv[0].endswith(PROGRAM) else ["python", "-m", "stream_reshard"]
    kept = [word for word in arguments.argv if word not in ("--restart", "--break-lock")]
    return " ".join(map(shell_word, [*program, *kept]))


def plan_command(arguments: argparse.Namespace, stop: Stop) -> Outcome:
    """`plan SRC [DST]`: everything up to and without the writing."""
    conversion = _planned(arguments, stop)
    return Outcome(api.estimate(conversion) if arguments.time else conversion)


def verify_command(arguments: argparse.Namespace, stop: Stop) -> Outcome:
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
    error = Refused(found) if found else None
    if report is None and forward is None:
        return Outcome(None, error)
    facts = (report.facts if report else {"equal": False}) | ({"forward": forward.facts} if forward else {})
    return Outcome(Report(facts, (*(report.lines if report else ()), *(forward.lines if forward else ()))), error)


def _refuse_forward_flags(arguments: argparse.Namespace) -> None:
    """Raises UsageError for a flag that means nothing without --forward."""
    shared = {own.name for own in options_of(VerifyOptions)}
    for own in options_of(ForwardOptions):
        if own.name not in shared and not arguments.forward and getattr(arguments, own.name) != own.default:
            raise UsageError(f"{own.flag} has no effect without --forward")


def _raise_other_than_differences(found: Problems) -> None:
    if not all(isinstance(problem, DifferenceError) for problem in found):
        found.raise_if_any()


def _verified(arguments: argparse.Namespace, stop: Stop) -> Report:
    with Progress("verifying", "part", arguments.quiet) as advance:
        return api.verify(arguments.source, arguments.destination, **_choices(arguments, VerifyOptions), stop=stop,
                          progress=advance)


def _planned_forward(arguments: argparse.Namespace) -> ForwardPlan:
    plan = api.plan_forward(arguments.source, arguments.destination, **_choices(arguments, ForwardOptions))
    if not (arguments.json or arguments.quiet):
        say(str(plan))
    return plan


def _run_forward(arguments: argparse.Namespace, plan: ForwardPlan, stop: Stop) -> ForwardResult:
    with Progress("running", "layer", arguments.quiet) as advance:
        return api.run_forward(plan, advance, stop)


def inspect_command(arguments: argparse.Namespace, stop: Stop) -> Outcome:
    """`inspect DIR`."""
    return Outcome(api.inspect(arguments.source, values=arguments.values, stop=stop))


def diff_command(arguments: argparse.Namespace, stop: Stop) -> Outcome:
    """`diff A B`."""
    report = api.diff(arguments.source, arguments.destination)
    if report.facts["same"]:
        return Outcome(report)
    one, other = quoted(arguments.source), quoted(arguments.destination)
    return Outcome(report, DifferenceError(f"the layouts of {one} and {other} differ; `verify` compares the weights"))


def demo_command(arguments: argparse.Namespace, stop: Stop) -> Outcome:
    """`demo`."""
    from stream_reshard.cli.demo import demo
    return Outcome(demo(arguments.quiet or arguments.json, arguments.keep, stop))


def env_command(arguments: argparse.Namespace, stop: Stop) -> Outcome:
    """`env`."""
    from stream_reshard.cli.env import environment
    return Outcome(environment())


def completion_command(arguments: argparse.Namespace, stop: Stop) -> Outcome:
    """`completion SHELL`."""
    from stream_reshard.cli.completions import completion
    text = completion(arguments.shell)
    return Outcome(Report({"shell": arguments.shell, "completion": text}, (text,)))


def allow_list(argv: Sequence[str]) -> Outcome | None:
    """The names that --allow takes, where `--allow list` asks for them; None where nobody does."""
    if ("--allow", "list") not in pairwise(argv) and "--allow=list" not in argv:
        return None
    names = ALLOWABLE
    if argv[0] == "verify":
        from stream_reshard.check.weights.scope import allowable
        names = allowable()
    return Outcome(Report({"allowable": list(names)}, tuple(f"{name:<26} {names[name]}" for name in names)))


RUN: dict[str, Callable[[argparse.Namespace, Stop], Outcome]] = {
    "convert": convert_command, "plan": plan_command, "verify": verify_command, "inspect": inspect_command,
    "diff": diff_command, "demo": demo_command, "env": env_command, "completion": completion_command}
