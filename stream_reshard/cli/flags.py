"""The flags of every command, made from the options that `options` declares."""
from __future__ import annotations

import argparse
from pathlib import Path

from stream_reshard import __version__
from stream_reshard.errors import quoted
from stream_reshard.options import ForwardOptions, Options, VerifyOptions
from stream_reshard.options.declaring import Declared, Option, options_of

COMMANDS = ("plan", "verify", "inspect", "diff", "demo")
"""Words that name a command; a command line that begins with none of them is a conversion."""

_OPTIONS: dict[str, tuple[type[Declared], ...]] = {
    "convert": (Options,), "plan": (Options,), "verify": (VerifyOptions, ForwardOptions)}
"""The options of each command; of two options of one name, the first is taken."""

_FOLDERS = {
    "convert": [("source", "SRC", "a folder of Hugging Face safetensors shards, or a Nanotron checkpoint"),
                ("destination", "DST", "the folder to be made; it must be absent or empty")],
    "plan": [("source", "SRC", "a folder of Hugging Face safetensors shards, or a Nanotron checkpoint"),
             ("destination", "DST", "the folder that the conversion would make")],
    "verify": [("source", "SRC", "the checkpoint to compare with, of either format"),
               ("destination", "DST", "the checkpoint to be verified, of either format")],
    "inspect": [("source", "DIR", "a checkpoint folder of either format")],
    "diff": [("source", "A", "a checkpoint folder of either format"),
             ("destination", "B", "another one of the same model")],
    "demo": []}
"""(name, metavar, meaning) of the folders of each command."""

_MAX_DIGITS = 15

_EPILOG = """\
exit codes: 0 ok, 1 unexpected, 2 usage, 3 source refused or changed, 4 destination refused, 5 verify found differences,
6 resources (resumable), 7 locked, 130/143 interrupted (resumable)
other commands: plan SRC [DST], verify SRC DST, inspect DIR, diff A B, demo; each has its own --help"""

_DESCRIPTIONS = {
    "convert": "Cut a Hugging Face checkpoint for Nanotron's tensor, pipeline and data parallelism, in bounded memory.",
    "plan": "Show the work of a conversion and the memory and disk that it needs; nothing is written.",
    "verify": "Prove that two folders hold the same model: every weight, through the headers of the files themselves.",
    "inspect": "Show the contents of a checkpoint folder.",
    "diff": "List the differences between the layouts of two checkpoints, tensor by tensor; no weight is read.",
    "demo": "Make a small Llama, convert it to TP=2 PP=2, and verify the result. Needs no download."}


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command; "convert" is the command without a word."""
    name = "stream-reshard" + ("" if command == "convert" else f" {command}")
    parser = argparse.ArgumentParser(prog=name, description=_DESCRIPTIONS[command], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=_EPILOG if command == "convert" else None)
    if command == "convert":
        parser.add_argument("--version", action="version", version=f"stream-reshard {__version__}")
    for folder, metavar, help in _FOLDERS[command]:
        is_optional = command == "plan" and folder == "destination"
        parser.add_argument(folder, metavar=metavar, type=_folder, help=help, nargs="?" if is_optional else None)
    for own in options_in(command).values():
        _add(parser, own)
    if command == "verify":
        parser.add_argument("--forward", action="store_true", help="also run both models over the same tokens, layer "
                            "by layer in float32, and compare the results; needs the extra [torch]")
    if command == "inspect":
        parser.add_argument("--values", action="store_true", help="read every weight, and count NaN and infinities")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument("--quiet", action="store_true", help="print no progress and no plan, errors only")
    return parser


def options_in(command: str) -> dict[str, Option]:
    """The declared options of a command, by name."""
    found: dict[str, Option] = {}
    for cls in _OPTIONS.get(command, ()):
        for own in options_of(cls):
            found.setdefault(own.name, own)
    return found


def _add(parser: argparse.ArgumentParser, own: Option) -> None:
    if own.kind is bool:
        parser.add_argument(own.flag, action="store_true", help=own.text)
    elif own.choices:
        parser.add_argument(own.flag, default=own.default, choices=own.choices, help=own.text)
    elif own.kind in (int, float) and own.parse is None:
        parser.add_argument(own.flag, default=own.default, type=_number if own.kind is int else float,
                            metavar=own.metavar, help=own.text)
    elif own.default == ():
        parser.add_argument(own.flag, action="append", default=[], metavar=own.metavar, help=own.text)
    else:
        parser.add_argument(own.flag, default=own.default, type=_folder if own.kind is Path else str,
                            metavar=own.metavar, help=own.text)


def _folder(text: str) -> Path:
    """A path. An empty one is refused: it comes from an unset variable, and does not mean the working folder."""
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
