"""Lock: one run at a time writes to a destination.

A lock file beside the destination names the process that writes. If that process lives in this process namespace, the
lock is taken, even if flock on the file succeeds: two mounts of one folder need not see each other's locks. If it is of
another namespace of this machine, such as a container's, flock decides on a local file system: the kernel frees it with
the process. If it is of another machine, only a person knows if that run is dead (`--break-lock`).

Before each commit a run checks, by a random token in the file, that the lock is still its own.

The file also holds a note: the folder that the run is about to rename to the destination. After a stop between two
renames, the next run knows by the note which folder is the new one.
"""
from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from stream_reshard.errors import DestinationError, LockedError, quoted
from stream_reshard.machine.kernel import NETWORK_FILE_SYSTEMS, file_system_of
from stream_reshard.storage.durable import sync_folder, target_error, temp_name, write_all

_RECORD_NBYTES, _BEGINNING = 1024, b'{"pid": '
"""Size of the record in a lock file, and its first bytes."""

_CANNOT_LOCK = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""errno values of flock on network file systems without a lock service."""

_MINE: set[str] = set()
"""Tokens of the locks that this process holds."""


def _boot() -> str:
    """Identifier of this boot of the machine; "" if the kernel does not report it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    """Identifier of the process namespace (pid_namespaces(7)); "" if the kernel does not report it."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Start of a process, in ticks since the boot; 0 for a zombie; None if the kernel does not report it (proc(5),
    /proc/PID/stat, fields 3 and 22)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _is_alive(pid: int, started: int | None) -> bool:
    """True if the process of this namespace that began at `started` lives, and not a later one of the same number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    now = _started(pid)
    return now != 0 and (None in (now, started) or now == started)


def _shares_locks(path: Path) -> bool:
    """True if all processes of this kernel see each other's flocks at a path, through any mount."""
    kind = file_system_of(path)
    return kind not in NETWORK_FILE_SYSTEMS and kind != "unknown" and not kind.startswith("fuse")


def is_foreign(status: os.stat_result, folder: Path) -> bool:
    """True if an entry of a folder belongs to another user than new files there. A server may give new files to another
    user than the one of this process, so a file is made to see it. Raises OSError."""
    if status.st_uid == os.geteuid():
        return False
    temp = folder / temp_name("owner")
    descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        return status.st_uid != os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
        os.unlink(temp)


