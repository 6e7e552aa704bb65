"""The files of a copy: those that must be there, those that must not, and those whose digests are compared.

One walk through the folder keeps one byte per file that a manifest names, none for others: a folder may hold any
number of them.
"""
from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.nanotron import MAX_LISTED
from stream_reshard.destination.manifest import MANIFEST_NAME, FileDone, StoredManifest
from stream_reshard.errors import DifferenceError, quoted
from stream_reshard.formats.hugging_face.config import CONFIG_NAME, INDEX_NAME, PICKLED_INDEX_NAME, SINGLE_NAME
from stream_reshard.formats.nanotron.config import METADATA_NAME, MODEL_CONFIG_NAME
from stream_reshard.storage.small_files import files_below

CONFIG_YAML = "config.yaml"

LATEST = "latest.txt"

_FOLLOWED = {
    LATEST: "Nanotron goes on from the step that it names",
    "adapter_config.json": "transformers puts an adapter on the weights",
    "adapter_model*": "transformers puts an adapter on the weights",
    "pytorch_model*": "transformers may take the weights from there",
    "tf_model*": "transformers may take the weights from there",
    "flax_model*": "transformers may take the weights from there",
    "model.ckpt*": "transformers may take the weights from there",
    "*.safetensors": "no index names it",
    "*.safetensors.index*.json": "readers may take it for the index"}
"""Patterns of names at the top of a checkpoint that its readers follow though nothing here was converted to them
(nanotron/serialize/main.py; transformers/utils/__init__.py), and the consequence."""

_NAMES = (CONFIG_NAME, SINGLE_NAME, INDEX_NAME, MODEL_CONFIG_NAME, METADATA_NAME, CONFIG_YAML, MANIFEST_NAME, "model",
          "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
"""Names that readers look for; in another case, the file system decides whether a file is found or missed."""

_MISSING, _THERE, _NO_FILE, _TAKEN = range(4)
"""States of a file that a manifest names."""


@dataclass(frozen=True)
class FilesOfManifest:
    """The files that a manifest names, and which of them are there. A path in a manifest is a name to look up among
    those found, never one to open."""

    manifest: StoredManifest
    states: bytearray
    """One state per file."""

    def found(self, path: str, is_file: bool) -> bool:
        """Note a file that is there; False where the manifest does not name it."""
        if (number := self.manifest.files.number_of(path)) is None:
            return False
        self.states[number] = _THERE if is_file else _NO_FILE
        return True

    def missing(self) -> Iterator[DifferenceError]:
        """Files that are not there, or are no files."""
        for state, file in zip(self.states, self.manifest.entries()):
            if state != _THERE:
                what = "no file" if state == _NO_FILE else "missing"
                yield DifferenceError(f"{quoted(file.path)} is {what}: {MANIFEST_NAME} names it")

    @property
    def num_there(self) -> int:
        """Number of files that are there and were not taken."""
        return self.states.count(_THERE)

    def take(self, path: str) -> FileDone | None:
        """The manifest's entry of a file; None where the file is not there, or was taken before."""
        number = self.manifest.files.number_of(path)
        if number is None or self.states[number] != _THERE:
            return None
        self.states[number] = _TAKEN
        return self.manifest.files.get(path)

    def rest(self) -> Iterator[FileDone]:
        """The manifest's entries of the files that are there and were not taken."""
        return (file for state, file in zip(self.states, self.manifest.entries()) if state == _THERE)


class Listing:
    """Differences of several kinds: of each the first few, and the number of the rest."""

    def __init__(self) -> None:
        self.differences: list[DifferenceError] = []
        self._counts: dict[str, int] = {}

    def add(self, kind: str, text: str) -> None:
        """Add a difference of a kind."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._counts[kind] <= MAX_LISTED:
            self.differences.append(DifferenceError(text))

    def whole(self) -> list[DifferenceError]:
        """Listed differences, and one more per kind for the number of the rest."""
        more = ((kind, count - MAX_LISTED) for kind, count in self._counts.items() if count > MAX_LISTED)
        return [*self.differences, *(DifferenceError(f"and {count} more files are {kind}") for kind, count in more)]


def file_set(root: Path, copy: Checkpoint | None, manifest: StoredManifest | None, ignored: Collection[str],
             allow: Collection[str]) -> tuple[FilesOfManifest | None, list[DifferenceError]]:
    """(the files of the manifest, differences for missing and extra files but the ignored ones). Files that readers
    look for, or would follow, are judged with and without a manifest, others only with one; weight files of Nanotron's
    are judged by their reader."""
    told = FilesOfManifest(manifest, bytearray(len(manifest.files))) if manifest else None
    listing, tops = Listing(), set()
    for path in files_below(root):
        if path == MANIFEST_NAME or path in ignored:
            continue
        if told is not None and not told.found(path, (root / path).is_file()):
            listing.add("extra", f"{quoted(path)} is extra: {MANIFEST_NAME} does not name it")
        elif copy is not None and (reason := _reason_against(path, copy)):
            listing.add("extra", f"{quoted(path)} is extra: {reason}")
        if path in (METADATA_NAME, CONFIG_YAML):
            tops.add(path)
    for difference in told.missing() if told else ():
        listing.add("missing", str(difference))
    needed = _needed(copy) if copy else set()
    for name in sorted(needed - tops - {*allow}):
        if manifest is None or name not in manifest.files:
            listing.add("missing", f"{quoted(name)} is missing (--allow {name} accepts it)")
    return told, listing.whole()


def _needed(copy: Checkpoint) -> set[str]:
    """Files that must stand beside Nanotron's weights. Nanotron's trainer saves a config.yaml, its functions alone save
    none (serialize/main.py): a folder that Nanotron itself saved needs none."""
    if not copy.is_nanotron:
        return set()
    return {METADATA_NAME} if copy.is_whole else {METADATA_NAME, CONFIG_YAML}


def _reason_against(path: str, copy: Checkpoint) -> str | None:
    """Reason why a file should not be there; None without one."""
    top, _, below = path.partition("/")
    name = top.casefold()
    for known in _NAMES:
        if name == known and top != known:
            return f"readers that look for {known} may find it, or not"
    if below or path in copy.paths or (path == _index_of(copy) and not copy.is_nanotron):
        return None
    return next((reason for pattern, reason in _FOLLOWED.items() if fnmatchcase(name, pattern)), None)


def _index_of(copy: Checkpoint) -> str:
    """Name of the index of a Hugging Face checkpoint, if it has one."""
    return PICKLED_INDEX_NAME if any(path.endswith(".bin") for path in copy.paths) else INDEX_NAME
