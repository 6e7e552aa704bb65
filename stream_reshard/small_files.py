"""Small files that somebody else made: opened without waiting, read up to a cap, parsed strictly."""
from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from stream_reshard.errors import ResourceError, SourceError, StreamReshardError, quoted

MAX_JSON_NBYTES = 10 * 2**20
"""Cap on config and index files, as huggingface_hub has for an index."""

_MAY_PASS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE, errno.ENFILE,
                       errno.ENOMEM})
"""What says that a file cannot be read now, rather than never."""


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
            if not name.startswith(".nfs"):
                yield os.path.relpath(os.path.join(folder, name), root)


def read_capped(root: Path, name: str, max_nbytes: int, fixed: int = MAX_JSON_NBYTES) -> bytes:
    """The content of `root / name`. Raises SourceError where it cannot be read or has more than `fixed` bytes, which no
    such file has; ResourceError where it has more than `max_nbytes`, which the memory has room for."""
    max_nbytes = min(max_nbytes, fixed)
    try:
        with open_regular(root / name) as stream:
            content = stream.read(max_nbytes + 1)
    except OSError as error:
        raise read_error(f"{quoted(name)} in {quoted(root)}", error) from error
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


def read_json(root: Path, name: str, max_nbytes: int = MAX_JSON_NBYTES) -> dict[str, Any]:
    """The JSON object in `root / name`. Raises SourceError when it is absent, longer than any, or not an object,
    ResourceError where it has more than `max_nbytes`, which the memory has room for."""
    content = read_capped(root, name, max_nbytes)
    try:
        value = strict_json(content)
    except ValueError as error:
        raise SourceError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{name} holds a {type(value).__name__}, not an object")
    return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that may stand there")


STRICT: Mapping[str, Any] = {"object_pairs_hook": _no_twins, "parse_constant": _no_constant}
"""For Python's reader: without its extensions NaN and Infinity, and no key twice."""


def strict_json(text: bytes) -> Any:
    """JSON without the extensions of Python's reader: no NaN or Infinity, no key twice. Raises ValueError."""
    try:
        return json.loads(text.decode("utf-8"), **STRICT)
    except RecursionError as error:
        raise ValueError(str(error)) from error
