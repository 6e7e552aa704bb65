"""A folder held open, and the modes of files and folders made below it.

New entries are made in the folder that was opened, even if it was renamed since. Once that folder is removed, making an
entry fails, even if somebody made another folder under its path.
"""
from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE})
"""errno values of opening the path of a folder that was removed."""


@dataclass(frozen=True)
class Access:
    """Most permission bits of new files and folders; the umask takes away from them. The owner's are always set."""

    files: int = 0o666
    folders: int = 0o777

    def __and__(self, other: Access) -> Access:
        return Access(self.files & other.files, self.folders & other.folders)

    @classmethod
    def of_file(cls, mode: int) -> Access:
        """Access of group and others as a file of this mode gives them. Who may read files may also enter folders."""
        others = mode & 0o066
        return cls(0o600 | others, 0o700 | others | (others & 0o044) >> 2)

    @classmethod
    def of_folder(cls, mode: int) -> Access:
        """Access of group and others as a folder of this mode gives them. Who may not enter folders may not read or
        write files."""
        if_entering = 6 * (mode & 0o011)
        return cls(0o600 | mode & if_entering, 0o700 | mode & 0o077)


class Folder:
    """A folder held open. Picklable: another process opens it by its path."""

    descriptor = -1

    def __init__(self, path: Path, access: Access = Access()):
        """Raises OSError if `path` is absent, a link, or no folder."""
        self.path, self.access = path, access
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def __reduce__(self) -> tuple[type[Folder], tuple[Path, Access]]:
        return Folder, (self.path, self.access)

    def make(self, path: str) -> None:
        """Make the folder `path` below this one, and the missing folders between. Raises OSError."""
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
        """Remove the file `path` below this folder, if it exists. Raises OSError."""
        with suppress(FileNotFoundError):
            os.unlink(path, dir_fd=self.descriptor)

    def is_there(self) -> bool:
        """True if the path still names this folder. The path is opened, as only that asks the server of a network file
        system."""
        try:
            now = Folder(self.path)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        return os.path.samestat(os.fstat(self.descriptor), os.fstat(now.descriptor))

    def close(self) -> None:
        """Close the descriptor."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close
