"""Companions: files that go along unchanged. Tokenizer, generation settings, and the texts that licences require.

Names are those of transformers (tokenization_utils_base.py, dynamic_module_utils.py) and of model repositories on the
hub. Code of a tokenizer is copied and never run. A link out of the folder is followed only to a file on a disk, never
to a file that the kernel generates, such as /proc/self/environ.
"""
from __future__ import annotations

import heapq
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stream_reshard.errors import Problems, SourceError, UsageError, quoted
from stream_reshard.machine.kernel import VIRTUAL_FILE_SYSTEMS, file_system_of
from stream_reshard.machine.memory import human
from stream_reshard.storage.identity import Identity, identity_of
from stream_reshard.storage.small_files import misplaced, open_regular, read_error

TEMPLATES_FOLDER = "additional_chat_templates"
CONFIG_NAME = "tokenizer_config.json"
GENERATION_NAME = "generation_config.json"

_TOKENIZER = re.compile(rf"tokenizer\.json|tokenizer\.model(\.v\w+)?|{CONFIG_NAME}|special_tokens_map\.json|"
                        rf"added_tokens\.json|vocab\.(json|txt)|merges\.txt|tekken\.json|[\w.-]+\.tiktoken|"
                        rf"chat_template\.(jinja|json)|{TEMPLATES_FOLDER}/[\w.-]+\.jinja")

_TEXT = re.compile(r"(?!.*\.(py|safetensors|bin|pth?|ckpt|pkl|json)$)"
                   r"((licen[cs]e|copying|notice|use_policy)([._-].*)?|readme\.md)", re.IGNORECASE)

_IMPORT = re.compile(rb"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+)\s*$)", re.MULTILINE)
"""A relative import of a module beside it in the code of a tokenizer (transformers' get_relative_imports)."""

MAX_NBYTES = 2**30
"""Largest companion; no tokenizer and no text is larger."""

MAX_NUM = 200
"""Most companions of one folder."""

_MAX_PARSED_NBYTES = 2**20
"""Bytes at the beginning of a config or of code that are searched for names of other files."""


def copied_from(path: Path) -> Companion:
    """A file of the source that goes along. Raises SourceError."""
    try:
        return Companion(path, identity_of(os.stat(path)))
    except OSError as error:
        raise read_error(quoted(path), error) from error


@dataclass(frozen=True)
class Companion:
    """A file that goes along."""

    path: Path
    """Path of the original; absolute, links not followed."""
    identity: Identity
    """Identity of the file when the plan was made."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.identity[2]


@dataclass
class Companions:
    """The companions by their name in the destination, and notes for the user."""

    files: dict[str, Companion] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_companions(source: Path, tokenizer: Path | None, problems: Problems) -> Companions:
    """The companions of a source. Tokenizer and generation settings in a folder `tokenizer` replace those of the
    source.

    Added to `problems`: SourceError for a link to a file that is not on a disk, and for a file that cannot be read;
    UsageError for a `tokenizer` without companions.
    """
    if tokenizer is None:
        return _Folder(source, problems).companions(_names_in(source))
    names = [name for name in _names_in(tokenizer) if not _TEXT.fullmatch(name)]
    given = _Folder(tokenizer, problems).companions(names)
    if not names:
        problems.append(UsageError(f"--tokenizer {quoted(tokenizer)} holds none of tokenizer.json, tokenizer.model, "
                                   f"{CONFIG_NAME}, vocab.json, merges.txt, {GENERATION_NAME}"))
    has_tokenizer = any(_TOKENIZER.fullmatch(name) for name in names)
    kept = [name for name in _names_in(source)
            if name not in names and not (has_tokenizer and _TOKENIZER.fullmatch(name))]
    own = _Folder(source, problems).companions(kept)
    return Companions(own.files | given.files, own.notes + given.notes)


def without_card(found: Companions) -> Companions:
    """The companions without the model card, which is not that of a truncated model."""
    cards = [name for name in found.files if name.lower() == "readme.md"]
    files = {name: own for name, own in found.files.items() if name not in cards}
    return Companions(files, [*found.notes, *(f"{quoted(name)} is not copied, as DST is truncated" for name in cards)])


def _names_in(folder: Path) -> list[str]:
    """Names of the files in a folder that are names of companions, in order."""
    own = (name for name in _listed(folder)
           if name == GENERATION_NAME or _TOKENIZER.fullmatch(name) or _TEXT.fullmatch(name))
    templates = (f"{TEMPLATES_FOLDER}/{name}" for name in _listed(folder / TEMPLATES_FOLDER))
    below = (name for name in templates if _TOKENIZER.fullmatch(name))
    return [*heapq.nsmallest(MAX_NUM + 1, own), *heapq.nsmallest(MAX_NUM + 1, below)]


def _listed(folder: Path) -> Iterator[str]:
    """The names in a folder; none if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries)
    except OSError:
        return


