"""Small files that somebody else made: opened without waiting, read up to a cap, parsed with care."""
from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stream_reshard.errors import Cause, Refused, ResourceError, SourceError, StreamReshardError, quoted
from stream_reshard.storage.json_text import read_json_text
from stream_reshard.storage.stand_ins import HEAD_NBYTES, stand_in

MAX_JSON_NBYTES = 10 * 2**20
"""Cap on config and index files, as huggingface_hub has for an index."""

_MAY_PASS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE,
                       errno.ENOMEM})
"""errno values after which reading may succeed later."""

_MAX_DEPTH = 64
"""Folders within folders, at most: a checkpoint of Nanotron has some ten."""

_SILLY_RENAME = re.compile(r"\.nfs[0-9a-f]{24}")
"""The name that NFS gives to a file which was removed while open (fs/nfs/unlink.c: 16 digits of the file, 8 of a
counter)."""

_LITTER = re.compile(r"\._.*|\.DS_Store|\.localized|(?i:thumbs\.db|ehthumbs\.db|desktop\.ini)", re.DOTALL)
_LITTER_FOLDERS = frozenset({"__MACOSX", ".AppleDouble", ".Spotlight-V100", ".Trashes", ".fseventsd", "@eaDir"})
"""Names that macOS, Windows and network drives leave in folders, without being asked."""


def is_silly_rename(name: str) -> bool:
    """True for the name under which NFS keeps a removed file that is still open somewhere."""
    return _SILLY_RENAME.fullmatch(name) is not None


def is_litter(path: str) -> bool:
    """True where a file, by its path, was left by the desktop of a system rather than by a user or a program."""
    *folders, name = path.split("/")
    return bool(_LITTER.fullmatch(name)) or not _LITTER_FOLDERS.isdisjoint(folders)


def read_error(name: str, error: OSError, kind: type[StreamReshardError] = SourceError) -> StreamReshardError:
    """The error a user sees when a file or folder cannot be read: ResourceError where it may be readable later, else
    `kind`."""
    return (ResourceError if error.errno in _MAY_PASS else kind)(f"{name}: {error.strerror}")


def real_path(path: Path) -> Path:
    """A path without links, absolute, as far as it is there. Unlike Path.resolve it raises nothing for a link that
    leads back to itself: whoever opens it does."""
    return Path(os.path.realpath(path))


