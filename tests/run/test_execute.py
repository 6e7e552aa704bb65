"""The destination is there whole, or not at all: stops, resumption, changed sources, failing writes."""
import errno
import os
import shutil
import signal
from itertools import count

import pytest

from stream_reshard.cli import main
from stream_reshard.cli.demo import CONFIG, write_random_source
from stream_reshard.convert.conversion import Options, plan_conversion, run_conversion
from stream_reshard.destination.staging import staging_of
from stream_reshard.errors import Interrupted, Refused, ResourceError, SourceError
from stream_reshard.machine.stop import Stop
from stream_reshard.run import jobs
from stream_reshard.run.lanes import Lane
from stream_reshard.storage import durable, source_file as tensor_file
from stream_reshard.storage.folder import Folder


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "hf"
    write_random_source(root, CONFIG | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 176})
    (root / "tokenizer.json").write_text("{}")
    return root


def conversion(source, destination, **changes):
    return plan_conversion(Options(source, destination, tp=2, pp=2, **changes))


def tree(root):
    """Every file's bytes, but for the paths that config.yaml and the manifest must hold."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*")
            if path.is_file() and path.name not in ("config.yaml", "stream_reshard.json")}


def stop_after(number):
    """A progress callback that interrupts the run after so many jobs."""
    seen = []

    def advance(job):
        seen.append(job)
        if len(seen) == number:
            raise Interrupted("stop")

    return advance


@pytest.mark.parametrize("number", [1, 5, 12])
def test_a_stopped_run_leaves_nothing_at_dst_and_goes_on(tmp_path, source, number):
    run_conversion(conversion(source, tmp_path / "whole"))
    destination = tmp_path / "nt"
    with pytest.raises(Interrupted):
        run_conversion(conversion(source, destination, workers=1), stop_after(number))
    assert not destination.exists()
    done = {path: path.stat().st_mtime_ns for path in staging_of(destination).rglob("*.safetensors")}
    assert len(done) >= number
    run_conversion(conversion(source, destination))
    assert tree(destination) == tree(tmp_path / "whole")
    journaled = [path for path in done if (destination / path.relative_to(staging_of(destination))).stat().st_mtime_ns
                 == done[path]]
    assert len(journaled) == len(done), "finished files were written again"
    assert not staging_of(destination).exists()


def test_a_cut_off_journal_line_is_done_again(tmp_path, source):
    destination = tmp_path / "nt"
    with pytest.raises(Interrupted):
        run_conversion(conversion(source, destination, workers=1), stop_after(6))
    journal = staging_of(destination) / "stream_reshard.journal"
    journal.write_bytes(journal.read_bytes()[:-9])
    run_conversion(conversion(source, destination))
    assert main(["verify", str(source), str(destination), "--quiet"]) == 0


def test_another_plan_in_the_staging_folder_is_refused_and_restart_discards_it(tmp_path, source, capsys):
    destination = tmp_path / "nt"
    with pytest.raises(Interrupted):
        run_conversion(conversion(source, destination), stop_after(3))
    flags = [str(source), str(destination), "--tp", "4", "--quiet"]
    assert main(flags) == 4
    assert "another plan" in capsys.readouterr().err
    assert main([*flags, "--restart"]) == 0


def test_a_source_that_changed_since_the_stop_is_refused(tmp_path, source, capsys):
    """Half of the old weights and half of the new ones would be a checkpoint that nothing can tell from a right one."""
    destination = tmp_path / "nt"
    with pytest.raises(Interrupted):
        run_conversion(conversion(source, destination), stop_after(3))
    os.utime(source / "model.safetensors", ns=(1, 1))
    assert main([str(source), str(destination), "--tp", "2", "--pp", "2", "--quiet"]) == 4
    assert "another plan or source" in capsys.readouterr().err


def test_a_stop_just_before_the_last_rename_goes_on(tmp_path, source, monkeypatch):
    real, destination = os.rename, tmp_path / "nt"

    def failing(old, new, **below):
        if new == destination:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(old, new, **below)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", failing)
        with pytest.raises(ResourceError):
            run_conversion(conversion(source, destination))
    run_conversion(conversion(source, destination))
    assert main(["verify", str(source), str(destination), "--quiet"]) == 0
    assert not (destination / "stream_reshard.journal").exists()


@pytest.mark.parametrize("kept", [0, 20])
def test_a_stop_in_the_first_line_of_the_journal_goes_on(tmp_path, source, kept):
    destination = tmp_path / "nt"
    with pytest.raises(Interrupted):
        run_conversion(conversion(source, destination), stop_after(1))
    for path in staging_of(destination).iterdir():
        shutil.rmtree(path) if path.is_dir() else os.truncate(path, kept)
    run_conversion(conversion(source, destination))
    assert main(["verify", str(source), str(destination), "--quiet"]) == 0


def test_what_an_interrupted_run_wrote_counts_as_free(tmp_path, source, monkeypatch):
    """On a disk that holds one output and no more, the run can still go on."""
    destination = tmp_path / "nt"
    with pytest.raises(Interrupted):
        run_conversion(conversion(source, destination, workers=1), stop_after(12))
    written = sum(path.stat().st_blocks * 512 for path in staging_of(destination).rglob("*"))
    needed = conversion(source, destination).disk_nbytes
    free, real = (needed - written // 2) // 4096, os.statvfs(tmp_path)
    full = os.statvfs_result([4096, 4096, 10**6, free, free, *real[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(Refused, match="free"):
        conversion(source, tmp_path / "elsewhere")
    run_conversion(conversion(source, destination))


def test_a_name_that_no_file_system_takes_is_one_line(tmp_path, source, capsys):
    assert main([str(source), str(tmp_path / ("x" * 300)), "--quiet"]) == 4
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "File name too long" in error


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_source_that_changes_is_noticed_before_the_commit(tmp_path, source, name):
    """Also after the last of it was read."""
    plan, seen = conversion(source, tmp_path / "nt", workers=1), []

    def change(job):
        seen.append(job)
        if len(seen) == len(plan.plan.jobs):
            os.utime(source / name, ns=(1, 1))

    with pytest.raises(SourceError, match=f"{name}' changed during the run"):
        run_conversion(plan, change)
    assert not (tmp_path / "nt").exists()


def test_a_source_that_shrank_since_the_plan_is_a_clear_error(tmp_path, source):
    plan = conversion(source, tmp_path / "nt")
    os.truncate(source / "model.safetensors", 4096)
    with pytest.raises(SourceError, match=r"changed during the run: its size was \d+, and is 4096"):
        run_conversion(plan)
    assert not (tmp_path / "nt").exists()


def test_a_source_that_shrinks_under_an_open_file_is_a_clear_error(tmp_path, source):
    with tensor_file.SourceFile(source, "model.safetensors") as file:
        os.truncate(source / "model.safetensors", 4096)
        with pytest.raises(SourceError, match="shrank during the run: it ends before byte 5000"):
            file.read_into(memoryview(bytearray(1000)), 4000)


@pytest.mark.parametrize("code, last", [(errno.ENOSPC, 20), (errno.EIO, 10**9)])
def test_a_write_that_fails_is_resumable(tmp_path, source, monkeypatch, code, last):
    """A full disk at once; an I/O error when it comes again after the file was written anew."""
    plan, real, count = conversion(source, tmp_path / "nt", workers=1), os.pwritev, []

    def failing(*arguments):
        count.append(1)
        if 20 <= len(count) <= last:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(durable.os, "pwritev", failing)
        with pytest.raises(ResourceError, match=os.strerror(code)):
            run_conversion(plan)
    assert not list(staging_of(tmp_path / "nt").rglob("*.part")), "the partial file is removed"
    run_conversion(conversion(source, tmp_path / "nt"))
    assert main(["verify", str(source), str(tmp_path / "nt"), "--quiet"]) == 0


@pytest.mark.parametrize("call", ["pwritev", "fsync", "close", "rename"])
def test_an_io_error_is_met_by_writing_the_file_anew(tmp_path, source, monkeypatch, call):
    """Once: after a failed fsync the kernel may have dropped the pages, and a second one would say that all is well."""
    plan, real, failed = conversion(source, tmp_path / "nt", workers=1), getattr(os, call), []

    def failing(first, *arguments, **below):
        name = first if call == "rename" else os.readlink(f"/proc/self/fd/{first}")
        if not failed and "o_proj" in str(name) and str(name).endswith(".part"):
            failed.append(str(name))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(first, *arguments, **below)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing)
        run_conversion(plan)
    assert failed and not list(tmp_path.rglob("*.part"))
    assert main(["verify", str(source), str(tmp_path / "nt"), "--quiet"]) == 0


def test_short_writes_are_finished(tmp_path, monkeypatch):
    sizes = {"num_hidden_layers": 1, "hidden_size": 1024, "intermediate_size": 1024}
    write_random_source(tmp_path / "hf", CONFIG | sizes)
    run_conversion(conversion(tmp_path / "hf", tmp_path / "a"))
    real, number = os.pwritev, count(1)

    def short(descriptor, pieces, offset):
        whole = b"".join(pieces)
        return real(descriptor, [whole[:len(whole) * (1 + next(number) % 4) // 5 or 1]], offset)

    monkeypatch.setattr(durable.os, "pwritev", short)
    run_conversion(conversion(tmp_path / "hf", tmp_path / "b"))
    assert next(number) > 30
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_linked_sources_are_followed(tmp_path, source):
    """The cache of huggingface_hub is a folder of links to blobs."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.iterdir():
        blob = tmp_path / "blobs" / path.name
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    run_conversion(conversion(snapshot, tmp_path / "nt"))
    assert main(["verify", str(source), str(tmp_path / "nt"), "--quiet"]) == 0


