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
from stream_reshard.json_text import read_json_text
from stream_reshard.stand_ins import HEAD_NBYTES, stand_in

MAX_JSON_NBYTES = 10 * 2**20
"""Cap on config and index files, as huggingface_hub has for an index."""

_MAY_PASS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE,
                       errno.ENOMEM})
"""What says that a file cannot be read now, rather than never."""

_SILLY_NAME = re.compile(r"\.nfs[0-9a-f]{24}", re.ASCII)
"""Names that NFS gives removed files that are still open (nfs_sillyrename in Linux, fs/nfs/dir.c)."""


def read_error(name: str, error: OSError) -> StreamReshardError:
    """The error a user sees when a file cannot be read: ResourceError where it may be readable later."""
    kind = ResourceError if error.errno in _MAY_PASS else SourceError
    return kind(f"{name}: {error.strerror}")


def open_regular(path: Path) -> BinaryIO:
    """A file opened for reading, links followed. OSError for what is no file: a pipe would make us wait for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return os.fdopen(descriptor, "rb")


def files_below(root: Path) -> Iterator[str]:
    """Paths, relative and with forward slashes, of everything below a folder that is not a folder itself. What NFS
    keeps of removed files that are still open (`.nfs...`) is not there."""
    for folder, names, files in os.walk(root):
        links = [name for name in names if os.path.islink(os.path.join(folder, name))]
        for name in sorted(files + links):
            if not _SILLY_NAME.fullmatch(name):
                yield os.path.relpath(os.path.join(folder, name), root)


def read_capped(root: Path, name: str, max_nbytes: int) -> bytes:
    """The content of `root / name`. Raises SourceError where it cannot be read or has more than `max_nbytes`."""
    try:
        with open_regular(root / name) as stream:
            content = stream.read(max_nbytes + 1)
    except OSError as error:
        raise dangling(root, name) or read_error(f"{quoted(name)} in {quoted(root)}", error) from error
    if len(content) > max_nbytes:
        raise too_long(name, max_nbytes)
    return content


def too_long(name: str, max_nbytes: int) -> SourceError:
    """The error a user sees of a file with more than `max_nbytes`."""
    return SourceError(f"{quoted(name)} has more than {max_nbytes} bytes, the limit for such a file; parsing one takes "
                       f"many times its size, so a larger --max-memory may raise it")


def read_json(root: Path, name: str, max_nbytes: int = MAX_JSON_NBYTES,
              matters: Container[str] | None = None) -> dict[str, Any]:
    """The JSON object in `root / name`. Raises SourceError when it is absent, too large, or not an object; where a key
    occurs twice with different values, or holds NaN or an infinity: below the outermost keys that matter, by default
    all."""
    return read_json_with_notes(root, name, max_nbytes, matters)[0]


def read_json_with_notes(root: Path, name: str, max_nbytes: int = MAX_JSON_NBYTES,
                         matters: Container[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """The same, with what is doubtful in it and does not matter."""
    content = read_capped(root, name, min(max_nbytes, MAX_JSON_NBYTES))
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
    """Why `root / name` is not what is `wanted`, where its first bytes or its link tell: "weights", "JSON", or anything
    but a pointer of Git LFS."""
    if cause := dangling(root, name):
        return cause
    try:
        with open_regular(root / name) as stream:
            found = stand_in(stream.read(HEAD_NBYTES), wanted)
    except OSError:
        return None
    return Cause(f"{quoted(name)} in {quoted(root)} {found[1]}", kind=found[0]) if found else None


def dangling(root: Path, name: str) -> Cause | None:
    """Why a link leads to no file, where `root / name` is such a link."""
    path = root / name
    if not os.path.islink(path) or os.path.exists(path):
        return None
    return Cause(f"{quoted(name)} in {quoted(root)} is a link to {quoted(os.readlink(path))}, which does not exist "
                 f"(the cache was moved or cleaned?); download it again", kind="files are links to nothing")
