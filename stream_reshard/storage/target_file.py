"""Writing tensor files; this module decides how bytes reach them.

A stretch that is contiguous in source and target is cloned if the file system can (`cloning`). Else it is copied: by
the file system itself, through a buffer, or from a mapping of the source.
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
    """Ways in which bytes may move in a run. The tensors are the same in each."""

    is_mapped: bool = False
    """Stretches that need no buffer are written from a mapping of the source, not read."""
    is_cloned: bool = False
    """Blocks are cloned: source and target are on one file system that can."""
    copies_on_server: bool = False
    """The file system copies (copy_file_range): over a network the bytes stay on the server."""
    digests: str = "auto"
    """Files that get a digest: "all", "none", or "auto": those of which all bytes pass through this process."""

    @property
    def bypasses_process(self) -> bool:
        """The file system moves stretches, and their bytes do not pass through this process."""
        return self.is_cloned or self.copies_on_server


class NewTensorFile(NewFile):
    """A tensor file being written; entering the context writes its header."""

    def __init__(self, folder: Folder, file: TensorFile, transport: Transport = Transport()):
        super().__init__(folder, file.path, file.nbytes, transport.digests != "none")
        self.file, self.transport = file, transport
        self.cloned_nbytes = 0
        """Bytes cloned from sources."""
        self.num_overflowed = 0
        """Elements of this file that a cast made infinite."""

    def __enter__(self) -> NewTensorFile:
        super().__enter__()
        try:
            self._write_begin()
        except BaseException:
            self.abandon()
            raise
        return self

    def _write_begin(self) -> None:
        self.write(0, [header_of(self.file)])

    def _reserve(self) -> None:
        """Set the final size; blocks that will be cloned must not be allocated first."""
        if self.transport.is_cloned:
            os.ftruncate(self._descriptor, self.nbytes)
        else:
            super()._reserve()

    def take(self, source: SourceFile, source_offset: int, offset: int, nbytes: int, buffer: memoryview,
             check: Callable[[], None]) -> None:
        """Write `nbytes` of the source, from byte `source_offset` on, at byte `offset`: cloned if possible, else copied
        by the file system, else through `buffer`. `check` is called before each block of the size of `buffer`."""
        cloned_begin, cloned_end = self._cloned(source, source_offset, offset, nbytes)
        self.cloned_nbytes += cloned_end - cloned_begin
        for begin, end in ((offset, cloned_begin), (cloned_end, offset + nbytes)):
            for at in range(begin, end, len(buffer)):
                check()
                view, source_at = buffer[:end - at], source_offset + at - offset
                if not (self.transport.copies_on_server and self._copied_on_server(source, source_at, at, len(view))):
                    source.read_into(view, source_at)
                    self.write(at, [view])
                source.release(source_at, len(view))

    def _cloned(self, source: SourceFile, source_offset: int, offset: int, nbytes: int) -> tuple[int, int]:
        """(begin, end) of the bytes cloned from the source; both are the end of the stretch if none are."""
        begin, end = inner_blocks(source_offset, offset, nbytes)
        try:
            if not self.transport.is_cloned or begin == end or not clone(
                    source.descriptor, source_offset + begin - offset, self._descriptor, begin, end - begin):
                return offset + nbytes, offset + nbytes
        except OSError as error:
            raise target_error(self.final, error) from error
        self._note_bypass()
        return begin, end

    def _note_bypass(self) -> None:
        """Note that bytes bypassed this process. A digest would need to read them back, so only "all" wants it."""
        self._position = -1
        self.is_digested = self.transport.digests == "all"

    def _copied_on_server(self, source: SourceFile, source_offset: int, offset: int, nbytes: int) -> bool:
        """Let the file system copy a block; False if it cannot copy all of it."""
        try:
            done = 0
            while done < nbytes:
                count = os.copy_file_range(source.descriptor, self._descriptor, nbytes - done, source_offset + done,
                                           offset + done)
                if not count:
                    return False
                done += count
        except OSError:
            return False  # Reading and writing instead succeeds, or reports the error.
        self._note_bypass()
        return True

    def take_mapped(self, source: SourceFile, source_offset: int, offset: int, nbytes: int, buffer: memoryview,
                    check: Callable[[], None]) -> None:
        """Write `nbytes` of the source, from byte `source_offset` on, at byte `offset`, from the mapping of the source.
        `check` is called before each block of the size of `buffer`. Raises SourceError if the source shrank."""
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
