"""The manifest: what a finished conversion says of itself, with a digest of every file and of the manifest too.

It stands beside the files (`stream_reshard.json`), never in tensor headers: Nanotron's reader is strict about those.
Its first line is the digest of the rest, so that it cannot change without a trace either.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from stream_reshard.errors import SourceError, quoted
from stream_reshard.header import ITEMSIZE
from stream_reshard.json_text import strict_json
from stream_reshard.model import parse_token_id
from stream_reshard.small_files import read_capped

MANIFEST_NAME = "stream_reshard.json"

MAX_MANIFEST_NBYTES = 64 * 2**20

MAX_FILE_NBYTES = 1024
"""What the manifest says of one file has fewer bytes."""

_DIGEST = re.compile(r"[0-9a-f]{32}")
_FIRST_LINE = re.compile(rb'\{"xxh3_128": "([0-9a-f]{32})",\n')


@dataclass(frozen=True)
class FileDone:
    """A file that is durable under its final name."""

    path: str
    """Relative to the checkpoint's root, with forward slashes."""
    nbytes: int
    xxh3_128: str | None
    """Digest of the whole file, in hex; None where it shares blocks with a source that were not read, or none was
    wanted."""

    @classmethod
    def parsed(cls, value: Any) -> FileDone:
        """From JSON. Raises ValueError where it is not one."""
        kinds = {key: type(item) for key, item in value.items()} if isinstance(value, dict) else {}
        digest = value["xxh3_128"] if kinds.keys() == {"path", "nbytes", "xxh3_128"} else ""
        if (kinds.get("path"), kinds.get("nbytes")) != (str, int) or not isinstance(digest, (str, type(None))):
            raise ValueError(f"{quoted(value)} does not describe a file")
        if digest is not None and not _DIGEST.fullmatch(digest):
            raise ValueError(f"{quoted(value['xxh3_128'])} is not a digest")
        return cls(**value)


@dataclass(frozen=True)
class Manifest:
    """What is known of a conversion beyond its output."""

    run: Mapping[str, Any]
    """What made it: digests of the plan and of the documents, identities of the source files. Equal for equal runs."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the output itself cannot say: its vocabulary without padding, the dtype asked for, what was allowed."""
    files: Mapping[str, FileDone] = field(default_factory=dict)
    """Every file of the folder but this one, by its path."""

    def packed(self) -> bytes:
        """The file's content."""
        files = [asdict(self.files[path]) for path in sorted(self.files)]
        rest = json.dumps({"tool": "stream_reshard", "run": self.run, "facts": self.facts, "files": files},
                          indent=1)[2:].encode() + b"\n"
        return b'{"xxh3_128": "%s",\n' % xxhash.xxh3_128(rest).hexdigest().encode() + rest


def with_files(manifest: Manifest, files: Iterable[FileDone]) -> Manifest:
    """The same manifest of these files."""
    return Manifest(manifest.run, manifest.facts, {file.path: file for file in files})


def same_run(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Two records of runs tell of the same run: their paths are for people only, as a remount changes them."""
    return _without_paths(one) == _without_paths(other)


def _without_paths(run: Mapping[str, Any]) -> dict[str, Any]:
    copied = run.get("copied")
    return {**run, "source": None, "copied": sorted(copied.values(), key=repr) if isinstance(copied, dict) else None}


def read_manifest(root: Path, max_nbytes: int = MAX_MANIFEST_NBYTES) -> Manifest | None:
    """The manifest of a folder; None where it has none. Raises SourceError where it is not what was written."""
    if not os.path.lexists(root / MANIFEST_NAME):
        return None
    content = read_capped(root, MANIFEST_NAME, max_nbytes)
    match = _FIRST_LINE.match(content)
    if not match or xxhash.xxh3_128(memoryview(content)[match.end():]).hexdigest() != match[1].decode():
        raise SourceError(f"{MANIFEST_NAME} in {quoted(root)} does not have its own digest: it was damaged or edited")
    try:
        value = strict_json(content)
        files = [FileDone.parsed(file) for file in value["files"]]
        return with_files(Manifest(dict(value["run"]), _checked(dict(value["facts"]))), files)
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{MANIFEST_NAME} in {quoted(root)} is not one of this version: {error}") from error


def _checked(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts, each of its kind. Raises ValueError."""
    vocab_size, allowed = facts.get("vocab_size"), facts.get("allowed")
    if not (type(vocab_size) is int and 0 < vocab_size < 2**48 and isinstance(facts.get("dtype"), str)
            and isinstance(allowed, list) and all(isinstance(name, str) for name in allowed)):
        raise ValueError(f"{quoted(facts)} are not the facts of a conversion")
    for value in dict(facts.get("token_ids", {})).values():
        parse_token_id(value)
    if facts.get("router_dtype") not in (None, *ITEMSIZE):
        raise ValueError(f"{quoted(facts['router_dtype'])} is not a dtype")
    return facts
