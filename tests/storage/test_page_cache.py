"""What a run leaves in the page cache, asked of the kernel (mincore(2)): the source it has read is given back."""
import ctypes
import errno
import mmap
import os
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from stream_reshard.machine.kernel import group_limit, read_ahead_nbytes
from stream_reshard.storage import read_ahead, source_file
from stream_reshard.storage.read_ahead import ReadAhead
from stream_reshard.storage.source_file import SourceFile

MIB = 2**20
NBYTES = 72 * MIB


def cached_nbytes(path):
    """Bytes of a file that are in the page cache."""
    access = mmap.PROT_READ | mmap.PROT_WRITE  # ctypes takes nothing else.
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, mmap.MAP_PRIVATE, access) as pages:
        found = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        anchor = ctypes.c_char.from_buffer(pages)
        assert ctypes.CDLL(None).mincore(ctypes.byref(anchor), ctypes.c_size_t(len(pages)), found) == 0
        del anchor
        return sum(page & 1 for page in found) * mmap.PAGESIZE


@pytest.fixture
def disk_path():
    """A folder on a disk, whatever the other tests work on."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def cold(disk_path):
    """A folder with a file of weights that is on the disk and not in memory."""
    path = disk_path / "model-00001-of-00001.safetensors"
    with open(path, "wb") as stream:
        for _ in range(NBYTES // MIB):
            stream.write(os.urandom(MIB))
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_nbytes(path) > NBYTES // 10:
        pytest.skip("this file system keeps its files in memory")
    return disk_path


@pytest.mark.parametrize("block_nbytes", [2 * MIB, 300_000])
@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("num_stretches", [1, 2])
def test_what_was_read_is_given_back(cold, block_nbytes, is_mapped, num_stretches):
    """Also where blocks begin in the middle of what the kernel caches as one piece, as they do behind a header; and
    where blocks of several tensors take turns."""
    name, most = "model-00001-of-00001.safetensors", 0
    buffer, elsewhere = memoryview(bytearray(block_nbytes)), os.memfd_create("target")
    stretch = NBYTES // num_stretches
    with SourceFile(cold, name, is_mapped=is_mapped) as source:
        for number, begin in enumerate(range(12_345, stretch - block_nbytes, block_nbytes)):
            for offset in range(begin, NBYTES - block_nbytes, stretch):
                if is_mapped:
                    os.pwrite(elsewhere, source.view(offset, block_nbytes), 0)
                else:
                    source.read_into(buffer, offset)
                source.release(offset, block_nbytes)
            most = max(most, cached_nbytes(cold / name) if number % 8 == 0 else 0)
    os.close(elsewhere)
    assert most < 40 * MIB, "what is read ahead and a few blocks"
    assert cached_nbytes(cold / name) < num_stretches * 17 * MIB


class Asked:
    """What is asked for ahead, instead of the kernel."""

    def __init__(self, monkeypatch, error=None):
        self.offsets, self._error = [], error
        monkeypatch.setattr(read_ahead.os, "preadv", self._preadv)

    def _preadv(self, descriptor, buffers, offset, flags):
        assert flags == os.RWF_NOWAIT and sum(map(len, buffers)) == 1
        self.offsets.append(offset)
        raise self._error or BlockingIOError


def test_every_byte_ahead_is_asked_for_once_and_none_beyond_the_window(monkeypatch):
    asked, ahead, block = Asked(monkeypatch), ReadAhead(8 * MIB), 2 * MIB
    for offset in range(12_345, 64 * MIB, block):
        ahead.before_read(0, offset, block)
        assert all(offset + block <= place < offset + 8 * MIB for place in asked.offsets[-2:])
    assert {b - a for a, b in zip(asked.offsets, asked.offsets[1:])} == {MIB}


def test_nothing_is_asked_for_by_reads_here_and_there(monkeypatch):
    asked, ahead = Asked(monkeypatch), ReadAhead(8 * MIB)
    for offset in range(0, 640 * MIB, 20 * MIB):
        for place in range(offset, offset + 6 * MIB, MIB):
            ahead.before_read(0, place, MIB)
    assert not asked.offsets


@pytest.mark.parametrize("window, error", [(2**17, None), (0, None), (8 * MIB, OSError(errno.EOPNOTSUPP, "no"))])
def test_nothing_is_asked_for_where_that_is_no_use(monkeypatch, window, error):
    asked, ahead = Asked(monkeypatch, error), ReadAhead(window)
    for offset in range(0, 64 * MIB, 2 * MIB):
        ahead.before_read(0, offset, 2 * MIB)
    assert len(asked.offsets) == (error is not None), "a file system that cannot is asked once"


def test_more_than_a_window_is_on_its_way_while_nobody_reads(cold):
    path, buffer = cold / "model-00001-of-00001.safetensors", memoryview(bytearray(2 * MIB))
    window = read_ahead_nbytes(path.stat().st_dev)
    if not 4 * MIB <= window <= 16 * MIB or (group_limit() or 2**40) < 16 * window:
        pytest.skip(f"the kernel reads {window} bytes ahead on this disk, in {group_limit()} bytes of memory")
    with SourceFile(cold, path.name) as source:
        for offset in range(0, 32 * MIB, len(buffer)):
            source.read_into(buffer, offset)
            if offset < 2 * window:
                continue
            end = time.monotonic() + 10
            while cached_nbytes(path) < (least := offset + len(buffer) + 1.25 * window) and time.monotonic() < end:
                time.sleep(0.01)
            assert cached_nbytes(path) >= least


@pytest.mark.parametrize("limit, expected", [(None, 8 * MIB), (256 * MIB, 8 * MIB), (64 * MIB, 0)])
def test_a_small_control_group_is_not_filled_with_what_is_read_later(tmp_path, monkeypatch, limit, expected):
    """What is dropped before it was read would be read twice."""
    monkeypatch.setattr(read_ahead, "read_ahead_nbytes", lambda device: 8 * MIB)
    monkeypatch.setattr(read_ahead, "group_limit", lambda: limit)
    asked = []
    monkeypatch.setattr(source_file, "ReadAhead", asked.append)
    (tmp_path / "x").touch()
    read_ahead.window_on.cache_clear()
    SourceFile(tmp_path, "x").close()
    read_ahead.window_on.cache_clear()
    assert asked == [expected]


def test_the_window_is_what_the_disk_is_set_to(disk_path):
    device = disk_path.stat().st_dev
    told = subprocess.run(["lsblk", "-bno", "MAJ:MIN,RA"], capture_output=True, text=True).stdout.split()
    windows = {number: int(ra) * 1024 for number, ra in zip(told[::2], told[1::2])}
    number = f"{os.major(device)}:{os.minor(device)}"
    if number not in windows:
        pytest.skip("not on a disk that lsblk knows")
    assert read_ahead_nbytes(device) == windows[number]
    assert read_ahead_nbytes(os.makedev(4095, 1)) == 0, "no such device"
