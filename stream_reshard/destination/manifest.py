"""The manifest: the record of a finished conversion, with a digest of every file and of the manifest itself.

It is a file beside the weights (`stream_reshard.json`), not part of tensor headers: Nanotron's reader is strict about
those. Its first line holds the digest of the rest. The manifest of a large checkpoint is long, so it is read in two
passes, neither of which holds the text: one for its digest, one for its values.
"""
from __future__ import annotations

import json
import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import xxhash

from stream_reshard import __version__
from stream_reshard.errors import SourceError, quoted
from stream_reshard.model.parameters import parse_token_id
from stream_reshard.model.truncation import WHOLE
from stream_reshard.storage.dtypes import ITEMSIZE
from stream_reshard.storage.json_stream import JsonReader, TooLong
from stream_reshard.storage.small_files import MAX_JSON_NBYTES, open_regular, read_error, too_long

MANIFEST_NAME = "stream_reshard.json"

FORMAT = 1
"""Version of the manifest and of the journal. A file without one is older and means the same."""

MAX_MANIFEST_NBYTES = 2**28
"""Largest manifest."""

MAX_FILE_NBYTES = 1024
"""Most bytes of the entry of one file in the manifest."""

_MAX_KEYS = 100
"""Most keys of the outermost object."""

_PIECE_NBYTES = 2**18
"""Bytes read at a time for the digest."""

_NO_DIGEST = bytes(16)
"""Entry of a `FileTable` for a file without a digest; a real digest is all zeros with a chance of 1 in 2**128."""

_DIGEST = re.compile(r"[0-9a-f]{32}")
_FIRST_LINE = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})",\n')


@dataclass(frozen=True)
class FileDone:
    """A file that is durable under its final name."""

    path: str
    """Relative to the checkpoint's root, with forward slashes."""
    nbytes: int
    xxh3_128: str | None
    """Digest of the whole file, in hex; None if it has cloned blocks that were not read, or digests are off."""

    @classmethod
    def parsed(cls, value: Any) -> FileDone:
        """The file that a JSON value describes. Raises ValueError if it describes none."""
        kinds = {key: type(item) for key, item in value.items()} if isinstance(value, dict) else {}
        digest = value["xxh3_128"] if kinds.keys() == {"path", "nbytes", "xxh3_128"} else ""
        if (kinds.get("path"), kinds.get("nbytes")) != (str, int) or not isinstance(digest, (str, type(None))):
            raise ValueError(f"{quoted(value)} does not describe a file")
        if not 0 <= value["nbytes"] < 2**63:
            raise ValueError(f"{quoted(value['nbytes'])} is not the size of a file")
        if digest is not None and not _DIGEST.fullmatch(digest):
            raise ValueError(f"{quoted(value['xxh3_128'])} is not a digest")
        return cls(**value)


@dataclass(frozen=True)
class Manifest:
    """Record of a conversion."""

    run: Mapping[str, Any]
    """Identity of the run: digests of plan and documents, identities of the source files. Equal for equal runs."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts that the weights and configs do not hold: vocabulary without padding, dtype asked for, allowed settings."""
    files: Mapping[str, FileDone] = field(default_factory=dict)
    """Every file of the folder except the manifest, by its path."""

    def packed(self) -> bytes:
        """The content of the manifest file."""
        files = [asdict(self.files[path]) for path in sorted(self.files)]
        content = {"tool": "stream_reshard", "format": FORMAT, "version": __version__, "run": self.run,
                   "facts": self.facts, "files": files}
        rest = json.dumps(content, indent=1)[2:].encode() + b"\n"
        return b'{"xxh3_128": "%s",\n' % xxhash.xxh3_128(rest).hexdigest().encode() + rest


def with_files(manifest: Manifest, files: Iterable[FileDone]) -> Manifest:
    """The run and the facts of a manifest, with these files."""
    return Manifest(manifest.run, manifest.facts, {file.path: file for file in files})


