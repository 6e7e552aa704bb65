"""Small files made by others: opened without waiting, read up to a limit, parsed with care."""
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
"""Limit on config and index files; that of huggingface_hub for an index."""

_TRANSIENT_ERRNOS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE,
                               errno.ENOMEM})
"""errno values after which reading may succeed later."""

_MAX_DEPTH = 64
"""Most levels of folders; a checkpoint of Nanotron has some ten."""

_SILLY_RENAME = re.compile(r"\.nfs[0-9a-f]{24}")
"""Name that NFS gives to a file that was removed while open: 16 digits of the file, 8 of a counter
(fs/nfs/unlink.c)."""

_LITTER = re.compile(r"\._.*|\.DS_Store|\.localized|(?i:thumbs\.db|ehthumbs\.db|desktop\.ini)", re.DOTALL)
_LITTER_FOLDERS = frozenset({"__MACOSX", ".AppleDouble", ".Spotlight-V100", ".Trashes", ".fseventsd", "@eaDir"})
"""Names of files and folders that desktops and network drives add on their own: macOS, Windows, NAS devices."""


def is_silly_rename(name: str) -> bool:
    """True for a name under which NFS keeps a removed file that is still open."""
    return _SILLY_RENAME.fullmatch(name) is not None


def is_litter(path: str) -> bool:
    """True for the path of a file that a desktop or network drive added on its own."""
    *folders, name = path.split("/")
    return bool(_LITTER.fullmatch(name)) or not _LITTER_FOLDERS.isdisjoint(folders)


def read_error(name: str, error: OSError, kind: type[StreamReshardError] = SourceError) -> StreamReshardError:
    """The error for a file or folder that cannot be read: ResourceError if it may be readable later, else `kind`."""
    return (ResourceError if error.errno in _TRANSIENT_ERRNOS else kind)(f"{name}: {error.strerror}")


def real_path(path: Path) -> Path:
    """A path, absolute and with links resolved as far as they exist. Unlike Path.resolve it accepts a link that leads
    back to itself; opening that fails."""
    return Path(os.path.realpath(path))


def open_regular(path: Path) -> BinaryIO:
    """A file opened for reading; links are followed. Raises OSError also for a pipe, device or folder: reading a pipe
    could wait for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return os.fdopen(descriptor, "rb")


def files_below(root: Path, kind: type[StreamReshardError] = SourceError) -> Iterator[str]:
    """Relative paths, with forward slashes, of all entries below a folder that are not folders. Links are not followed;
    removed files that NFS keeps while they are open are left out; an absent folder holds nothing.

    Raises `kind` for a folder that may not be read, or that is nested deeper than `_MAX_DEPTH`.
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
            return [], []  # Absent, or no folder.
        raise read_error(quoted(root / below), error, kind) from error
    return names


def check_readable(root: Path) -> None:
    """Raises SourceError for a folder that may not be read or entered."""
    if os.path.isdir(root) and not os.access(root, os.R_OK | os.X_OK):
        raise SourceError(f"{quoted(root)}: {os.strerror(errno.EACCES)}")


def names_in(root: Path) -> Iterator[str]:
    """The names in a folder, in no order. Raises SourceError if the folder cannot be read."""
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
    """The content of `root / name`. Raises SourceError if it cannot be read, or is longer than `fixed` bytes, the limit
    of such files; ResourceError if it is longer than `max_nbytes`, the room in memory."""
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
    """The error for a file of more than `max_nbytes`, the room in memory; of such a file no honest one has more than
    `fixed` bytes."""
    if max_nbytes >= fixed:
        return SourceError(f"{quoted(name)} has more than {fixed} bytes, the limit for such a file")
    return ResourceError(f"{quoted(name)} has more than {max_nbytes} bytes, all that can be parsed within --max-memory "
                         f"(parsing takes many times the size); raise it")


def read_json(root: Path, name: str, max_nbytes: int = MAX_JSON_NBYTES,
              matters: Container[str] | None = None) -> dict[str, Any]:
    """The JSON object in `root / name`. Raises SourceError if the file is absent, too long, or no object, and Refused
    for doubtful values that matter (see `read_json_text`); ResourceError if it has more than `max_nbytes`, the room in
    memory."""
    return read_json_with_notes(root, name, max_nbytes, matters)[0]


def read_json_with_notes(root: Path, name: str, max_nbytes: int = MAX_JSON_NBYTES,
                         matters: Container[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """(JSON object, notes on doubtful values that do not matter); raises as `read_json` does."""
    content = read_capped(root, name, max_nbytes)
    try:
        value, faults, others = read_json_text(content, matters)
    except ValueError as error:
        raise misplaced(root, name, "JSON") or SourceError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{name} holds a {type(value).__name__}, not an object")
    if faults.texts:
        kind = f"values in {name} are doubtful"
        problems = [SourceError(f"{name}: {text}", kind=kind) for text in faults.texts]
        problems[-1].num_more = faults.num_more
        raise Refused(problems)
    notes = [f"{name}: {text}; it is not read" for text in others.texts]
    return value, notes + [f"{name}: {others.num_more} more such values are not read"] * bool(others.num_more)


def misplaced(root: Path, name: str, wanted: str | None) -> Cause | None:
    """The cause if `root / name` is a link to nothing, or something else stands in its place by its first bytes.
    `wanted`: "weights", "JSON", or None for any file that is no Git LFS pointer."""
    if cause := dangling(root, name):
        return cause
    try:
        with open_regular(root / name) as stream:
            found = stand_in(stream.read(HEAD_NBYTES), wanted)
    except OSError:
        return None
    return Cause(f"{quoted(name)} in {quoted(root)} {found[1]}", kind=found[0]) if found else None


def dangling(root: Path, name: str) -> Cause | None:
    """The cause if `root / name` is a link to nothing."""
    path = root / name
    if not os.path.islink(path) or os.path.exists(path):
        return None
    return Cause(f"{quoted(name)} in {quoted(root)} is a link to {quoted(os.readlink(path))}, which does not exist "
                 f"(was the cache moved or cleaned?); download it again", kind="files are links to nothing")
