"""Checks of a source against sha256 sums made elsewhere: only these show damage from before the conversion."""
from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from stream_reshard.errors import SourceError, StreamReshardError, UsageError, quoted
from stream_reshard.machine.stop import Stop
from stream_reshard.storage.small_files import open_regular
from stream_reshard.storage.source_file import digest_of

CACHE = "cache"
"""Value of --source-sha256 for a Hugging Face cache: the sums are the names of the blobs that its links lead to."""

MAX_SUMS_NBYTES = 10 * 2**20

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
_BLOB = re.compile(r"[0-9a-f]{64}")


def expected_sums(root: Path, names: Collection[str], origin: str) -> dict[str, str]:
    """Expected sha256 by file name, for those of `names` that have one; `origin`: a file of sums, or CACHE. Raises
    UsageError for an origin without any of them."""
    if origin == CACHE:
        targets = {name: os.path.basename(os.readlink(root / name)) for name in names if (root / name).is_symlink()}
        sums = {name: blob for name, blob in targets.items() if _BLOB.fullmatch(blob)}
    else:
        sums = {name: digest for name, digest in _read_sums(Path(origin)).items() if name in names}
    if not sums:
        raise UsageError(f"--source-sha256 {quoted(origin)} gives no sum for any of the {len(names)} files")
    return sums


def _read_sums(path: Path) -> dict[str, str]:
    try:
        with open_regular(path) as stream:
            content = stream.read(MAX_SUMS_NBYTES + 1)
    except OSError as error:
        raise UsageError(f"--source-sha256 {quoted(path)}: {error.strerror}") from error
    if len(content) > MAX_SUMS_NBYTES:
        raise UsageError(f"--source-sha256 {quoted(path)} has more than {MAX_SUMS_NBYTES} bytes")
    text = content.decode(errors="replace")
    sums: dict[str, str] = {}
    for match in filter(None, map(_LINE.fullmatch, text.splitlines())):
        if sums.setdefault(match[2], match[1].lower()) != match[1].lower():
            raise UsageError(f"--source-sha256 {quoted(path)} gives two sums for {quoted(match[2])}")
    return sums


def sum_problems(root: Path, names: Sequence[str], sums: Mapping[str, str],
                 stop: Stop) -> Iterator[StreamReshardError]:
    """An error for each file with another sum than expected, and for each of `names` without an expected sum."""
    buffer = memoryview(bytearray(2**20))
    for name in dict.fromkeys([*names, *sums]):
        if name not in sums:
            yield SourceError(f"{quoted(name)} has no sum in --source-sha256")
        elif (found := digest_of(root, name, buffer, stop, hashlib.sha256)) != sums[name]:
            yield SourceError(f"{quoted(name)} has the sha256 {found}, but {sums[name]} is expected: it was damaged or "
                              f"is another file")
