"""Lock: one run at a time writes to a destination.

A file beside the destination says who is at work. The kernel's lock on it (flock) goes with the process that holds it,
so a stale file is told from a live one without guessing on the machine where it was made. A file from another machine
is respected: only a person knows whether that run is dead (`--break-lock`).

The file also keeps what a run notes of a swap of two folders, so that after a stop in its middle the next run knows
which of them is the new one.
"""
from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from stream_reshard.durable import sync_folder, target_error, write_all
from stream_reshard.errors import DestinationError, LockedError, quoted

_RECORD_NBYTES, _BEGINNING = 1024, b'{"pid": '
"""Size of what a lock file holds, and how it begins."""

_CANNOT_LOCK = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What network file systems without a lock service answer to flock."""


def _boot() -> str:
    """Names the running kernel: where two processes agree on it, they see each other's locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


class Lock:
    """Held while the `with` block runs. Raises LockedError, naming the other run, where it is taken."""

    def __init__(self, path: Path, break_lock: bool = False):
        """`break_lock`: take it from a run that may be alive on another machine."""
        self.path, self.break_lock = path, break_lock
        self._descriptor = -1
        self._mine: dict[str, Any] = {}
        self.note: list[int] | None = None
        """What the run before this one, which was stopped, or this one has noted."""

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
        """One attempt; False where the file was removed under it. Raises LockedError."""
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
            if is_locked is False or not (is_new or self._is_over(owner, is_locked)):
                raise self._refusal(owner, is_locked is False)
            self._mine = {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(),
                          "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            self._descriptor, descriptor = descriptor, -1
            self.write_note(owner.get("note"))
            return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def write_note(self, note: list[int] | None) -> None:
        """Keep a note for the next run, durably, in case this one does not come to an end."""
        self.note = note
        content = json.dumps(self._mine | {"note": note}).encode().ljust(_RECORD_NBYTES)
        write_all(self._descriptor, content, 0)  # Of one size always, so that no stop leaves half of it.
        if note:
            os.fsync(self._descriptor)
            sync_folder(self.path.parent)

    @staticmethod
    def _flock(descriptor: int) -> bool | None:
        """True: the kernel gave the lock; False: another process has it; None: this file system knows no locks."""
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
        """Whether the path still names the file that was opened: its holder removes it when it ends."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _is_over(self, owner: Mapping[str, Any], is_locked: bool | None) -> bool:
        """Whether the run that wrote the file has ended, as far as can be known here."""
        if self.break_lock or (is_locked and not owner):
            return True
        if owner.get("boot") == _boot():
            return bool(is_locked) or not _is_alive(owner.get("pid", 0))
        return owner.get("host") == socket.gethostname()  # The same machine, started anew since.

    def _refusal(self, owner: Mapping[str, Any], is_alive: bool) -> LockedError:
        who = (f"process {owner.get('pid')} on {quoted(owner.get('host'))} since {quoted(owner.get('since'))}"
               if owner else "a process that has not said its name yet")
        cure = "wait for it" if is_alive else "if that run is dead, --break-lock takes its place"
        return LockedError(f"{quoted(self.path)}: another run writes to this destination, {who}; {cure}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if self._is_current(self._descriptor):
                os.unlink(self.path)
        except OSError:
            pass  # The next run finds it stale.
        finally:
            os.close(self._descriptor)


def _owner(descriptor: int, path: Path) -> dict[str, Any]:
    """What a lock file says; nothing where a run was stopped before it wrote. Raises DestinationError for a file that
    no run has written: it is not ours to remove."""
    content = os.pread(descriptor, 2 * _RECORD_NBYTES, 0)
    if not content.strip(b"\0"):
        return {}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        if _BEGINNING.startswith(content) or (content.startswith(_BEGINNING) and len(content) < _RECORD_NBYTES):
            return {}  # Torn by a stop or a full disk.
        value = None
    if not (isinstance(value, dict) and type(value.get("pid")) is int and 0 < value["pid"] < 2**31):
        raise DestinationError(f"{quoted(path)} is not a lock of this tool; the lock has to stand there, move it away")
    return value
