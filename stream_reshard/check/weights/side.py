"""One of the two folders that are compared: its manifest, and its checkpoint of any format."""
from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.hugging_face import open_hugging_face
from stream_reshard.check.weights.meta import open_meta
from stream_reshard.check.weights.nanotron import open_nanotron
from stream_reshard.check.weights.token_ids import with_ids_of
from stream_reshard.destination.manifest import StoredManifest, open_manifest
from stream_reshard.errors import Problems, explained
from stream_reshard.formats.causes import no_checkpoint
from stream_reshard.formats.config_json import CONFIG_NAME
from stream_reshard.formats.meta.folder import is_meta
from stream_reshard.formats.nanotron.rules import PADDING, STAGES
from stream_reshard.formats.registry import is_nanotron
from stream_reshard.model.truncation import Truncate, recorded, truncated_like, untruncated
from stream_reshard.options import ALLOWABLE


@dataclass(frozen=True)
class Side:
    """A folder, opened."""

    root: Path
    manifest: StoredManifest | None = None
    """None if the folder has none, or a broken one."""
    checkpoint: Checkpoint | None = None
    """None if nothing in the folder can be compared."""

    @property
    def dtype(self) -> str:
        """The dtype of a cast by the manifest, or `keep`."""
        return self.manifest.facts["dtype"] if self.manifest else "keep"

    @property
    def allowed(self) -> Collection[str]:
        """Names of settings that the conversion accepted, by the manifest."""
        return allowed_by(self.manifest)


def allowed_by(manifest: StoredManifest | None) -> Collection[str]:
    """Names of accepted settings in a manifest, without names that no user can accept."""
    return {*ALLOWABLE, STAGES, PADDING}.intersection(manifest.facts["allowed"] if manifest else ())


def open_copy(root: Path, max_nbytes: int, problems: Problems, allow: Collection[str] = ()) -> Side:
    """Open the copy; see `open_source`. Of its files outside its manifest, few are opened (`open_nanotron`)."""
    return _explained(root, max_nbytes, problems, allow, True, untruncated)


def open_source(root: Path, max_nbytes: int, problems: Problems, allow: Collection[str], copy: Side) -> Side:
    """Open the source; `max_nbytes`: limit on each header and small file. Faults that neither `allow` nor the manifest
    accepts go to `problems`. Of a truncated copy's source, only the layers of the copy are opened."""
    config = copy.checkpoint.config if copy.checkpoint else None
    return _explained(root, max_nbytes, problems, allow, False, partial(truncated_like, copy=config))


def _explained(root: Path, max_nbytes: int, problems: Problems, allow: Collection[str], is_copy: bool,
               truncate: Truncate) -> Side:
    found = Problems()
    side = _opened(root, max_nbytes, found, allow, is_copy, truncate)
    problems.extend(explained(found))
    return side


def _opened(root: Path, max_nbytes: int, problems: Problems, allow: Collection[str], is_copy: bool,
            truncate: Truncate) -> Side:
    if not os.path.isdir(root):
        problems.append(no_checkpoint(root))
        return Side(root)
    manifest = problems.collect(open_manifest, root, max_nbytes)
    if is_nanotron(root):
        facts: Mapping[str, Any] = manifest.facts if manifest else {}
        is_moved = STAGES in {*allow, *allowed_by(manifest)}
        checkpoint = open_nanotron(root, facts.get("vocab_size"), max_nbytes, problems, is_moved,
                                   manifest.files if manifest and is_copy else None,
                                   lambda config: truncate(recorded(config, facts)))
        return Side(root, manifest, checkpoint and with_ids_of(manifest, checkpoint))
    if is_meta(root):
        return Side(root, manifest, open_meta(root, max_nbytes, problems, truncate))
    if os.path.isfile(root / CONFIG_NAME):
        return Side(root, manifest, open_hugging_face(root, max_nbytes, problems, truncate))
    problems.append(no_checkpoint(root))
    return Side(root, manifest)
