"""The parser: commands with their folders and flags, made of the declared options."""
from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from stream_reshard import __version__
from stream_reshard.errors import UsageError, quoted
from stream_reshard.options import ForwardOptions, Options, VerifyOptions
from stream_reshard.options.declaring import Declared, Option, did_you_mean, options_of

PROGRAM = "stream-reshard"

COMMANDS = {
    "convert": "cut a checkpoint for other ranks, or another format",
    "plan": "say what a conversion would do and need; write nothing",
    "verify": "prove that two folders hold the same model",
    "inspect": "show what a checkpoint folder holds",
    "diff": "compare the layouts of two checkpoints; read no weight",
    "demo": "make a small Llama, convert it, verify it; needs no download",
    "env": "print versions and limits of this machine, for a report of a bug",
    "completion": "print a completion for bash or zsh"}
"""The commands, each with its purpose. Without one of these words in front it is `convert`."""

_OPTIONS: dict[str, tuple[type[Declared], ...]] = {
    "convert": (Options,), "plan": (Options,), "verify": (VerifyOptions, ForwardOptions)}
"""The options of each command; of two with one name the first is taken."""

_SOURCE = ("source", "SRC", "a folder of Hugging Face shards (safetensors, or pytorch_model*.bin), of Meta's parts "
           "(consolidated.*.pth), or a Nanotron checkpoint")
_FOLDERS = {
    "convert": [_SOURCE, ("destination", "DST", "the folder to be made; it must be absent or empty")],
    "plan": [_SOURCE, ("destination", "DST", "the folder that would be made")],
    "verify": [("source", "SRC", "the checkpoint that is right, of any format"),
               ("destination", "DST", "the checkpoint to compare with it, of any format")],
    "inspect": [("source", "DIR", "a checkpoint folder of any format")],
    "diff": [("source", "A", "a checkpoint folder of any format"),
             ("destination", "B", "another one of the same model")]}
"""(name, metavar, meaning) of the folders of each command."""

SHELLS = {"bash": "stream-reshard.bash", "zsh": "_stream-reshard"}
"""Shells that have a completion, each with the name of its file."""

_ALIASES = {"--tensor-parallel-size": "--tp", "--pipeline-parallel-size": "--pp", "--data-parallel-size": "--dp"}
"""Names by which other tools call a flag."""

_MAX_DIGITS = 15

_EXAMPLES = f"""\
examples:
  {PROGRAM} plan SRC --tp 4 --pp 2            what it will do and need
  {PROGRAM} SRC DST --tp 4 --pp 2 --verify    convert, and compare with SRC
  {PROGRAM} DST BACK --to hf                  back to Hugging Face
  {PROGRAM} DST WIDE --to nanotron --tp 8     to another topology
  {PROGRAM} verify SRC DST                    compare every weight"""

_EXIT_CODES = """\
exit codes: 0 ok, 1 unexpected, 2 usage, 3 source refused or changed,
4 destination refused, 5 verify found differences, 6 resources (resumable),
7 locked, 130/143 interrupted (resumable)"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong word in one line, with the nearest right one."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError in place of a page of usage."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        flags = tuple(flag for action in self._actions for flag in action.option_strings)
        cure = did_you_mean(unknown[1], flags) if unknown else ""
        raise UsageError(f"{message}{cure}; see {self.prog} --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments that a user means. Raises UsageError; prints and raises SystemExit for --help and --version."""
    words = [_spelled(word) for word in argv]
    command = words[0] if words and words[0] in COMMANDS else None
    if words and command is None and words[0] not in ("-h", "--help", "--version"):
        words, command = ["convert", *words], "convert"
    if "--dry-run" in words and command == "convert":
        words = ["plan", *(word for word in words[1:] if word != "--dry-run")]
    try:
        if command is None:
            return parser().parse_args(words)
        arguments = parser_of(words[0]).parse_args(words[1:])
    except UsageError as error:
        raise UsageError(f"{error}{_meant_command(argv)}") from None
    arguments.command, arguments.argv = words[0], list(argv)
    return arguments


