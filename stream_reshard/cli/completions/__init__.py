"""Completions for shells: made from the parser when the package is built, and shipped beside this module."""
from __future__ import annotations

from pathlib import Path

from stream_reshard.cli.flags import SHELLS, parser
from stream_reshard.errors import UsageError


def made(shell: str) -> str:
    """The completion for a shell, made now. Needs shtab."""
    import shtab
    return str(shtab.complete(parser(), shell))


def completion(shell: str) -> str:
    """The completion that was shipped, or one that is made now. Raises UsageError where neither can be had."""
    shipped = Path(__file__).with_name(SHELLS[shell])
    if shipped.is_file():
        return shipped.read_text()
    try:
        return made(shell)
    except ImportError as error:
        raise UsageError("this installation ships no completions; pip install shtab, or install a wheel") from error
