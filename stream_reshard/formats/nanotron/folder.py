"""The folder of a Nanotron checkpoint: paths of its weight files. Litter, which desktops leave there, is ignored."""
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from stream_reshard.errors import SourceError, quoted
from stream_reshard.formats.causes import above, no_checkpoint
from stream_reshard.formats.nanotron.config import MODEL_CONFIG_NAME
from stream_reshard.storage.small_files import dangling, files_below, is_litter


_LAYER = re.compile(r"model/decoder/(0|[1-9]\d{0,11})/", re.ASCII)


def weight_paths(root: Path, left_out: range = range(0)) -> Iterator[str]:
    """Paths of the files below `model`, without litter and without the layers that are left out."""
    return (f"model/{path}" for path in files_below(root / "model")
            if not is_litter(path) and not _is_in_layers(path, left_out))


def _is_in_layers(path: str, layers: range) -> bool:
    return bool(layers and (match := _LAYER.match(path)) and int(match[1]) in layers)


def litter_notes(root: Path) -> Iterator[str]:
    """A remark on the litter below `model`."""
    if litter := [path for path in files_below(root / "model") if is_litter(path)]:
        yield (f"{len(litter)} files that macOS or Windows left below model/, such as {quoted(f'model/{litter[0]}')}, "
               f"are ignored")


def not_committed(root: Path) -> SourceError:
    """Reason why a folder is no Nanotron checkpoint."""
    if not os.path.isdir(root):
        return no_checkpoint(root)
    return dangling(root, MODEL_CONFIG_NAME) or above(root) or SourceError(
        f"{quoted(root)} holds no {MODEL_CONFIG_NAME}: it is not a committed checkpoint")
