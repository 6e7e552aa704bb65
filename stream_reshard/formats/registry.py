"""The format of a folder, and opening a checkpoint of any format."""
from __future__ import annotations

import os
from pathlib import Path

from stream_reshard.errors import Cause, Problems, UsageError, quoted
from stream_reshard.formats.base import Described
from stream_reshard.formats.config_json import CONFIG_NAME
from stream_reshard.formats.hugging_face.source import open_hugging_face
from stream_reshard.formats.meta.folder import is_meta
from stream_reshard.formats.meta.params import PARAMS_NAME
from stream_reshard.formats.meta.source import open_meta
from stream_reshard.formats.nanotron.config import MODEL_CONFIG_NAME
from stream_reshard.formats.nanotron.source import open_nanotron
from stream_reshard.model.truncation import Truncate, untruncated
from stream_reshard.storage.small_files import check_readable, dangling, misplaced, read_capped


def open_any(root: Path, max_nbytes: int, vocab_size: int | None, problems: Problems,
             is_exact: bool = True, truncate: Truncate = untruncated, keeps_rows: bool = False) -> Described | None:
    """Open a checkpoint of any format, or the layers of it that `truncate` takes; see `open_nanotron`. Raises
    SourceError for a folder that may not be read."""
    check_readable(root)
    if is_nanotron(root):
        return open_nanotron(root, max_nbytes, vocab_size, problems, is_exact, truncate, keeps_rows)
    if vocab_size is not None and any(os.path.isfile(root / name) for name in (CONFIG_NAME, PARAMS_NAME)):
        problems.append(UsageError("--vocab-size is for a Nanotron source only; of any other the size is known"))
    if is_meta(root):
        return open_meta(root, max_nbytes, problems, truncate)
    return open_hugging_face(root, max_nbytes, problems, truncate)


def is_nanotron(root: Path) -> bool:
    """True for a folder with a Nanotron checkpoint or remains of one: by its folder of weights, else by its config."""
    if os.path.isdir(root / "model" / "model"):
        return True
    return not os.path.isfile(root / CONFIG_NAME) and (os.path.isdir(root / "model")
                                                       or os.path.isfile(root / MODEL_CONFIG_NAME))


LATEST_NAME = "latest.txt"
"""A file beside the folders of steps, in which Nanotron's trainer keeps the number of the last step (trainer.py)."""

_MAX_LATEST_NBYTES = 1000


def followed(root: Path, is_copy: bool = False) -> tuple[Path, list[str]]:
    """The folder of the checkpoint, and a note if it is not `root` itself. Raises SourceError.

    latest.txt holds the number of a step, whose folder is beside the file. Nanotron follows it (`parse_ckpt_path`,
    nanotron/serialize/main.py) even where `root` itself is a checkpoint; that is ambiguous, and is refused here. With
    `is_copy` it is not refused: `verify` reports latest.txt as an extra file.
    """
    if not os.path.isdir(root):
        return root, []
    has_nanotron = is_nanotron(root)
    is_checkpoint = has_nanotron or is_meta(root) or os.path.isfile(root / CONFIG_NAME)
    if is_checkpoint and (is_copy or not has_nanotron):
        return root, []
    if not os.path.exists(root / LATEST_NAME):
        if (cause := dangling(root, LATEST_NAME)) and not is_checkpoint:
            raise cause
        return root, []
    step = _latest(root)
    if is_checkpoint:
        raise Cause(f"{quoted(root)} holds a checkpoint and {LATEST_NAME}, and Nanotron would take the folder {step} "
                    f"that it names; give that folder, or remove {LATEST_NAME}")
    if not os.path.isdir(root / step):
        raise Cause(f"{LATEST_NAME} in {quoted(root)} names step {step}, but there is no folder {step} beside it; give "
                    f"the folder of another step")
    return root / step, [f"{LATEST_NAME} in {quoted(root)} names step {step}: {quoted(root / step)} is taken, as "
                         f"Nanotron takes it"]


def _latest(root: Path) -> str:
    """Name of the folder in latest.txt. Nanotron accepts any text that Python's int() accepts."""
    text = read_capped(root, LATEST_NAME, _MAX_LATEST_NBYTES, _MAX_LATEST_NBYTES).decode("utf-8", "backslashreplace")
    try:
        return str(int(text))
    except ValueError as error:
        raise misplaced(root, LATEST_NAME, None) or Cause(
            f"{LATEST_NAME} in {quoted(root)} holds {quoted(text[:60])}, which is not the number of a step; give the "
            f"folder of a step") from error