def check_format(value: Any) -> None:
    """Raises ValueError for a format that this version does not read."""
    if value not in range(1, FORMAT + 1):
        raise ValueError(f"it has format {quoted(value)}, this version reads up to {FORMAT}; update stream_reshard")


def same_run(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if two identities of runs are equal. Paths in them do not count, as a remount changes them."""
    return _without_paths(one) == _without_paths(other)


def _without_paths(run: Mapping[str, Any]) -> dict[str, Any]:
    copied = run.get("copied")
    return {**run, "source": None, "copied": sorted(copied.values(), key=repr) if isinstance(copied, dict) else None}


class FileTable:
    """The files of a manifest in some 40 bytes each: hashes of their paths are kept instead of the paths. Files are
    numbered in the order of the manifest."""

    def __init__(self, files: Iterable[FileDone]):
        """Raises ValueError if a path occurs twice."""
        keys, self._sizes, self._digests = array("Q"), array("Q"), bytearray()
        for file in files:
            keys.append(_key(file.path))
            self._sizes.append(file.nbytes)
            self._digests += bytes.fromhex(file.xxh3_128) if file.xxh3_128 else _NO_DIGEST
        self._numbers = array("I", sorted(range(len(keys)), key=keys.__getitem__))
        self._keys = array("Q", map(keys.__getitem__, self._numbers))
        if any(map(int.__eq__, self._keys, self._keys[1:])):
            raise ValueError("a file is named twice")

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self.number_of(path) is not None

    def number_of(self, path: str) -> int | None:
        """The number of a file; None if the manifest does not name it."""
        at = bisect_left(self._keys, key := _key(path))
        return self._numbers[at] if at < len(self._keys) and self._keys[at] == key else None

    def get(self, path: str) -> FileDone | None:
        """The entry of a file; None if the manifest does not name it."""
        if (number := self.number_of(path)) is None:
            return None
        digest = bytes(self._digests[16 * number:16 * number + 16])
        return FileDone(path, self._sizes[number], None if digest == _NO_DIGEST else digest.hex())


def _key(path: str) -> int:
    """A 64-bit hash of a path (BLAKE2, so that a forged manifest has no equal hashes)."""
    return int.from_bytes(blake2b(path.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class StoredManifest:
    """The manifest in a folder. Its own digest is checked, those of its files are not."""

    root: Path
    digest: str
    """Digest in its first line, in hex."""
    facts: Mapping[str, Any]
    """See `Manifest.facts`."""
    files: FileTable

    def entries(self) -> Iterator[FileDone]:
        """The entries of all files, in the order of their paths, read from disk. Raises as `open_manifest` does."""
        for kind, value in _parts(self.root, MAX_JSON_NBYTES):
            if kind == "files":
                yield value


def open_manifest(root: Path, max_nbytes: int = 2**21) -> StoredManifest | None:
    """The manifest of a folder, in a few bytes per file; None if there is none. Raises SourceError if it was damaged or
    is of another version, ResourceError if one value in it has more than `max_nbytes`."""
    if not os.path.lexists(root / MANIFEST_NAME):
        return None
    digest, facts = _checked_digest(root), {}

    def files() -> Iterator[FileDone]:
        for kind, value in _parts(root, max_nbytes):
            if kind == "files":
                yield value
            elif kind == "facts":
                facts.update(value)

    with _faults_of(root):
        table = FileTable(files())
        return StoredManifest(root, digest, _checked(facts), table)


def read_manifest(root: Path, max_nbytes: int = MAX_MANIFEST_NBYTES) -> Manifest | None:
    """The whole manifest of a folder, in memory; None if there is none. Raises SourceError if it was damaged, is of
    another version, or has more than `max_nbytes`."""
    if not os.path.lexists(root / MANIFEST_NAME):
        return None
    _checked_digest(root, max_nbytes)
    found: dict[str, Any] = {"run": {}, "facts": {}}
    files = []
    for kind, value in _parts(root, max_nbytes, whole_run=True):
        if kind == "files":
            files.append(value)
        else:
            found[kind] = value
    with _faults_of(root):
        return with_files(Manifest(found["run"], _checked(found["facts"])), files)


@contextmanager
def _faults_of(root: Path) -> Iterator[None]:
    """A context that turns an error of reading the manifest in `root` into an error for the user."""
    try:
        yield
    except OSError as error:
        raise read_error(f"{MANIFEST_NAME} in {quoted(root)}", error) from error
    except TooLong as error:
        raise too_long(MANIFEST_NAME, error.limit, MAX_MANIFEST_NBYTES) from error
    except (ValueError, TypeError) as error:
        raise SourceError(f"{MANIFEST_NAME} in {quoted(root)} is no manifest of this version: {error}") from error


def _checked_digest(root: Path, max_nbytes: int = MAX_MANIFEST_NBYTES) -> str:
    """The digest in the first line. Raises SourceError if it is not the digest of the rest."""
    digest, left = xxhash.xxh3_128(), max_nbytes
    with _faults_of(root), open_regular(root / MANIFEST_NAME) as stream:
        match = _FIRST_LINE.fullmatch(stream.readline(64))
        while match and (piece := stream.read(_PIECE_NBYTES)):
            digest.update(piece)
            if (left := left - len(piece)) < 0:
                raise too_long(MANIFEST_NAME, max_nbytes, max_nbytes)
    if not match or digest.hexdigest() != match[1].decode():
        raise SourceError(f"{MANIFEST_NAME} in {quoted(root)} does not match its own digest; it was damaged or edited")
    return digest.hexdigest()


def _parts(root: Path, max_nbytes: int, whole_run: bool = False) -> Iterator[tuple[str, Any]]:
    """(key, value) in the order of the text: ("facts", all), ("files", entry) for each entry and, if `whole_run`,
    ("run", all). Raises SourceError, or ResourceError for a value of more than `max_nbytes`."""
    seen: set[str] = set()
    with _faults_of(root), open_regular(root / MANIFEST_NAME) as stream:
        reader = JsonReader(stream, MAX_MANIFEST_NBYTES, max_nbytes)
        for key in reader.keys():
            if key in seen or len(seen) > _MAX_KEYS:
                raise ValueError("a key occurs twice" if key in seen else f"it has more than {_MAX_KEYS} keys")
            seen.add(key)
            if key == "files":
                yield from (("files", FileDone.parsed(value)) for value in reader.items())
            elif key == "run" and not whole_run:
                _skip_run(reader)
            else:
                value = reader.value()
                if key == "format":
                    check_format(value)
                if key in ("run", "facts"):
                    yield key, _object(value)
        if reader.next():
            raise ValueError("something follows its end")
        if missing := {"run", "facts", "files"} - seen:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")


def _skip_run(reader: JsonReader) -> None:
    """Read the run, which has an entry for each source file, without holding it."""
    for _ in reader.keys():
        if reader.next() == "{":
            for _ in reader.entries():
                pass
        else:
            reader.value()


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} where an object is expected")
    return value


def _checked(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts, if their values have the right types; raises ValueError otherwise."""
    vocab_size, allowed = facts.get("vocab_size"), facts.get("allowed")
    has_size = vocab_size is None or (type(vocab_size) is int and 0 < vocab_size < 2**48)
    if not (has_size and isinstance(facts.get("dtype"), str)
            and isinstance(allowed, list) and all(isinstance(name, str) for name in allowed)):
        raise ValueError(f"{quoted(facts)} are not the facts of a conversion")
    for value in dict(facts.get("token_ids", {})).values():
        parse_token_id(value)
    whole = facts.get(WHOLE)
    if whole is not None and not (type(whole) is int and whole > 0):
        raise ValueError(f"{quoted(whole)} is not a number of layers")
    if facts.get("router_dtype") not in (None, *ITEMSIZE):
        raise ValueError(f"{quoted(facts['router_dtype'])} is not a dtype")
    return facts
