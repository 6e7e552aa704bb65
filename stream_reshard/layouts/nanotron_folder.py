"""Which folder of Nanotron's holds the checkpoint, and which of the files in it count."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stream_reshard.errors import Cause, SourceError, quoted
from stream_reshard.layouts.causes import above, no_checkpoint
from stream_reshard.layouts.hf_config import CONFIG_NAME
from stream_reshard.layouts.nanotron_config import MODEL_CONFIG_NAME, is_nanotron
from stream_reshard.small_files import dangling, files_below, is_litter, misplaced, read_capped

LATEST_NAME = "latest.txt"
"""Beside the folders of steps, Nanotron's trainer keeps the number of the last one in it (trainer.py)."""

_MAX_LATEST_NBYTES = 1000


def weight_paths(root: Path) -> Iterator[str]:
    """Paths of the files below `model`, but for litter."""
    return (f"model/{path}" for path in files_below(root / "model") if not is_litter(path))


def litter_notes(root: Path) -> Iterator[str]:
    """What is told of the litter below `model`."""
    found = [path for path in files_below(root / "model") if is_litter(path)]
    if found:
        yield (f"{len(found)} files that macOS or Windows left below model/, such as {quoted(f'model/{found[0]}')}, "
               f"are ignored")


def followed(root: Path, is_copy: bool = False) -> tuple[Path, list[str]]:
    """The folder of the checkpoint, and what is told where it is not `root` itself.

    Nanotron follows latest.txt (`parse_ckpt_path`, nanotron/serialize/main.py): it holds the number of a step, whose
    folder stands beside it. Nanotron does so even where the folder is a checkpoint itself; that is refused here, as
    there are two then, but for a copy, whose extra files are for `verify` to find. Raises SourceError.
    """
    if not os.path.isdir(root):
        return root, []
    is_own = is_nanotron(root) or os.path.isfile(root / CONFIG_NAME)
    if is_own and (is_copy or not is_nanotron(root)):
        return root, []
    if not os.path.exists(root / LATEST_NAME):
        if (cause := dangling(root, LATEST_NAME)) and not is_own:
            raise cause
        return root, []
    step = _latest(root)
    if is_own:
        raise Cause(f"{quoted(root)} holds a checkpoint and {LATEST_NAME}, and Nanotron would take the folder {step} "
                    f"that it names; give that folder, or remove {LATEST_NAME}")
    if not os.path.isdir(root / step):
        raise Cause(f"{LATEST_NAME} in {quoted(root)} names step {step}, but there is no folder {step} beside it; give "
                    f"the folder of another step")
    return root / step, [f"{LATEST_NAME} in {quoted(root)} names step {step}: {quoted(root / step)} is taken, as "
                         f"Nanotron takes it"]


def _latest(root: Path) -> str:
    """The name of the folder that latest.txt names. Nanotron takes whatever Python's int() takes."""
    text = read_capped(root, LATEST_NAME, _MAX_LATEST_NBYTES, _MAX_LATEST_NBYTES).decode("utf-8", "backslashreplace")
    try:
        return str(int(text))
    except ValueError as error:
        raise misplaced(root, LATEST_NAME, None) or Cause(
            f"{LATEST_NAME} in {quoted(root)} holds {quoted(text[:60])}, which is not the number of a step; give the "
            f"folder of a step") from error


def not_committed(root: Path) -> SourceError:
    """Why a folder is no checkpoint of Nanotron's."""
    if not os.path.isdir(root):
        return no_checkpoint(root)
    return dangling(root, MODEL_CONFIG_NAME) or above(root) or SourceError(
        f"{quoted(root)} holds no {MODEL_CONFIG_NAME}: it is not a committed checkpoint")
