"""What a run leaves in the page cache, asked of the kernel (mincore(2)): the source it has read is given back."""
import ctypes
import mmap
import os

import pytest

from stream_reshard.tensor_file import SourceFile

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
def cold(tmp_path):
    """A folder with a file of weights that is on the disk and not in memory."""
    path = tmp_path / "model-00001-of-00001.safetensors"
    with open(path, "wb") as stream:
        for _ in range(NBYTES // MIB):
            stream.write(os.urandom(MIB))
        stream.flush()
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_nbytes(path) > NBYTES // 10:
        pytest.skip("this file system keeps its files in memory")
    return tmp_path


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
