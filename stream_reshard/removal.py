"""Only what is ours is removed: files that a journal, a manifest or Nanotron's naming rules name, and empty folders.

Links are not followed, mount points not entered. Anything else is told beforehand; what appears after that stays.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

from stream_reshard.contents import Entry, entries_below, is_silly_rename
from stream_reshard.durable import TEMP_NAME
from stream_reshard.errors import DestinationError, SourceError, quoted
from stream_reshard.journal import JOURNAL_NAME, names_in
from stream_reshard.layouts.nanotron_config import MODEL_CONFIG_NAME
from stream_reshard.layouts.nanotron_files import parse_path
from stream_reshard.manifest import MANIFEST_NAME, open_manifest

_SETTINGS = frozenset({"config.yaml", "checkpoint_metadata.json", MODEL_CONFIG_NAME})
"""Files beside the folders of a checkpoint (serialize/main.py and trainer.py of Nanotron)."""

_OF = r"(?:0|[1-9]\d*)-of-[1-9]\d*"
_RANKS = rf"pp-{_OF}(?:_dp-{_OF})?_tp-{_OF}(?:_exp-{_OF})?"
_OF_TRAINING = re.compile(
    rf"optimizer/(?:optimizer_config\.json|optimizer_{_RANKS}\.pt)|lr_scheduler/lr_scheduler(?:_{_RANKS})?\.pt"
    rf"|random/tp-{_OF}_dp-{_OF}_pp-{_OF}\.pt", re.ASCII)
"""States of the optimizer, the schedule and the random generators, as Nanotron names them (`optimizer_filename` and
`lr_scheduler_filename` in nanotron/serialize/optimizer.py, nanotron/serialize/random.py)."""

_OF_EXPERTS = re.compile(rf"(?<=\d)_exp-rank-{_OF}(?=\.safetensors\Z)", re.ASCII)
"""The part that `get_path` (nanotron/serialize/utils.py) adds to the name of a weight that experts are spread over."""

_LAST = (MANIFEST_NAME, JOURNAL_NAME)
"""Removed when all the rest is: a run that is stopped halfway leaves what names the other files."""


def is_of_training(path: str) -> bool:
    """True for a path at which Nanotron's trainer saves a state of training."""
    return _OF_TRAINING.fullmatch(path) is not None


def is_weights(path: str) -> bool:
    """True for a path at which Nanotron keeps weights."""
    try:
        parse_path(_OF_EXPERTS.sub("", path))
    except SourceError:
        return False
    return True


def _is_named_by_nanotron(path: str) -> bool:
    return path in _SETTINGS or is_weights(path) or is_of_training(path)


def strangers(folder: Path, names: Collection[str] = ()) -> Iterator[Entry]:
    """All that stands in a folder and is not this tool's or Nanotron's to remove. `names`: what is known beside that.
    Raises OSError where a folder cannot be listed."""
    is_ours = _ours(folder, names)
    return (entry for entry in entries_below(folder)
            if entry.is_mount or not (entry.is_folder or (entry.is_file and is_ours(entry))))


def removal_problems(folder: Path, cause: str) -> Iterator[DestinationError]:
    """The first thing in a folder that keeps it from being removed; `cause` says what would remove it."""
    try:
        if entry := next(strangers(folder), None):
            yield stranger_error(folder, entry, f"{cause} would take it away")
    except OSError as error:
        yield DestinationError(f"{quoted(error.filename or folder)}: {error.strerror}, and {cause} has to know all "
                               f"that is in it")


def stranger_error(folder: Path, entry: Entry, cause: str) -> DestinationError:
    """The error a user sees of something that is not ours."""
    if entry.is_mount:
        return DestinationError(f"{quoted(folder / entry.path)} is a mount point, and {cause}; unmount it")
    return DestinationError(f"{quoted(folder)} holds {quoted(entry.path)}, which is no part of a checkpoint and would "
                            f"be lost: {cause}; move it away")


def _ours(folder: Path, names: Collection[str]) -> Callable[[Entry], bool]:
    """Tells what is ours in a folder: with a manifest exactly what it names and what training adds; else what Nanotron
    or a journal names."""
    try:
        manifest = open_manifest(folder)
    except SourceError:
        manifest = None
    by_rule = is_of_training if manifest else _is_named_by_nanotron
    has_journal = os.path.lexists(folder / JOURNAL_NAME)
    if has_journal:
        by_rule = _is_named_by_nanotron
    written = {path for path in names_in(folder / JOURNAL_NAME) if not by_rule(path)} if has_journal else set()
    known, named = {*_LAST, *names, *written}, manifest.files if manifest else ()
    return lambda entry: (entry.path in known or entry.path in named or by_rule(entry.path)
                          or is_silly_rename(entry.name) or TEMP_NAME.fullmatch(entry.name) is not None)


def clear(folder: Path, names: Collection[str] = ()) -> None:
    """Remove what is ours from a folder, and the folder if that was all. What cannot be removed stays. `names`: what is
    known beside what the folder itself tells."""
    if folder.is_symlink():
        return
    with suppress(OSError):
        is_ours, folders, has_failed = _ours(folder, names), [], False
        for entry in entries_below(folder):
            if entry.is_folder:
                folders.append(folder / entry.path)
            elif entry.path not in _LAST and entry.is_file and is_ours(entry):
                has_failed |= not _removed(folder / entry.path)
        for path in reversed(folders):
            with suppress(OSError):
                path.rmdir()
        if not has_failed:
            for name in _LAST:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True