def open_regular(path: Path) -> BinaryIO:
    """A file opened for reading, links followed. OSError for what is no file: a pipe would make us wait for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return os.fdopen(descriptor, "rb")


def files_below(root: Path, kind: type[StreamReshardError] = SourceError) -> Iterator[str]:
    """Paths, relative and with forward slashes, of everything below a folder that is not a folder itself; links are not
    followed. Nothing where there is no folder. What NFS keeps of removed files that are still open is not there.

    Raises `kind` for a folder that may not be read, or that is nested deeper than any of a checkpoint.
    """
    waiting = [""]
    while waiting:
        below = waiting.pop()
        files, folders = _listed(root, below, kind)
        yield from (f"{below}{name}" for name in sorted(files))
        waiting += [f"{below}{name}/" for name in sorted(folders, reverse=True)]


def _listed(root: Path, below: str, kind: type[StreamReshardError]) -> tuple[list[str], list[str]]:
    """(names of files and links, names of folders) in `root / below`."""
    if below.count("/") > _MAX_DEPTH:
        raise kind(f"{quoted(root / below)} is nested {_MAX_DEPTH + 1} folders deep in {quoted(root)}, where a "
                   f"checkpoint has at most {_MAX_DEPTH}; move it away")
    names: tuple[list[str], list[str]] = [], []
    try:
        with os.scandir(root / below) as entries:
            for entry in entries:
                if not is_silly_rename(entry.name):
                    names[entry.is_dir(follow_symlinks=False)].append(entry.name)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return [], []  # It is no folder, or not there any more.
        raise read_error(quoted(root / below), error, kind) from error
    return names


def check_readable(root: Path) -> None:
    """Raises SourceError for a folder that may not be read or not be entered."""
    if os.path.isdir(root) and not os.access(root, os.R_OK | os.X_OK):
        raise SourceError(f"{quoted(root)}: {os.strerror(errno.EACCES)}")


def names_in(root: Path) -> Iterator[str]:
    """The names in a folder, as they come and none of them kept. Raises SourceError where it may not be read."""
    return (entry.name for entry in _entries(root))


def links_in(root: Path) -> Iterator[str]:
    """The names of the links in a folder; see `names_in`."""
    return (entry.name for entry in _entries(root) if entry.is_symlink())


def _entries(root: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            yield from entries
    except OSError as error:
        raise read_error(quoted(root), error) from error


def read_capped(root: Path, name: str, max_nbytes: int, fixed: int = MAX_JSON_NBYTES) -> bytes:
    """The content of `root / name`. Raises SourceError where it cannot be read or has more than `fixed` bytes, which no
    such file has; ResourceError where it has more than `max_nbytes`, which the memory has room for."""
    max_nbytes = min(max_nbytes, fixed)
    try:
        with open_regular(root / name) as stream:
            content = stream.read(max_nbytes + 1)
    except OSError as error:
        raise dangling(root, name) or read_error(f"{quoted(name)} in {quoted(root)}", error) from error
    if len(content) > max_nbytes:
        raise too_long(name, max_nbytes, fixed)
    return content


def too_long(name: str, max_nbytes: int, fixed: int = MAX_JSON_NBYTES) -> StreamReshardError:
    """The error a user sees of a file with more than `max_nbytes`: no such file has more than `fixed`, and where that
    is not reached, it is the limit on memory that is too small."""
    if max_nbytes >= fixed:
        return SourceError(f"{quoted(name)} has more than {fixed} bytes, which no such file has")
    return ResourceError(f"{quoted(name)} has more than {max_nbytes} bytes; parsing it takes many times its size, and "
                         f"--max-memory leaves no more; raise it")


def read_json(root: Path, name: str, max_nbytes: int = MAX_JSON_NBYTES,
              matters: Container[str] | None = None) -> dict[str, Any]:
    """The JSON object in `root / name`. Raises SourceError when it is absent, longer than any, or not an object; where
    a key occurs twice with different values, or holds NaN or an infinity: below the outermost keys that matter, by
    default all. Raises ResourceError where it has more than `max_nbytes`, which the memory has room for."""
    return read_json_with_notes(root, name, max_nbytes, matters)[0]


def read_json_with_notes(root: Path, name: str, max_nbytes: int = MAX_JSON_NBYTES,
                         matters: Container[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """The same, with what is doubtful in it and does not matter."""
    content = read_capped(root, name, max_nbytes)
    try:
        value, faults, doubts = read_json_text(content, matters)
    except ValueError as error:
        raise misplaced(root, name, "JSON") or SourceError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{name} holds a {type(value).__name__}, not an object")
    if faults.texts:
        kind = f"values in {name} are doubtful"
        problems = [SourceError(f"{name}: {text}", kind=kind) for text in faults.texts]
        problems[-1].num_more = faults.num_more
        raise Refused(problems)
    notes = [f"{name}: {text}; it is not read" for text in doubts.texts]
    return value, notes + [f"{name}: {doubts.num_more} more such values are not read"] * bool(doubts.num_more)


def misplaced(root: Path, name: str, wanted: str | None) -> Cause | None:
    """Reason why `root / name` is not what is `wanted`, where its first bytes or its link tell: "weights", "JSON", or
    anything but a pointer of Git LFS."""
    if cause := dangling(root, name):
        return cause
    try:
        with open_regular(root / name) as stream:
            found = stand_in(stream.read(HEAD_NBYTES), wanted)
    except OSError:
        return None
    return Cause(f"{quoted(name)} in {quoted(root)} {found[1]}", kind=found[0]) if found else None


def dangling(root: Path, name: str) -> Cause | None:
    """Reason why a link leads to no file, where `root / name` is such a link."""
    path = root / name
    if not os.path.islink(path) or os.path.exists(path):
        return None
    return Cause(f"{quoted(name)} in {quoted(root)} is a link to {quoted(os.readlink(path))}, which does not exist "
                 f"(the cache was moved or cleaned?); download it again", kind="files are links to nothing")
