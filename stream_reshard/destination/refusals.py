"""Reasons to refuse a destination, and the free space on its disk; both are found before anything is written."""
from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from stream_reshard.destination.journal import JOURNAL_NAME, Record, read_done
from stream_reshard.destination.manifest import MANIFEST_NAME, open_manifest
from stream_reshard.destination.removal import Naming, removal_problems
from stream_reshard.destination.staging import SUFFIX_NBYTES, as_json, manifest_of, replaced_beside, staging_of
from stream_reshard.errors import DestinationError, Problems, SourceError, StreamReshardError, quoted
from stream_reshard.storage.durable import target_error
from stream_reshard.storage.small_files import files_below, links_in, real_path

_MAX_NAME_NBYTES, _MAX_PATH_NBYTES = 255, 4095
"""NAME_MAX and PATH_MAX of Linux, without the NUL."""

_BELOW_NBYTES = 256
"""Most bytes of the path of a file below the destination."""


def destination_problems(source: Path, destination: Path) -> Iterator[StreamReshardError]:
    """Problems of the path of a destination; `occupation_problems` has those of its contents."""
    if fault := _path_fault(destination):
        yield DestinationError(f"{quoted(destination)}: {fault}")
        return
    real, origin = real_path(destination), real_path(source)
    if _is_same_or_inside(real, origin) or _is_same_or_inside(origin, real):
        yield DestinationError(f"{quoted(destination)} and the source {quoted(source)} are the same folder or one is "
                               f"inside the other; choose another DST")
        return
    if _holds_working_folder(real):
        yield DestinationError(f"{quoted(real)} is or holds the working folder, which a rename would move; choose "
                               f"another DST, or change to another folder first")
        return
    staging, parent = staging_of(real), existing_parent(real)
    if folder := _removable_source(origin, (real, staging, *replaced_beside(real))):
        yield DestinationError(f"the source {quoted(source)} or a file that it links to is in {quoted(folder)}, which "
                               f"a run for {quoted(destination)} may remove; choose another DST")
        return
    if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
        kind = "is a link" if staging.is_symlink() else "exists and is not a folder"
        yield DestinationError(f"{quoted(staging)} {kind}; the output needs that name, remove it")
    if os.path.exists(destination) and not os.path.isdir(destination):
        yield DestinationError(f"{quoted(destination)} exists and is not a folder")
    elif os.path.ismount(real):
        yield DestinationError(f"{quoted(destination)} is a mount point, which no folder can replace; choose a "
                               f"folder inside it as DST")
    if not parent.is_dir():
        yield DestinationError(f"{quoted(parent)} is not a folder")
    elif not os.access(parent, os.W_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        yield DestinationError(f"{quoted(parent)} cannot be written to")


def num_kept_in(destination: Path, record: Record) -> int:
    """Number of files that an earlier attempt at this run has left in the staging folder, as its journal names them.
    Raises DestinationError where it holds another run, or one that failed."""
    staging = staging_of(destination)
    if staging.is_symlink() or (staging / JOURNAL_NAME).is_symlink() or not staging.is_dir():
        return 0  # The run refuses links, in words of its own.
    record = replace(record, run=as_json(record.run))
    try:
        manifest = manifest_of(staging, record.run, record.max_files)
        return len(manifest.files if manifest else read_done(staging, record).files)
    except OSError as error:
        raise target_error(staging, error) from error


def occupation_problems(destination: Path, overwrite: bool, naming: Naming) -> Iterator[StreamReshardError]:
    """Problems of entries in the destination, or beside it, that may not be replaced or removed."""
    for folder in replaced_beside(destination):
        yield from removal_problems(folder, naming, "the removal of replaced folders")
    if not os.path.isdir(destination) or not any(destination.iterdir()):
        return
    if not overwrite:
        yield DestinationError(f"{quoted(destination)} is not empty, and Nanotron would silently merge its old files; "
                               f"choose another DST, empty it, or --overwrite it")
    elif naming.is_checkpoint(destination) or _has_manifest(destination):
        yield from removal_problems(destination, naming, "--overwrite")
    else:
        yield DestinationError(f"{quoted(destination)} is not empty and does not look like a Nanotron checkpoint "
                               f"(model_config.json and model/), nor was it made by this tool ({MANIFEST_NAME}); "
                               f"--overwrite replaces those only")


def _has_manifest(destination: Path) -> bool:
    try:
        return open_manifest(destination) is not None
    except SourceError:
        return False


def refuse_occupied(destination: Path, overwrite: bool, naming: Naming) -> None:
    """Raises Refused if there are `occupation_problems`."""
    problems = Problems()
    problems.extend(occupation_problems(destination, overwrite, naming))
    problems.raise_if_any()


def _path_fault(destination: Path) -> str | None:
    """Fault of the path of a destination: it is too long, holds a link that leads back to itself, or a folder that may
    not be entered."""
    *above, own = [len(os.fsencode(part)) for part in destination.absolute().parts]
    if max([own + SUFFIX_NBYTES, *above]) > _MAX_NAME_NBYTES:
        return (f"File name too long: {own} bytes, and {SUFFIX_NBYTES} more for folders beside it during the run; the "
                f"limit is {_MAX_NAME_NBYTES}")
    if (nbytes := len(os.fsencode(real_path(destination)))) + _BELOW_NBYTES > _MAX_PATH_NBYTES:
        return (f"File name too long: {nbytes} bytes, and {_BELOW_NBYTES} more for files in it; the limit is "
                f"{_MAX_PATH_NBYTES}")
    try:
        os.stat(destination)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror
    return None


def _holds_working_folder(path: Path) -> bool:
    try:
        return _is_same_or_inside(Path.cwd(), path)
    except FileNotFoundError:
        return False  # The working folder was removed.


def _links_of(source: Path) -> Iterator[Path]:
    """Targets of the links in a source."""
    if os.path.isdir(source):
        below = (f"model/{path}" for path in files_below(source / "model"))
        names = chain(links_in(source), (path for path in below if os.path.islink(source / path)))
        yield from (real_path(source / name) for name in names)


def _removable_source(source: Path, folders: Collection[Path]) -> Path | None:
    """The first of these folders that holds the source, or a file that the source links to."""
    holding = (folder for folder in folders if _is_same_or_inside(source, folder))
    linked = (folder for path in _links_of(source) for folder in folders if folder in path.parents)
    return next(chain(holding, linked), None)


def _is_same_or_inside(path: Path, folder: Path) -> bool:
    """True if `path` is `folder` or below it, also through a bind mount."""
    if folder in (path, *path.parents):
        return True
    try:
        wanted = folder.stat()
    except OSError:
        return False
    return any(os.path.samestat(parent.stat(), wanted) for parent in (path, *path.parents) if os.path.exists(parent))


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(parent for parent in (*path.parents, path) if os.path.exists(parent))


def disk_free(destination: Path) -> tuple[int, int | None]:
    """(bytes, files) free on the disk of the destination; None if the file system has no limit on files. Files of an
    interrupted run count as free: this run uses or removes them."""
    status = os.statvfs(existing_parent(destination))
    num_files = nbytes = 0
    staging = staging_of(destination)
    for path in files_below(staging, DestinationError):
        try:
            nbytes += (staging / path).lstat().st_blocks * 512
            num_files += 1
        except FileNotFoundError:
            continue  # Another run writes there, as the lock will report.
    return status.f_bavail * status.f_frsize + nbytes, status.f_favail + num_files if status.f_files else None
