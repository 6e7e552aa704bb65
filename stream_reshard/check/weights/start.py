"""Weights from which a training by config.yaml starts: those of its own folder, of a copy of the folder, or others.

Nanotron starts from `checkpoints.resume_checkpoint_path` if it leads to a checkpoint (`parse_ckpt_path`,
nanotron/serialize/main.py), else from `model.init_method` (`_load_model_checkpoint`, nanotron/trainer.py). In a folder
that config.yaml names, only the manifest and latest.txt are opened; messages show a number from them, or the first 40
bytes of latest.txt.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from stream_reshard.check.weights.files import LATEST
from stream_reshard.destination.manifest import StoredManifest, open_manifest
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.formats.nanotron.config import MODEL_CONFIG_NAME
from stream_reshard.formats.nanotron.yaml_text import CONFIG_YAML
from stream_reshard.storage.small_files import read_capped

_MAX_LATEST_NBYTES = 2**12
"""Limit on latest.txt, which holds a number."""

_STATES = {"load_optimizer": "optimizer", "load_lr_scheduler": "lr_scheduler"}
"""Folders that Nanotron also loads when it resumes, each by the setting that turns this off."""


@dataclass(frozen=True)
class TrainingFolder:
    """The folder of a checkpoint from which a training starts."""

    root: Path
    name: Path
    """Final path of the folder; `root` is another one while a conversion is not committed."""
    manifest: StoredManifest | None

    def is_at(self, path: Path) -> bool:
        """True if a path leads to this folder."""
        try:
            return os.path.abspath(path) == os.path.abspath(self.name) or os.path.samefile(path, self.root)
        except (OSError, ValueError):
            return False

    def is_copied_at(self, path: Path) -> bool:
        """True if a path holds the same checkpoint: an equal manifest, and weight files of its sizes."""
        other = Problems().collect(open_manifest, path) if self.manifest else None
        if self.manifest is None or other is None or other.digest != self.manifest.digest:
            return False
        weights = (file for file in other.entries() if file.path.startswith("model/"))
        try:
            return all((path / file.path).stat().st_size == file.nbytes for file in weights)
        except OSError:
            return False


def start_problems(folder: TrainingFolder, content: bytes, init_method: Any, checkpoints: Mapping[str, Any],
                   notes: list[str], has_state: bool) -> Iterator[SourceError]:
    """Reasons why a training does not start from this folder, or with a training state does not resume from it.
    `content`: of config.yaml. Remarks go to `notes`; so does all that a training wrote of its own start."""
    resumed = checkpoints.get("resume_checkpoint_path")
    if has_state:
        key = "checkpoints.resume_checkpoint_path"
        problems = [SourceError(f"{CONFIG_YAML}: {key} is null; set it to {quoted(folder.name)} to resume from its "
                                f"state")] if resumed is None else list(
            _resume_problems(folder, content, resumed, checkpoints, notes))
        if folder.manifest is None:
            notes.extend(map(str, problems))
        else:
            yield from problems
        return
    if not isinstance(init_method, Mapping) or init_method.keys() != {"path"}:
        held = ", ".join(sorted(map(str, init_method))) if isinstance(init_method, Mapping) else init_method
        yield SourceError(f"{CONFIG_YAML}: model.init_method holds {quoted(held or 'nothing')}, so the training does "
                          f"not start from these weights; it must hold path: {quoted(folder.name)}, and nothing else")
    else:
        yield from _path_problems(folder, content, "model.init_method.path", init_method["path"], notes)
    if resumed is not None:
        yield from _resume_problems(folder, content, resumed, checkpoints, notes)


def _path_problems(folder: TrainingFolder, content: bytes, key: str, value: Any, notes: list[str]
                   ) -> Iterator[SourceError]:
    cure = f"set {key} to {quoted(folder.name)}"
    if not isinstance(value, str) or not value or "\0" in value:
        yield SourceError(f"{CONFIG_YAML}: {key} is {value_text(value)}, not a path; {cure}")
        return
    path = Path(value)
    if not path.is_absolute():
        notes.append(f"{CONFIG_YAML}: {key} {quoted(value)} is relative: Nanotron reads it from its working "
                     f"folder; {cure}")
    if folder.is_at(path):
        return
    if folder.is_copied_at(path):
        notes.append(f"{CONFIG_YAML}: {key} is {quoted(value)}, where the same checkpoint stands")
    elif _is_as_made(folder, content) and not os.path.lexists(path):
        notes.append(f"{CONFIG_YAML}: {key} is {quoted(value)}, where nothing stands: {quoted(folder.name)} was moved; "
                     f"{cure} before training")
    else:
        yield SourceError(f"{CONFIG_YAML}: {key} is {quoted(value)}, so the training does not start from "
                          f"{quoted(folder.name)}; {cure}")


def _is_as_made(folder: TrainingFolder, content: bytes) -> bool:
    """True if the content of config.yaml has the digest in the manifest."""
    file = folder.manifest.files.get(CONFIG_YAML) if folder.manifest else None
    return file is not None and file.xxh3_128 == xxhash.xxh3_128(content).hexdigest()


def _resume_problems(folder: TrainingFolder, content: bytes, value: Any, checkpoints: Mapping[str, Any],
                     notes: list[str]) -> Iterator[SourceError]:
    """Reasons why Nanotron does not resume from this folder; it resumes rather than start from init_method."""
    key = "checkpoints.resume_checkpoint_path"
    path = value if isinstance(value, str) and "\0" not in value else ""
    if path and os.path.lexists(os.path.join(path, LATEST)):
        step = read_capped(Path(path), LATEST, _MAX_LATEST_NBYTES, _MAX_LATEST_NBYTES)
        try:
            path = os.path.join(path, str(int(step)))
        except ValueError:
            yield SourceError(f"{CONFIG_YAML}: {key} is {quoted(path)}, whose {LATEST} holds {quoted(step[:40])}, not "
                              f"a number")
            return
    elif path and "://" not in path and not folder.is_at(Path(path)) and not os.path.exists(
            os.path.join(path, MODEL_CONFIG_NAME)):
        notes.append(f"{CONFIG_YAML}: {key} {quoted(path)} holds no checkpoint, so Nanotron starts from "
                     f"model.init_method")
        return
    before = len(notes)
    problems = list(_path_problems(folder, content, key, path or value, notes))
    yield from problems
    for flag, name in _STATES.items() if not problems and len(notes) == before else ():
        if checkpoints.get(flag, True) and not (folder.root / name).is_dir():
            yield SourceError(f"{CONFIG_YAML}: {key} leads here and {flag} is not false, but {quoted(folder.name)} has "
                              f"no {name}/; set {key} to null: model.init_method starts from these weights")


def value_text(value: Any) -> str:
    """A scalar of config.yaml as text; of another value only its type: its references can make its text endless."""
    return quoted(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
