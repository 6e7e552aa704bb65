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

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    from stream_reshard.cli.entry import main as run
    return run(argv)


def script() -> None:
    """The installed command `stream-reshard`."""
    from stream_reshard.cli.entry import script as run
    run()
