"""A folder that is held open, and who may enter what is made below it.

What is made lands in the folder that was opened, under whatever name it stands now. Once it is removed nothing lands
anywhere: another folder that somebody makes under its path is not written to.
"""
from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE})
"""Errors of opening the path of a folder that is not there any more."""


@dataclass(frozen=True)
class Access:
    """Modes that new files and folders have at most; the umask takes away from them as ever. The owner's bits stay."""

    files: int = 0o666
    folders: int = 0o777

    def __and__(self, other: Access) -> Access:
        return Access(self.files & other.files, self.folders & other.folders)

    @classmethod
    def of_file(cls, mode: int) -> Access:
        """No more for group and others than a file of this mode lets them do; who may read may enter folders."""
        shared = mode & 0o066
        return cls(0o600 | shared, 0o700 | shared | (shared & 0o044) >> 2)

    @classmethod
    def of_folder(cls, mode: int) -> Access:
        """No more for group and others than a folder of this mode lets them do; who may not enter may not read."""
        entered = sum(6 * one for one in (0o010, 0o001) if mode & one)
        return cls(0o600 | mode & entered, 0o700 | mode & 0o077)


class Folder:
    """A folder held open. Picklable: another process opens it by its path."""

    descriptor = -1

    def __init__(self, path: Path, access: Access = Access()):
        """Raises OSError where it is absent, or a link."""
        self.path, self.access = path, access
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def __reduce__(self) -> tuple[type[Folder], tuple[Path, Access]]:
        return Folder, (self.path, self.access)

    def make(self, path: str) -> None:
        """Make the folder `path` below this one, and those between. Raises OSError."""
        try:
            self._make(path)
        except FileNotFoundError:
            above = path.rpartition("/")[0]
            if not above:
                raise  # This folder itself is gone.
            self.make(above)
            self._make(path)

    def _make(self, path: str) -> None:
        with suppress(FileExistsError):
            os.mkdir(path, self.access.folders, dir_fd=self.descriptor)

    def unlink(self, path: str) -> None:
        """Remove the file `path` below this one, if it is there. Raises OSError."""
        with suppress(FileNotFoundError):
            os.unlink(path, dir_fd=self.descriptor)

    def is_there(self) -> bool:
        """True while its path still names it. The path is opened: that asks the server where a file system has one."""
        try:
            now = Folder(self.path)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        return os.path.samestat(os.fstat(self.descriptor), os.fstat(now.descriptor))

    def close(self) -> None:
        """Let it go."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close