class Lock:
    """A context that holds the lock. Entering it raises LockedError, with the other run's process, if it is taken."""

    def __init__(self, path: Path, break_lock: bool = False):
        """`break_lock`: take the lock from a run that may be alive on another machine."""
        self.path, self.break_lock = path, break_lock
        self._descriptor = -1
        self._mine: dict[str, Any] = {}
        self._is_written = False
        self.note: list[int] | None = None
        """The note in the file: that of this run, or of the stopped run before it."""

    def __enter__(self) -> Lock:
        try:
            while not self._taken():
                pass
        except OSError as error:
            if self._descriptor >= 0:
                self.__exit__(type(error), error, None)
            raise target_error(self.path, error) from error
        return self

    def _taken(self) -> bool:
        """One attempt to take the lock; False if the file was removed meanwhile. Raises LockedError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor, is_new = os.open(self.path, flags | os.O_EXCL, 0o666), True
        except FileExistsError:
            descriptor, is_new = os.open(self.path, flags, 0o666), False
        try:
            is_locked = self._flock(descriptor)
            if not self._is_current(descriptor):
                return False
            owner = _owner(descriptor, self.path)
            is_alive = is_locked is False or _is_here_and_alive(owner)
            if is_alive or not (is_new or self._is_over(owner, is_locked)):
                raise _refusal(self.path, owner, is_alive)
            if not is_new and is_foreign(os.fstat(descriptor), self.path.parent):
                raise DestinationError(f"{quoted(self.path)} belongs to user {os.fstat(descriptor).st_uid}; remove "
                                       f"it if that user's run is over")
            self._mine = {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname(),
                          "boot": _boot(), "pids": _namespace(), "token": os.urandom(16).hex(),
                          "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            _MINE.add(self._mine["token"])
            self._descriptor, descriptor = descriptor, -1
            self.write_note(owner.get("note"))
            return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def write_note(self, note: list[int] | None) -> None:
        """Write the record of this run and a note, durably if there is one, for the next run after a stop."""
        self.note = note
        content = json.dumps(self._mine | {"note": note}).encode().ljust(_RECORD_NBYTES)
        write_all(self._descriptor, content, 0)  # The size is always the same, so that one record covers the other.
        self._is_written = True
        if note:
            os.fsync(self._descriptor)
            sync_folder(self.path.parent)

    @staticmethod
    def _flock(descriptor: int) -> bool | None:
        """True: the kernel gave the lock. False: another process holds it. None: the file system has no locks."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _CANNOT_LOCK:
                return None
            raise

    def _is_current(self, descriptor: int) -> bool:
        """True if the path still names the file that was opened: a run removes its lock file at its end."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _is_over(self, owner: Mapping[str, Any], is_locked: bool | None) -> bool:
        """True if the run that wrote the file has certainly ended, or `break_lock` is set. The caller has found no such
        process alive in this namespace."""
        if self.break_lock:
            return True
        is_free = is_locked is True and _shares_locks(self.path.parent)
        if not owner:
            return is_free
        if not (owner.get("boot") and _boot()):
            return False
        if owner["boot"] == _boot():
            return is_free or owner.get("pids", _namespace()) == _namespace()
        return owner.get("host") == socket.gethostname()  # The same machine, after a reboot.

    @property
    def uid(self) -> int:
        """The user to whom the lock file belongs, and so all new files beside it."""
        return os.fstat(self._descriptor).st_uid

    def is_ours(self) -> bool:
        """True if the path still names the file of this run, with its token. Raises OSError."""
        return self._seen() is None

    def confirm(self) -> None:
        """Raises LockedError, with the other run's process, if this run has lost the lock."""
        try:
            other = self._seen()
        except OSError as error:
            raise target_error(self.path, error) from error
        if other is not None:
            how = f" to {_who(other)}" if other else ", which somebody removed or replaced"
            raise LockedError(f"{quoted(self.path)}: this run has lost its lock{how}; nothing was committed, and the "
                              f"files stay for the other run")

    def _seen(self) -> dict[str, Any] | None:
        """None if the lock is still that of this run; else the record in its place, empty if there is none. The file is
        opened again, as only that asks the server of a network file system."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ESTALE, errno.ENOTDIR, errno.EACCES):
                raise
            return {}
        try:
            owner = _owner(descriptor, self.path)
            is_same = os.path.samestat(os.fstat(descriptor), os.fstat(self._descriptor))
            return None if is_same and owner.get("token") == self._mine["token"] else owner
        except DestinationError:
            return {}
        finally:
            os.close(descriptor)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if self.is_ours() if self._is_written else self._is_current(self._descriptor):
                os.unlink(self.path)
        except OSError:
            pass  # The next run finds a stale lock.
        finally:
            _MINE.discard(self._mine["token"])
            os.close(self._descriptor)


def lock_problems(path: Path) -> Iterator[LockedError]:
    """The run that holds the lock now, if one can be seen to live; nothing is locked, so that no run is disturbed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return  # There is none, or taking it will fail with the reason.
    try:
        owner = _owner(descriptor, path)
    except (OSError, DestinationError):
        return
    finally:
        os.close(descriptor)
    if _is_here_and_alive(owner):
        yield _refusal(path, owner, True)


def _refusal(path: Path, owner: Mapping[str, Any], is_alive: bool) -> LockedError:
    who = _who(owner) if owner else "a process that has not written its name yet"
    cure = "wait for it" if is_alive else "if that run is dead, --break-lock takes the lock"
    return LockedError(f"{quoted(path)}: another run writes to this destination, {who}; {cure}")


def _who(owner: Mapping[str, Any]) -> str:
    return f"process {owner.get('pid')} on {quoted(owner.get('host'))} since {quoted(owner.get('since'))}"


def _is_here_and_alive(owner: Mapping[str, Any]) -> bool:
    """True if the run that wrote the record is of this boot and process namespace, and lives."""
    if not owner.get("boot") or (owner["boot"], owner.get("pids", _namespace())) != (_boot(), _namespace()):
        return False
    if owner["pid"] == os.getpid() and "token" in owner:
        return owner["token"] in _MINE
    return _is_alive(owner["pid"], owner.get("started"))


def _owner(descriptor: int, path: Path) -> dict[str, Any]:
    """The record in a lock file; empty if a run was stopped while it wrote. Raises DestinationError for a file that no
    run has written, which must not be removed."""
    content = os.pread(descriptor, 2 * _RECORD_NBYTES, 0)
    if not content.strip(b"\0"):
        return {}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        if _BEGINNING.startswith(content) or (content.startswith(_BEGINNING) and len(content) <= _RECORD_NBYTES):
            return {}  # Torn by a stop or a full disk, or read while its run writes it over an older one.
        value = None
    if not (isinstance(value, dict) and type(value.get("pid")) is int and 0 < value["pid"] < 2**31):
        raise DestinationError(f"{quoted(path)} is not a lock of this tool, and its lock needs that name; move it away")
    return value
