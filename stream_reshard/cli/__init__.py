"""The command line: flags to `api`, results to stdout, progress and messages to stderr.

- commands:  each command; streams, signals, exit codes
- flags:     the flags of every command
- demo:      a small Llama, converted and verified
- reference: the text of docs/options.md
"""
from stream_reshard.cli.commands import main, script

__all__ = ["main", "script"]
