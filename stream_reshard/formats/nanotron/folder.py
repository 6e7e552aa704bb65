"""Folder that holds a Nanotron checkpoint, and the files in it that count."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stream_reshard.errors import SourceError, quoted
from stream_reshard.formats.causes import above, no_checkpoint
from stream_reshard.formats.nanotron.config import MODEL_CONFIG_NAME
from stream_reshard.storage.small_files import dangling, files_below, is_litter


def weight_paths(root: Path) -> Iterator[str]:
    """Paths of the files below `model`, but for litter."""
    return (f"model/{path}" for path in files_below(root / "model") if not is_litter(path))


def litter_notes(root: Path) -> Iterator[str]:
    """Remarks on the litter below `model`."""
    found = [path for path in files_below(root / "model") if is_litter(path)]
    if found:
        yield (f"{len(found)} files that macOS or Windows left below model/, such as {quoted(f'model/{found[0]}')}, "
               f"are ignored")


def not_committed(root: Path) -> SourceError:
    """Reason why a folder is no checkpoint of Nanotron's."""
    if not os.path.isdir(root):
        return no_checkpoint(root)
    return dangling(root, MODEL_CONFIG_NAME) or above(root) or SourceError(
        f"{quoted(root)} holds no {MODEL_CONFIG_NAME}: it is not a committed checkpoint")
