"""A file that several jobs write: each writes its own tensors, at their places, and later somebody the bytes between.

The file has its final name from the first byte on, as it lies in a folder that is no checkpoint yet. What a job wrote
is known by the CRC-32 of each tensor, which the file itself will hold. It is durable once the file is complete: an
fsync for each job would write the file system's own journal again and again, and who takes up a stopped run compares
what is there with the CRCs.
"""
from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stream_reshard.machine.stop import Stop
from stream_reshard.storage.crc32 import Piece, crc_of, crc_of_pieces
from stream_reshard.storage.durable import drop_from_cache, finish_writeback, sync_names, target_error
from stream_reshard.storage.folder import Folder
from stream_reshard.storage.header import TensorFile
from stream_reshard.storage.source_file import SourceFile
from stream_reshard.storage.target_file import NewTensorFile, Transport


@dataclass(frozen=True)
class FilePart(TensorFile):
    """Tensors of a file that holds others as well, in the order of their bytes."""

    size: int = 0
    """Size of the whole file, in bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of these tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


class SharedFile(NewTensorFile):
    """The file of a part, open for writing under its final name; it is made where it does not exist."""

    def __init__(self, folder: Folder, part: FilePart):
        super().__init__(folder, part, Transport(digests="none"))
        self.temp, self.nbytes = part.path, part.size
        self.crcs: tuple[int, ...] = ()
        """The CRC-32 of each tensor, once the part is written."""
        self._begins = [tensor.begin for tensor in part.tensors]
        self._pieces: list[list[Piece]] = [[] for _ in part.tensors]

    def _created(self) -> int:
        try:
            return super()._created()
        except FileExistsError:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(self.path, flags, self.mode, dir_fd=self.folder.descriptor)

    def _reserve(self) -> None:
        size = os.fstat(self._descriptor).st_size
        if size > self.nbytes:  # Left so by somebody else; fallocate makes no file shorter.
            os.ftruncate(self._descriptor, self.nbytes)
        elif size < self.nbytes:
            super()._reserve()

    def _write_begin(self) -> None:
        """Nothing: a job may not be the first one to write."""

    def _gather(self, offset: int, pieces: Sequence[memoryview | bytes], is_mapped: bool) -> int:
        end = super()._gather(offset, pieces, is_mapped)
        index = bisect_right(self._begins, offset) - 1
        for piece in pieces if index >= 0 else ():
            self._note(index, offset - self._begins[index], piece)
            offset += len(piece)
        return end

    def _note(self, index: int, begin: int, piece: memoryview | bytes) -> None:
        """Add a piece to the CRC of its tensor; pieces in order are one."""
        own = self._pieces[index]
        if own and own[-1].begin + own[-1].nbytes == begin:
            last = own.pop()
            own.append(Piece(last.begin, last.nbytes + len(piece), zlib.crc32(piece, last.crc)))
        else:
            own.append(Piece(begin, len(piece), zlib.crc32(piece)))

    def commit(self) -> None:
        """Wait until the part is written. It is durable after `write_between`."""
        try:
            self.crcs = tuple(crc_of_pieces(pieces, tensor.nbytes)
                              for pieces, tensor in zip(self._pieces, self.file.tensors))
            for tensor in self.file.tensors:
                finish_writeback(self._descriptor, tensor.begin, tensor.nbytes)
                drop_from_cache(self._descriptor, tensor.begin, tensor.nbytes)
        except OSError as error:
            raise target_error(self.final, error) from error
        finally:
            self.abandon()

    def sync(self) -> None:
        """Make all that was written to the file durable, by whomever. Its name is durable after `sync_names`."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise target_error(self.final, error) from error

    def abandon(self) -> None:
        """Close the file, which other jobs write too; it stays."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def write_between(folder: Folder, path: str, size: int, stretches: Iterable[tuple[int, bytes]]) -> None:
    """Write (offset, bytes) into a file that holds its tensors, durably with its name."""
    file = SharedFile(folder, FilePart(path, (), (), size))
    with file:
        for offset, content in stretches:
            file.write(offset, [content])
        file.sync()
    sync_names(folder, [path])


def crcs_of(folder: Folder, part: FilePart, buffer: memoryview, stop: Stop) -> tuple[int, ...] | None:
    """The CRC-32 of each tensor of a part as it stands on the disk, read through `buffer` and not from the page cache;
    None where the file does not exist or has another size."""
    path = folder.path / part.path
    if not path.is_file() or path.stat().st_size != part.size:
        return None
    with SourceFile(folder.path, part.path) as file:
        file.forget()
        return tuple(crc_of(file.pieces(tensor.begin, tensor.nbytes, buffer, stop)) for tensor in part.tensors)
