"""The formats: what a folder holds, opened as what it is."""
from __future__ import annotations

import os
from pathlib import Path

from stream_reshard.errors import Cause, Problems, UsageError, quoted
from stream_reshard.formats.base import Described
from stream_reshard.formats.hugging_face.config import CONFIG_NAME
from stream_reshard.formats.hugging_face.source import open_hugging_face
from stream_reshard.formats.nanotron.config import MODEL_CONFIG_NAME
from stream_reshard.formats.nanotron.source import open_nanotron
from stream_reshard.storage.small_files import check_readable, dangling, misplaced, read_capped


def open_any(root: Path, max_nbytes: int, vocab_size: int | None, problems: Problems,
             is_exact: bool = True) -> Described | None:
    """Open a checkpoint of either format; see `open_nanotron`. Raises SourceError for a folder that is closed to us."""
    check_readable(root)
    if is_nanotron(root):
        return open_nanotron(root, max_nbytes, vocab_size, problems, is_exact)
    if vocab_size is not None and os.path.isfile(root / CONFIG_NAME):
        problems.append(UsageError("--vocab-size is for a Nanotron checkpoint, which keeps no count of its true rows"))
    return open_hugging_face(root, max_nbytes, problems)


def is_nanotron(root: Path) -> bool:
    """True where a folder holds a Nanotron checkpoint, or what is left of one: weights decide, else the config."""
    if os.path.isdir(root / "model" / "model"):
        return True
    return not os.path.isfile(root / CONFIG_NAME) and (os.path.isdir(root / "model")
                                                       or os.path.isfile(root / MODEL_CONFIG_NAME))


LATEST_NAME = "latest.txt"
"""Beside the folders of steps, Nanotron's trainer keeps the number of the last one in it (trainer.py)."""

_MAX_LATEST_NBYTES = 1000


def followed(root: Path, is_copy: bool = False) -> tuple[Path, list[str]]:
    """The folder of the checkpoint, and what is told where it is not `root` itself.

    Nanotron follows latest.txt (`parse_ckpt_path`, nanotron/serialize/main.py): it holds the number of a step, whose
    folder stands beside it. Nanotron does so even where the folder is a checkpoint itself; that is refused here, as
    there are two then, but for a copy, whose extra files are for `verify` to find. Raises SourceError.
    """
    if not os.path.isdir(root):
        return root, []
    is_theirs = is_nanotron(root)
    is_own = is_theirs or os.path.isfile(root / CONFIG_NAME)
    if is_own and (is_copy or not is_theirs):
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
