"""One of the two folders that are compared: its manifest, and its checkpoint, whatever the format."""
from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from stream_reshard.errors import Problems, explained
from stream_reshard.layouts.causes import no_checkpoint
from stream_reshard.layouts.hf_config import CONFIG_NAME
from stream_reshard.layouts.nanotron import STAGES
from stream_reshard.layouts.nanotron_config import is_nanotron
from stream_reshard.manifest import FileDone, Manifest, read_manifest
from stream_reshard.small_files import files_below
from stream_reshard.verify.checkpoint import Checkpoint
from stream_reshard.verify.hugging_face import open_hugging_face
from stream_reshard.verify.nanotron import open_nanotron
from stream_reshard.verify.token_ids import with_ids_of


@dataclass(frozen=True)
class Side:
    """A folder, opened."""

    root: Path
    manifest: Manifest | None = None
    """None where it has none, or a broken one."""
    checkpoint: Checkpoint | None = None
    """None where nothing in it can be compared."""

    @property
    def dtype(self) -> str:
        """What its weights were cast to on their way here, as far as its manifest tells; else `keep`."""
        return self.manifest.facts["dtype"] if self.manifest else "keep"

    @property
    def allowed(self) -> Collection[str]:
        """The settings that were accepted when it was made."""
        return self.manifest.facts["allowed"] if self.manifest else ()

    def told(self, without: Collection[str]) -> Mapping[str, FileDone]:
        """The files of its manifest that are there, by path. A path in a manifest is a name to look up among those
        found, never one to open."""
        found = set(files_below(self.root)) - set(without)
        return {path: file for path, file in (self.manifest.files if self.manifest else {}).items()
                if path in found and (self.root / path).is_file()}


def open_side(root: Path, max_nbytes: int, problems: Problems, allow: Collection[str] = ()) -> Side:
    """Open a folder; everything wrong goes to `problems`, but for what is in `allow` or its manifest accepts. No header
    or small file may have more than `max_nbytes`."""
    found = Problems()
    side = _opened(root, max_nbytes, found, allow)
    problems.extend(explained(found))
    return side


def _opened(root: Path, max_nbytes: int, problems: Problems, allow: Collection[str]) -> Side:
    if not os.path.isdir(root):
        problems.append(no_checkpoint(root))
        return Side(root)
    manifest = problems.collect(read_manifest, root, max_nbytes)
    if os.path.isfile(root / CONFIG_NAME) and not is_nanotron(root):
        return Side(root, manifest, open_hugging_face(root, max_nbytes, problems))
    if is_nanotron(root):
        vocab_size = manifest.facts["vocab_size"] if manifest else None
        is_moved = STAGES in {*allow, *(manifest.facts["allowed"] if manifest else ())}
        checkpoint = open_nanotron(root, vocab_size, max_nbytes, problems, is_moved)
        return Side(root, manifest, checkpoint and with_ids_of(manifest, checkpoint))
    problems.append(no_checkpoint(root))
    return Side(root, manifest)
