"""Checking a source against sha256 sums made elsewhere: the only way to notice that it was damaged before we saw it."""
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
"""Instead of a file's name: take the sums from the names of the blobs that a Hugging Face cache links to."""

MAX_SUMS_NBYTES = 10 * 2**20

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")
_BLOB = re.compile(r"[0-9a-f]{64}")


def expected_sums(root: Path, names: Collection[str], told: str) -> dict[str, str]:
    """sha256 by file name, for those of `names` that have one. Raises UsageError where `told` gives none at all."""
    if told == CACHE:
        targets = {name: os.path.basename(os.readlink(root / name)) for name in names if (root / name).is_symlink()}
        sums = {name: blob for name, blob in targets.items() if _BLOB.fullmatch(blob)}
    else:
        sums = {name: digest for name, digest in _read_sums(Path(told)).items() if name in names}
    if not sums:
        raise UsageError(f"--source-sha256 {quoted(told)} gives no sum for any of the {len(names)} files")
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
    """Files that do not have the sum they should have, and shards (`names`) for which none is given."""
    buffer = memoryview(bytearray(2**20))
    for name in dict.fromkeys([*names, *sums]):
        if name not in sums:
            yield SourceError(f"{quoted(name)} has no sum in --source-sha256")
        elif (found := digest_of(root, name, buffer, stop, hashlib.sha256)) != sums[name]:
            yield SourceError(f"{quoted(name)} has the sha256 {found}, but {sums[name]} is expected: it was damaged or "
                              f"is another file")
