"""What speaks against a destination, and what room it has: looked at before anything is written."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stream_reshard.errors import DestinationError, Problems, SourceError, StreamReshardError, quoted
from stream_reshard.layouts.nanotron_config import MODEL_CONFIG_NAME
from stream_reshard.manifest import MANIFEST_NAME, StoredManifest, open_manifest
from stream_reshard.small_files import files_below
from stream_reshard.staging import SUFFIX_NBYTES, replaced_beside, staging_of

_MAX_NAME_NBYTES, _MAX_PATH_NBYTES = 255, 4095
"""NAME_MAX and PATH_MAX of Linux, without the NUL."""

_OF_TRAINING = frozenset({"optimizer", "lr_scheduler", "random"})
_OF_A_CHECKPOINT = _OF_TRAINING | {"model", "config.yaml", "checkpoint_metadata.json", MODEL_CONFIG_NAME, MANIFEST_NAME}
"""Names at the top of a checkpoint, as Nanotron's trainer writes it."""

_BELOW_NBYTES = 256
"""What the path of a weight file has below the destination, at most."""


def destination_problems(source: Path, destination: Path, overwrite: bool) -> Iterator[StreamReshardError]:
    """Everything that speaks against a destination, but for what stands in it (`occupation_problems`)."""
    *above, own = [len(os.fsencode(part)) for part in destination.absolute().parts]
    if max([own + SUFFIX_NBYTES, *above]) > _MAX_NAME_NBYTES:
        yield DestinationError(f"{quoted(destination)}: File name too long: {own} bytes, and {SUFFIX_NBYTES} more for "
                               f"what is put beside it while the run lasts, where {_MAX_NAME_NBYTES} are possible")
        return
    real = destination.resolve()
    if (nbytes := len(os.fsencode(real))) + _BELOW_NBYTES > _MAX_PATH_NBYTES:
        yield DestinationError(f"{quoted(destination)}: File name too long: {nbytes} bytes, and {_BELOW_NBYTES} more "
                               f"for what stands in it, where {_MAX_PATH_NBYTES} are possible")
        return
    if _is_same_or_inside(real, source.resolve()) or _is_same_or_inside(source.resolve(), real):
        yield DestinationError(f"{quoted(destination)} and the source {quoted(source)} are the same folder or one is "
                               f"inside the other; choose another DST")
        return
    if _is_same_or_inside(Path.cwd(), real):
        yield DestinationError(f"{quoted(real)} is the working folder or around it, and a rename would take it away; "
                               f"choose another DST, or go elsewhere first")
        return
    staging, parent = staging_of(real), existing_parent(real)
    for folder in (real, staging, *replaced_beside(real)):
        if _is_same_or_inside(source.resolve(), folder) or any(folder in path.parents for path in _files_of(source)):
            yield DestinationError(f"the source {quoted(source)} or files it links to are in {quoted(folder)}, which "
                                   f"a run for {quoted(destination)} may remove; choose another DST")
            return
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        kind = "is a link" if staging.is_symlink() else "exists and is not a folder"
        yield DestinationError(f"{quoted(staging)} {kind}; the output grows there, remove it")
    if os.path.exists(destination) and not os.path.isdir(destination):
        yield DestinationError(f"{quoted(destination)} exists and is not a folder")
    elif os.path.ismount(real):
        yield DestinationError(f"{quoted(destination)} is a mount point, which no other folder can replace; write to a "
                               f"folder inside it")
    if not parent.is_dir():
        yield DestinationError(f"{quoted(parent)} is not a folder")
    elif not os.access(parent, os.W_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        yield DestinationError(f"{quoted(parent)} cannot be written to")


def occupation_problems(destination: Path, overwrite: bool) -> Iterator[StreamReshardError]:
    """What stands in the destination and may not be replaced."""
    if not os.path.isdir(destination) or not any(destination.iterdir()):
        return
    if not overwrite:
        yield DestinationError(f"{quoted(destination)} is not empty; Nanotron would merge stale files without a word; "
                               f"choose another DST, empty it, or --overwrite it")
        return
    manifest = _manifest_of(destination)
    if manifest is None and not ((destination / MODEL_CONFIG_NAME).is_file() and (destination / "model").is_dir()):
        yield DestinationError(f"{quoted(destination)} is not empty and does not look like a Nanotron checkpoint "
                               f"({MODEL_CONFIG_NAME} and model/), nor was it made by this tool ({MANIFEST_NAME}); "
                               f"--overwrite replaces those only")
    elif strangers := _strangers(destination, manifest):
        yield DestinationError(f"{quoted(destination)} holds {quoted(strangers[0])}, which is no part of a checkpoint "
                               f"and would be lost; move it away")


def _manifest_of(destination: Path) -> StoredManifest | None:
    try:
        return open_manifest(destination)
    except SourceError:
        return None


def _strangers(destination: Path, manifest: StoredManifest | None) -> list[str]:
    """What the manifest does not name, but for what a trainer adds; without a manifest, what stands at the top under a
    name that Nanotron does not give."""
    if manifest is None:
        return sorted({path.name for path in destination.iterdir()} - _OF_A_CHECKPOINT)
    added = (path for path in files_below(destination) if path not in manifest.files and path != MANIFEST_NAME)
    return sorted(path for path in added if path.partition("/")[0] not in _OF_TRAINING)


def refuse_occupied(destination: Path, overwrite: bool) -> None:
    """Raises Refused where something stands in the destination that may not be replaced."""
    problems = Problems()
    problems.extend(occupation_problems(destination, overwrite))
    problems.raise_if_any()


def _files_of(source: Path) -> Iterator[Path]:
    """Where the files of a source really are."""
    for path in source.iterdir() if os.path.isdir(source) else ():
        yield path.resolve()
    for below in files_below(source / "model"):
        yield (source / "model" / below).resolve()


def _is_same_or_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or below it, under whatever name: bind mounts are seen through."""
    if folder in (path, *path.parents):
        return True
    try:
        wanted = folder.stat()
    except OSError:
        return False
    return any(os.path.samestat(parent.stat(), wanted) for parent in (path, *path.parents) if os.path.exists(parent))


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in (*path.parents, path) if os.path.exists(parent))


def disk_free(destination: Path) -> tuple[int, int | None]:
    """(bytes, files) that the destination's disk has room for, what an interrupted run left there included: it is kept
    or thrown away. None where the file system sets no limit on files."""
    status = os.statvfs(existing_parent(destination))
    num_files = nbytes = 0
    staging = staging_of(destination)
    for path in files_below(staging):
        try:
            nbytes += (staging / path).lstat().st_blocks * 512
            num_files += 1
        except FileNotFoundError:
            continue  # Another run is at work there; the lock will say so.
    return status.f_bavail * status.f_frsize + nbytes, status.f_favail + num_files if status.f_files else None
