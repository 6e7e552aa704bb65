"""A file is whole under its final name, with the digest of what it holds, or it is not there."""
import ctypes
import errno
import hashlib
import mmap
import os
import random
import shutil

import pytest
import xxhash

from stream_reshard.cli.demo import CONFIG, write_random_source
from stream_reshard.convert.conversion import Options, plan_conversion, run_conversion
from stream_reshard.errors import DestinationError, ResourceError
from stream_reshard.storage import durable
from stream_reshard.storage.durable import NewFile, exchange, make_folder
from stream_reshard.storage.folder import Folder


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled", "with gaps filled later"])
@pytest.mark.parametrize("size", [0, 1000])
def test_the_digest_is_that_of_the_content_however_it_was_written(tmp_path, monkeypatch, order, size):
    monkeypatch.setattr(durable, "_DIGESTED_NBYTES", 64)
    content = hashlib.shake_128(b"content").digest(1000)
    pieces = [(at, content[at:at + 100]) for at in range(0, 1000, 100)]
    if order == "backwards":
        pieces.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(pieces)
    elif order.startswith("with gaps"):
        pieces = pieces[::2] + pieces[1::2]
    with NewFile(Folder(tmp_path), "x", size) as file:
        for at, piece in pieces:
            file.write(at, [piece[:30], piece[30:]])
        digest = file.commit()
    assert (tmp_path / "x").read_bytes() == content
    assert digest == xxhash.xxh3_128(content).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_nothing_is_there_before_the_commit_nor_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError), NewFile(Folder(tmp_path), "x", 10) as file:
        file.write(0, [b"01234"])
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_file_of_that_name_stands_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "x").write_text("old")
    with NewFile(Folder(tmp_path), "x") as file:
        file.write(0, [b"new"])
        assert (tmp_path / "x").read_text() == "old"
        file.commit()
    assert (tmp_path / "x").read_text() == "new"


def test_a_size_that_no_disk_has_is_refused_at_once(tmp_path):
    with pytest.raises(ResourceError, match="free some space|raise the limit|No space|too large"):
        NewFile(Folder(tmp_path), "x", 2**62).__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, None])
def test_a_file_system_that_cannot_reserve_blocks_gets_the_size_alone(tmp_path, monkeypatch, code):
    """No byte is written for it. None: the C library has no such call."""
    def refusing(descriptor, mode, offset, nbytes):
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(durable, "_fallocate", refusing if code else None)
    monkeypatch.setattr(os, "posix_fallocate", None)
    with NewFile(Folder(tmp_path), "x", 10**7) as file:
        status = os.fstat(file._descriptor)
        assert (status.st_size, status.st_blocks) == (10**7, 0)
        file.write(0, [b"x" * 10])
        file.commit()
    assert (tmp_path / "x").stat().st_size == 10**7


def test_blocks_are_reserved_and_a_full_disk_shows_at_once(tmp_path, monkeypatch):
    codes = [errno.EINTR, errno.ENOSPC]

    def failing(descriptor, mode, offset, nbytes):
        ctypes.set_errno(codes.pop(0))
        return -1

    with NewFile(Folder(tmp_path), "x", 2**20) as file:
        assert os.fstat(file._descriptor).st_size == 2**20
    monkeypatch.setattr(durable, "_fallocate", failing)
    with pytest.raises(ResourceError, match="No space left on device; free some space"):
        NewFile(Folder(tmp_path), "x", 2**20).__enter__()
    assert not codes and not list(tmp_path.iterdir())


def test_the_folder_that_is_held_is_never_made_anew(tmp_path):
    """Nor is another one that stands under its path written to; the folders below it are made."""
    (tmp_path / "held").mkdir()
    folder = Folder(tmp_path / "held")
    with NewFile(folder, "a/b/c/x") as file:
        file.write(0, [b"x"])
        file.commit()
    assert (tmp_path / "held" / "a" / "b" / "c" / "x").read_bytes() == b"x" and folder.is_there()
    (tmp_path / "held").rename(tmp_path / "moved")
    assert not folder.is_there()
    (tmp_path / "held").mkdir()
    assert not folder.is_there()
    with NewFile(folder, "y") as file:
        file.commit()
    assert (tmp_path / "moved" / "y").exists() and not list((tmp_path / "held").iterdir())
    for name in ("moved", "held"):
        shutil.rmtree(tmp_path / name)
    for path in ("x", "a/b/c/x"):
        with pytest.raises(ResourceError, match="removed during the run"):
            NewFile(folder, path).__enter__()
    assert not list(tmp_path.iterdir())


