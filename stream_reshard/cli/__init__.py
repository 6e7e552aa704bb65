"""The command line: flags to `api`, results to stdout, progress and messages to stderr.

- entry:     streams, signals, exit codes, JSON
- commands:  each command
- flags:     the parser, made of the declared options
- screen:    printing, and progress on a terminal or in a log
- demo:      a small Llama, converted and verified
- env:       versions and limits of this machine
- completions: words that a shell completes
- reference: the page of options
"""
from stream_reshard.cli.entry import main, script

__all__ = ["main", "script"]