def test_a_stop_does_not_wait_for_the_end_of_a_job(tmp_path, source, monkeypatch):
    """Between two blocks the run sees the request: a job of many GB must not keep a batch system waiting."""
    plan, real, stop, after = conversion(source, tmp_path / "nt"), os.pwritev, Stop(), []

    def asking(*arguments):
        if stop.signal_number:
            after.append(1)
        elif staging_of(tmp_path / "nt").exists():
            stop.request(signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(durable.os, "pwritev", asking)
    largest = max(plan.plan.jobs, key=lambda job: job.nbytes)
    staging_of(tmp_path / "nt").mkdir()
    work = jobs.Work(plan.plan, Folder(staging_of(tmp_path / "nt")), 64, plan.identities, {}, stop)
    with pytest.raises(Interrupted, match="interrupted by SIGTERM"):
        jobs.run_job(work, largest)
    assert len(after) <= len(largest.files) < largest.nbytes / 64 / 10
    assert not list(tmp_path.rglob("*.part"))


def test_buffers_are_not_shared_with_forked_processes():
    """Two forks of a process that has run a job must not write into one buffer: their output would be mixed."""
    lane = Lane(4096)
    lane.scratch[:4] = b"ours"
    if not (pid := os.fork()):
        lane.scratch[:4] = b"fork"
        os._exit(0)
    os.waitpid(pid, 0)
    assert bytes(lane.scratch[:4]) == b"ours"


def test_each_source_byte_is_read_once(tmp_path, source, monkeypatch):
    plan, real, read = conversion(source, tmp_path / "nt"), jobs.SourceFile.read_into, []

    def counting(self, view, offset):
        read.append((offset, offset + len(view)))
        real(self, view, offset)

    monkeypatch.setattr(jobs.SourceFile, "read_into", counting)
    run_conversion(plan)
    tensors = list(plan.plan.source.tensors())
    read.sort()
    assert read[0][0] == tensors[0].begin and read[-1][1] == tensors[-1].begin + tensors[-1].nbytes
    assert all(first[1] == second[0] for first, second in zip(read, read[1:]))