def test_many_pieces_are_gathered(tmp_path):
    pieces = [bytes([i % 251]) for i in range(5 * durable.MAX_PIECES + 3)]
    with NewFile(Folder(tmp_path), "x") as file:
        file.write(0, pieces)
        file.commit()
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("length", [1, 6, 7, 8, 20, 21, 29])
def test_a_gathered_write_may_stop_anywhere(tmp_path, monkeypatch, length):
    """Inside its first piece, inside a later one, or between two."""
    pieces, real = [b"abcdefg", b"", b"hijklmnopqrstu", b"v", b"wxyz012"], os.pwritev
    monkeypatch.setattr(durable.os, "pwritev", lambda file, parts, at: real(file, [b"".join(parts)[:length]], at))
    with NewFile(Folder(tmp_path), "x") as file:
        file.write(0, pieces)
        assert file.commit() == xxhash.xxh3_128(b"".join(pieces)).hexdigest()
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)


def test_two_names_are_swapped_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot swap names")
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "absent")


def test_folders_are_made_with_what_is_above_them(tmp_path):
    make_folder(tmp_path / "a" / "b" / "c")
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        make_folder(tmp_path / "file" / "d")


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_folder_that_nobody_may_list_can_stand_above(tmp_path):
    """Shared disks have such: everyone may pass through, nobody may look around, and so nobody can sync it."""
    os.chmod(tmp_path, 0o711)
    (tmp_path / "mine").mkdir()
    os.chown(tmp_path / "mine", 12345, -1)
    for parent in tmp_path.parents:
        os.chmod(parent, os.stat(parent).st_mode | 0o011)
    if not (pid := os.fork()):
        code = 1
        try:
            os.setuid(12345)
            make_folder(tmp_path / "mine")
            make_folder(tmp_path / "mine" / "a" / "b")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0 and (tmp_path / "mine" / "a" / "b").is_dir()


def test_errors_of_the_destination_say_whether_to_choose_another_or_to_try_again(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DestinationError, match="file/x': (Not a directory|File exists)"):
        NewFile(Folder(tmp_path), "file/x").__enter__()


def test_no_page_is_sent_to_the_disk_twice(tmp_path, monkeypatch):
    page, begun = mmap.PAGESIZE, []
    monkeypatch.setattr(durable, "start_writeback", lambda descriptor, offset, nbytes: begun.append((offset, nbytes)))
    sizes = [648, *[durable._WRITEBACK_NBYTES] * 5, durable._WRITEBACK_NBYTES + 100]
    with NewFile(Folder(tmp_path), "x", sum(sizes)) as file:
        offset = 0
        for size in sizes:
            file.write(offset, [bytes(size)])
            offset += size
        file.commit()
    pages = [number for first, nbytes in begun for number in range(first // page, -(-(first + nbytes) // page))]
    assert sorted(pages) == list(range(-(-offset // page))), "each once, and those of the header with what follows"


@pytest.mark.parametrize("direction", ["to Nanotron", "to Hugging Face"])
def test_every_name_is_made_durable_after_the_last_change_in_its_folder(tmp_path, monkeypatch, direction):
    """A file that is durable under a name that is not is lost in a power cut all the same."""
    write_random_source(tmp_path / "hf", CONFIG | {"num_hidden_layers": 3})
    if direction == "to Nanotron":
        options = Options(tmp_path / "hf", tmp_path / "out" / "nt", tp=2, pp=2, workers=2)
    else:
        run_conversion(plan_conversion(Options(tmp_path / "hf", tmp_path / "nt", tp=2, pp=2)))
        options = Options(tmp_path / "nt", tmp_path / "out" / "hf", to="hf", max_shard_size=300_000)
    pending = set()

    def changing(name, call):
        def changed(*arguments, **words):
            result = call(*arguments, **words)
            below = words.get("dir_fd", words.get("src_dir_fd"))
            above = os.readlink(f"/proc/self/fd/{below}") if below is not None else ""
            pending.update(os.path.dirname(os.path.join(above, path))
                           for path in arguments[:2 if name == "rename" else 1])
            return result
        monkeypatch.setattr(os, name, changed)

    def fsync(descriptor, real=os.fsync):
        real(descriptor)
        pending.discard(os.readlink(f"/proc/self/fd/{descriptor}"))

    for name in ("rename", "mkdir"):
        changing(name, getattr(os, name))
    monkeypatch.setattr(os, "fsync", fsync)
    run_conversion(plan_conversion(options))
    assert not pending
