"""The text of docs/options.md, made from the flags::

    python -m stream_reshard.cli.reference > docs/options.md
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator

from stream_reshard.cli.flags import COMMANDS, parser_of
from stream_reshard.options import ALLOWABLE

_INTRO = """\
# Options

Every option is declared once, in `stream_reshard/options/`; this page is made from the declarations. In Python the same
names are keywords of `stream_reshard.api`, with `_` for `-`: `--max-memory 256MiB` is `max_memory="256MiB"`. A size is
a number of bytes, or a number with a unit such as 512MiB or 5GB."""

_SAME = {"plan": "convert"}
"""Commands with the options of another command."""


def document() -> str:
    """The whole page, in Markdown."""
    return "\n".join([_INTRO, *(line for command in COMMANDS for line in _section(command)),
                      *_allowable()])


def _section(command: str) -> Iterator[str]:
    parser = parser_of(command)
    actions = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    folders = [action for action in parser._actions if not action.option_strings]
    words = [str(action.metavar) if action.nargs is None else f"[{action.metavar}]" for action in folders]
    yield from ("", f"## `{' '.join(filter(None, ['[convert]' if command == 'convert' else command, *words]))}`", "")
    yield str(parser.description)
    if command in _SAME:
        yield "Its options are those of a conversion, and:"
        known = {action.dest for action in parser_of(_SAME[command])._actions}
        folders, actions = [], [action for action in actions if action.dest not in known]
    yield from ("", "| argument | meaning |", "|---|---|")
    yield from (f"| `{action.metavar}` | {_meaning(action)} |" for action in folders)
    yield from (f"| `{_usage(action)}` | {_meaning(action)} |" for action in actions)


def _usage(action: argparse.Action) -> str:
    value = "\\|".join(action.choices) if action.choices else str(action.metavar or "")
    return f"{action.option_strings[0]} {value}".rstrip()


def _meaning(action: argparse.Action) -> str:
    return str(action.help).replace("%%", "%").replace("|", "\\|")


def _allowable() -> Iterator[str]:
    yield from ("", "## Names for `--allow`", "", "| name | meaning |", "|---|---|")
    yield from (f"| `{name}` | {meaning} |" for name, meaning in ALLOWABLE.items())


if __name__ == "__main__":
    print(document())
