"""Writing tensor files. How bytes get there is decided here.

A stretch that stands in one piece on both sides is shared where the file system can (`cloning`), else copied: read into
a buffer and written from there, or written straight from a mapping of the source.
"""
from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from stream_reshard.errors import StreamReshardError
from stream_reshard.storage.cloning import clone, inner_blocks
from stream_reshard.storage.durable import NewFile, target_error
from stream_reshard.storage.folder import Folder
from stream_reshard.storage.header import TensorFile, header_of
from stream_reshard.storage.source_file import SourceFile


@dataclass(frozen=True)
class Transport:
    """Way in which bytes move in a run. Changes nothing of the tensors."""

    is_mapped: bool = False
    """Write from a mapping of the source where that needs no buffer, instead of reading it."""
    is_cloned: bool = False
    """Share blocks with the source: its file system and the target's are one, which can."""
    copies_on_server: bool = False
    """Let the file system copy (copy_file_range): over a network the bytes stay on the server."""
    digests: str = "auto"
    """Files that get a digest: all, none, or those whose bytes all passed through this process (auto)."""

    @property
    def bypasses_process(self) -> bool:
        """Stretches are left to the file system, instead of coming through this process."""
        return self.is_cloned or self.copies_on_server


class NewTensorFile(NewFile):
    """A tensor file being written: it begins with its header, and its size is known."""

    def __init__(self, folder: Folder, file: TensorFile, transport: Transport = Transport()):
        super().__init__(folder, file.path, file.nbytes, transport.digests != "none")
        self.file, self.transport = file, transport
        self.cloned_nbytes = 0
        """Bytes that it shares with sources."""
        self.num_overflowed = 0
        """Weights that were cast on the way here and were too large."""

    def __enter__(self) -> NewTensorFile:
        super().__enter__()
        try:
            self.write(0, [header_of(self.file)])
        except BaseException:
            self.abandon()
            raise
        return self

    def _reserve(self) -> None:
        """Blocks that will be shared must not be taken first."""
        if self.transport.is_cloned:
            os.ftruncate(self._descriptor, self.nbytes)
        else:
            super()._reserve()

    def take(self, source: SourceFile, source_offset: int, offset: int, nbytes: int, buffer: memoryview,
             check: Callable[[], None]) -> None:
        """Let `nbytes` from byte `source_offset` of the source be those from byte `offset` on: shared where they can
        be, else copied by the file system, else through `buffer`. `check` is called between its blocks."""
        first, last = self._cloned(source, source_offset, offset, nbytes)
        self.cloned_nbytes += last - first
        for begin, end in ((offset, first), (last, offset + nbytes)):
            for at in range(begin, end, len(buffer)):
                check()
                view, source_at = buffer[:end - at], source_offset + at - offset
                if not (self.transport.copies_on_server and self._copied_on_server(source, source_at, at, len(view))):
                    source.read_into(view, source_at)
                    self.write(at, [view])
                source.release(source_at, len(view))

    def _cloned(self, source: SourceFile, source_offset: int, offset: int, nbytes: int) -> tuple[int, int]:
        """(first, last) byte of what is now shared with the source; an empty range at the end where nothing is."""
        first, last = inner_blocks(source_offset, offset, nbytes)
        try:
            if not self.transport.is_cloned or first == last or not clone(
                    source.descriptor, source_offset + first - offset, self._descriptor, first, last - first):
                return offset + nbytes, offset + nbytes
        except OSError as error:
            raise target_error(self.final, error) from error
        self._note_bypass()
        return first, last

    def _note_bypass(self) -> None:
        """Note that bytes never passed through this process; hashing them would mean reading them back."""
        self._position = -1
        self.is_digested = self.transport.digests == "all"

    def _copied_on_server(self, source: SourceFile, source_offset: int, offset: int, nbytes: int) -> bool:
        """Let the file system copy a block; False where it cannot, or not all of it."""
        try:
            done = 0
            while done < nbytes:
                count = os.copy_file_range(source.descriptor, self._descriptor, nbytes - done, source_offset + done,
                                           offset + done)
                if not count:
                    return False
                done += count
        except OSError:
            return False  # Reading and writing says what is wrong, if it is.
        self._note_bypass()
        return True

    def take_mapped(self, source: SourceFile, source_offset: int, offset: int, nbytes: int, buffer: memoryview,
                    check: Callable[[], None]) -> None:
        """The same, written straight from the mapping of the source, in blocks of the size of `buffer`. Raises
        SourceError where it shrank."""
        for at in range(offset, offset + nbytes, len(buffer)):
            check()
            source_at, size = source_offset + at - offset, min(len(buffer), offset + nbytes - at)
            try:
                self.write(at, [source.view(source_at, size)], is_mapped=True)
            except StreamReshardError as error:
                if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EFAULT:
                    raise source.mapping_fault() from error
                raise
            source.release(source_at, size)