class _Folder:
    """Finds the companions in one folder."""

    def __init__(self, root: Path, problems: Problems):
        self._root, self._problems, self._found = root, problems, Companions()
        self._real = Path(os.path.realpath(root))
        self._homes = (self._real, *_blobs_of(self._real))
        """Folders into which a link may lead without a note."""

    def companions(self, names: Iterable[str]) -> Companions:
        """The companions of these names, and the code that tokenizer_config.json names."""
        for name in names:
            self._add(name)
        self._add_code()
        return self._found

    def _note(self, text: str) -> None:
        self._found.notes.append(text)

    def _add(self, name: str) -> bool:
        """Add a file, if it can be a companion; True if it was added."""
        if len(self._found.files) >= MAX_NUM:
            self._note(f"{quoted(name)} is not copied: the limit is {MAX_NUM} such files")
            return False
        companion = self._problems.collect(self._opened, name)
        if companion is not None:
            self._found.files[name] = companion
        return companion is not None

    def _opened(self, name: str) -> Companion | None:
        """The companion of this name; None, with a note, if it is no file of a possible size. Raises SourceError,
        ResourceError."""
        path = self._root / name
        try:
            status = os.stat(path)
        except OSError as error:
            target = os.readlink(path) if path.is_symlink() else None
            self._note(f"{quoted(name)} is not copied: " + (
                f"{error.strerror}" if target is None else f"it is a link to {quoted(target)}: {error.strerror}"))
            return None
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_NBYTES:
            self._note(f"{quoted(name)} is not copied: it " + (
                f"has {human(status.st_size)}, the limit is {human(MAX_NBYTES)}"
                if stat.S_ISREG(status.st_mode) else "is not a file"))
            return None
        self._follow(name, path)
        if cause := misplaced(self._root, name, "JSON" if name.endswith(".json") else None):
            raise cause
        try:
            with open_regular(path) as stream:
                return Companion(Path(os.path.abspath(path)), identity_of(os.fstat(stream.fileno())))
        except OSError as error:
            raise read_error(f"{quoted(name)} in {quoted(self._root)}", error) from error

    def _follow(self, name: str, path: Path) -> None:
        """Note a link that leads out of the folder. Raises SourceError for a file that the kernel generates."""
        real = Path(os.path.realpath(path))
        leaves = not any(real.is_relative_to(home) for home in self._homes)
        if not leaves and real.stat().st_dev == self._real.stat().st_dev:
            return
        kind = file_system_of(real)
        if kind in VIRTUAL_FILE_SYSTEMS or (leaves and kind == "unknown"):
            raise SourceError(f"{quoted(name)} in {quoted(self._root)} leads to {quoted(real)} on a file system of "
                              f"type {kind}, which is not on a disk; remove the link")
        if leaves:
            self._note(f"{quoted(name)} is a link out of the source: {quoted(real)} is copied")

    def _add_code(self) -> None:
        """Add the modules that tokenizer_config.json names, and the modules that these import."""
        waiting = []
        for reference in _references(self._parsed(CONFIG_NAME)):
            module = reference.rpartition(".")[0]
            if "--" in reference:
                self._note(f"{CONFIG_NAME} names code of another repository ({quoted(reference)}), which is not "
                           f"copied")
            elif not re.fullmatch(r"\w{1,200}", module):
                self._note(f"{CONFIG_NAME} names the code {quoted(reference)}, which is no file of the folder")
            elif self._add_module(module):
                waiting.append(f"{module}.py")
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                self._note(f"{quoted(name)} is copied, not run; AutoTokenizer runs it where trust_remote_code is set")
                found = _IMPORT.findall(self._content(name))
                modules = [(one or other).decode(errors="replace") for one, other in found]
                waiting += [f"{module}.py" for module in modules if self._add_module(module)]

    def _add_module(self, module: str) -> bool:
        name = f"{module}.py"
        if name in self._found.files:
            return True
        if not os.path.lexists(self._root / name):
            self._note(f"the tokenizer needs {quoted(name)}, which is not in {quoted(self._root)}")
            return False
        return self._add(name)

    def _content(self, name: str) -> bytes:
        """The beginning of a companion; b"" if there is no companion of this name, or it cannot be read."""
        if name not in self._found.files:
            return b""
        try:
            with open_regular(self._found.files[name].path) as stream:
                return stream.read(_MAX_PARSED_NBYTES)
        except OSError:
            return b""

    def _parsed(self, name: str) -> Any:
        """The value in a JSON file; None if it is absent or not JSON, which is no fault: tokenizers are not checked."""
        try:
            return json.loads(self._content(name))
        except (ValueError, RecursionError):
            return None


def _blobs_of(root: Path) -> Iterator[Path]:
    """The folder of blobs that belongs to a snapshot in the hub's cache (huggingface_hub/file_download.py)."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            yield folder.parent.parent / "blobs"


def _references(config: Any) -> list[str]:
    """The classes that the auto_map of a tokenizer_config.json names, as `module.Class`."""
    named = config.get("auto_map") if isinstance(config, Mapping) else None
    named = named.get("AutoTokenizer") if isinstance(named, Mapping) else named
    names = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(name for name in names[:MAX_NUM] if isinstance(name, str)))
