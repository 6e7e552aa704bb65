"""The files of a copy: missing files, extra files, and files whose digests are compared.

One walk through the folder keeps one byte per file that the manifest names, and nothing of other files: a folder may
hold any number of them.
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
from stream_reshard.formats.config_json import CONFIG_NAME, INDEX_NAME, PICKLED_INDEX_NAME, SINGLE_NAME
from stream_reshard.formats.nanotron.config import METADATA_NAME, MODEL_CONFIG_NAME
from stream_reshard.formats.nanotron.yaml_text import CONFIG_YAML
from stream_reshard.storage.small_files import files_below

LATEST = "latest.txt"

_FOLLOWED = {
    LATEST: "Nanotron loads the step that it names",
    "adapter_config.json": "transformers adds an adapter to the weights",
    "adapter_model*": "transformers adds an adapter to the weights",
    "pytorch_model*": "transformers may take the weights from there",
    "tf_model*": "transformers may take the weights from there",
    "flax_model*": "transformers may take the weights from there",
    "model.ckpt*": "transformers may take the weights from there",
    "*.safetensors": "no index names it",
    "*.safetensors.index*.json": "readers may take it for the index"}
"""Names, as patterns, of files at the top of a checkpoint that change what its readers load, though no conversion wrote
them (nanotron/serialize/main.py; transformers/utils/__init__.py), each with the consequence."""

_NAMES = (CONFIG_NAME, SINGLE_NAME, INDEX_NAME, MODEL_CONFIG_NAME, METADATA_NAME, CONFIG_YAML, MANIFEST_NAME, "model",
          "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
"""Names that readers look for. A file with such a name in another case is found on some file systems only."""

_MISSING, _THERE, _NO_FILE, _TAKEN = range(4)
"""States of a file that a manifest names."""


@dataclass(frozen=True)
class FilesOfManifest:
    """The files that a manifest names, each with its state. A path of a manifest is compared with the paths found in
    the folder, and never opened."""

    manifest: StoredManifest
    states: bytearray
    """One state per file."""

    def mark_found(self, path: str, is_file: bool) -> bool:
        """Record that a path exists; False if the manifest does not name it."""
        if (number := self.manifest.files.number_of(path)) is None:
            return False
        self.states[number] = _THERE if is_file else _NO_FILE
        return True

    def missing(self) -> Iterator[DifferenceError]:
        """An error for each named file that does not exist, or is no file."""
        for state, file in zip(self.states, self.manifest.entries()):
            if state != _THERE:
                fault = "no file" if state == _NO_FILE else "missing"
                yield DifferenceError(f"{quoted(file.path)} is {fault}: {MANIFEST_NAME} names it")

    @property
    def num_there(self) -> int:
        """Number of existing files that were not taken."""
        return self.states.count(_THERE)

    def take(self, path: str) -> FileDone | None:
        """The manifest's entry of a file; None for a file that does not exist, or was taken before."""
        number = self.manifest.files.number_of(path)
        if number is None or self.states[number] != _THERE:
            return None
        self.states[number] = _TAKEN
        return self.manifest.files.get(path)

    def rest(self) -> Iterator[FileDone]:
        """The manifest's entries of the existing files that were not taken."""
        return (file for state, file in zip(self.states, self.manifest.entries()) if state == _THERE)


class Listing:
    """Differences by kind: the first MAX_LISTED of each, and the number of the rest."""

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
    """(the files of the manifest, differences for missing and extra files that are not `ignored`). Without a manifest,
    only files that readers look for or follow are checked. Nanotron's weight files are checked by their reader."""
    manifest_files = FilesOfManifest(manifest, bytearray(len(manifest.files))) if manifest else None
    listing, tops = Listing(), set()
    for path in files_below(root):
        if path == MANIFEST_NAME or path in ignored:
            continue
        if manifest_files is not None and not manifest_files.mark_found(path, (root / path).is_file()):
            listing.add("extra", f"{quoted(path)} is extra: {MANIFEST_NAME} does not name it")
        elif copy is not None and (reason := _reason_if_extra(path, copy)):
            listing.add("extra", f"{quoted(path)} is extra: {reason}")
        if path in (METADATA_NAME, CONFIG_YAML):
            tops.add(path)
    for difference in manifest_files.missing() if manifest_files else ():
        listing.add("missing", str(difference))
    needed = _needed(copy) if copy else set()
    for name in sorted(needed - tops - {*allow}):
        if manifest is None or name not in manifest.files:
            listing.add("missing", f"{quoted(name)} is missing (--allow {name} accepts it)")
    return manifest_files, listing.whole()


def _needed(copy: Checkpoint) -> set[str]:
    """Files that must stand beside Nanotron's weights. A folder that Nanotron saved needs no config.yaml: its trainer
    writes one, its function for weights alone does not (serialize/main.py)."""
    if not copy.is_nanotron:
        return set()
    return {METADATA_NAME} if copy.is_whole else {METADATA_NAME, CONFIG_YAML}


def _reason_if_extra(path: str, copy: Checkpoint) -> str | None:
    """Reason why a file must not be in a checkpoint; None for one that may."""
    top, _, below = path.partition("/")
    name = top.casefold()
    for known in _NAMES:
        if name == known and top != known:
            return f"on some file systems readers take it for {known}"
    if below or path in copy.paths or (path == _index_of(copy) and not copy.is_nanotron):
        return None
    return next((reason for pattern, reason in _FOLLOWED.items() if fnmatchcase(name, pattern)), None)


def _index_of(copy: Checkpoint) -> str:
    """Name of the index of a Hugging Face checkpoint, if it has one."""
    return PICKLED_INDEX_NAME if any(path.endswith(".bin") for path in copy.paths) else INDEX_NAME