def _spelled(word: str) -> str:
    """A flag as it is declared: `_` is `-`, and other tools' names are known."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    flag = flag.replace("_", "-")
    return _ALIASES.get(flag, flag) + equals + value


def _meant_command(argv: Sequence[str]) -> str:
    """The end of a message where the first word is nearly a command, and no folder."""
    first = argv[0] if argv else ""
    if first in COMMANDS or first.startswith("-") or os.path.exists(first):
        return ""
    return did_you_mean(first, tuple(COMMANDS))


def parser() -> argparse.ArgumentParser:
    """The parser of the program, with one below it for each command."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    top = _Parser(prog=PROGRAM, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                  usage=f"{PROGRAM} [COMMAND] SRC DST [FLAGS]", epilog=f"{_EXAMPLES}\n\n{_EXIT_CODES}",
                  description="Cut Hugging Face checkpoints for Nanotron's tensor, pipeline and data\nparallelism, and "
                  f"back, in bounded memory.\n\ncommands (default convert; {PROGRAM} COMMAND --help shows its flags):"
                  f"\n{listed}")
    top.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    below = top.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS)
    for name in COMMANDS:
        _fill(below.add_parser(name, **_looks(name)), name)
    return top


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    return _fill(_Parser(prog=f"{PROGRAM} {command}", **_looks(command)), command)


def _looks(command: str) -> dict[str, Any]:
    purpose = COMMANDS[command]
    folders = [f"[{word}]" if (command, word) == ("plan", "DST") else word for _, word, _ in _FOLDERS.get(command, ())]
    name = "[convert]" if command == "convert" else command
    return {"usage": " ".join([PROGRAM, name, *folders, "[FLAGS]"]), "allow_abbrev": False,
            "description": purpose[0].upper() + purpose[1:] + ".",
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "epilog": f"{_EXAMPLES}\n\n{_EXIT_CODES}" if command == "convert" else None}


def _fill(made: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    for folder, metavar, help in _FOLDERS.get(command, ()):
        is_optional = command == "plan" and folder == "destination"
        made.add_argument(folder, metavar=metavar, type=_folder, help=help, nargs="?" if is_optional else None)
    groups: dict[str, Any] = {}
    for own in options_in(command).values():
        if own.group not in groups:
            groups[own.group] = made.add_argument_group(own.group)
        _add(groups[own.group], own)
    if command == "plan":
        made.add_argument("--time", action="store_true", help="also estimate the time of the run: for about a second, "
                          "read SRC and write a file without a name beside DST")
    if command == "verify":
        made.add_argument("--forward", action="store_true", help="also run both over the same tokens, layer by layer "
                          "in float32, and compare the outcome; needs the extra [torch]")
    if command == "inspect":
        made.add_argument("--values", action="store_true", help="read every weight, and count NaN and infinities")
    if command == "completion":
        made.add_argument("shell", metavar="SHELL", choices=tuple(SHELLS),
                          help="bash or zsh; source <(stream-reshard completion bash) in ~/.bashrc")
        return made
    if command == "demo":
        made.add_argument("--keep", metavar="DIR", type=_folder, help="make the folders in DIR and leave them there")
    output = made.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON document on stdout, whatever the outcome")
    output.add_argument("--quiet", action="store_true", help="print no progress and no plan, errors only")
    return made


def options_in(command: str) -> dict[str, Option]:
    """The declared options of a command, by name."""
    found: dict[str, Option] = {}
    for cls in _OPTIONS.get(command, ()):
        for own in options_of(cls):
            found.setdefault(own.name, own)
    return found


def _add(group: Any, own: Option) -> None:
    """Add the flag of a declared option to a group of flags."""
    if own.kind is bool:
        group.add_argument(own.flag, action="store_true", help=own.text)
    elif own.default == ():
        group.add_argument(own.flag, action="append", default=[], metavar=own.metavar, help=own.text)
    else:
        kind = str if own.parse or own.choices else {int: _number, float: float, Path: _folder}.get(own.kind, str)
        group.add_argument(own.flag, default=own.default, choices=own.choices or None, type=kind,
                           metavar=own.metavar or None, help=own.text)


def _folder(text: str) -> Path:
    """A path; an empty one is a variable that nobody set, not the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _number(text: str) -> int:
    """An int that every system call and file format can hold."""
    if len(text) > _MAX_DIGITS:
        raise argparse.ArgumentTypeError(f"{quoted(text)} has more than {_MAX_DIGITS} digits")
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number") from error
