"""The command line: flags to `api`, results to stdout, progress and messages to stderr.

- entry:       streams, signals, exit codes, JSON
- commands:    each command
- flags:       the parser, made of the declared options
- screen:      printing, and progress on a terminal or in a log
- demo:        a small Llama, converted and verified
- env:         versions and limits of this machine
- completions: words that a shell completes
- reference:   the page of options

Importing this imports no more than the parser needs: a build makes the completions, without any dependency.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

from stream_reshard.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    from stream_reshard.cli.entry import main as run
    return run(argv)


def script() -> None:
    """The installed command `stream-reshard`."""
    try:
        from stream_reshard.cli.entry import script as run
    except ModuleNotFoundError as error:
        sys.exit(_tell_missing(error))
    run()


def _tell_missing(error: ModuleNotFoundError) -> int:
    """One line about a dependency that is absent, as in a clone that was not installed; returns the exit code."""
    if error.name is None or error.name.startswith("stream_reshard"):
        raise error
    wrong = UsageError(f"{sys.executable} has no module {error.name}, a dependency of stream_reshard; use the Python "
                       f"in which it is installed, or install it: {sys.executable} -m pip install .")
    print(f"error: {wrong}", file=sys.stderr)
    return wrong.exit_code
