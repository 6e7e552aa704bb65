"""A source that changes, shrinks, vanishes or cannot be read while the run reads it, and workers that die."""
import errno
import os
import random
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context

import psutil
import pytest
from faults import Case, after_fault, campaign, clean_error, plain, tree_of, until
from sources import make_source

from stream_reshard.cli import main
from stream_reshard.convert.conversion import Options, plan_conversion
from stream_reshard.destination.staging import staging_of
from stream_reshard.errors import ResourceError, SourceError
from stream_reshard.run import engines
from stream_reshard.run.writing import RunOptions, run
from stream_reshard.storage import source_file as tensor_file

SHARD = "model-00002-of-00002.safetensors"


def overwrite(path):
    """Other weights, in place."""
    raw = path.read_bytes()
    with open(path, "r+b") as stream:
        stream.seek(len(raw) - 8)
        stream.write(bytes(byte ^ 255 for byte in raw[-8:]))


def overwrite_and_put_the_time_back(path):
    status = path.stat()
    overwrite(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path):
    """Another file of the same size under the same name."""
    shutil.copy(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def shrink(path):
    os.truncate(path, path.stat().st_size - 100)


def empty(path):
    os.truncate(path, 0)


CHANGES = [overwrite, overwrite_and_put_the_time_back, replace, shrink, empty, os.unlink]


def changed(case, point):
    """The shard changes at a call of the run, or a link to it is led elsewhere."""
    change, at = point
    shutil.rmtree(case.source)
    make_source(case.source, num_shards=2, config={"vocab_size": 13})
    case.clear()
    seen = []

    def act(number, name, call):
        if number == at:
            seen.append(at)
            change(case.source / SHARD)
        return call()

    code, err = case.run(act)
    if code != 3 or "Traceback" in err or SHARD not in err or "nothing was committed" not in err:
        return f"ended with {code}: {err}"
    if case.tree() is not None:
        return "committed all the same"
    shutil.rmtree(case.source)
    make_source(case.source, num_shards=2, config={"vocab_size": 13})
    code, err = case.run()
    if code != 4 or "another plan or source" not in err:
        return f"taken up with another source: {code} {err}"
    code, err = case.run(flags=("--restart",))
    return clean_error(code, err, (0,))


@pytest.mark.parametrize("number", [pytest.param(2, id="sample"), pytest.param(20, id="all",
                                                                               marks=pytest.mark.heavy)])
def test_a_source_that_changes_under_the_run(quick_path, figures, number):
    case = Case(quick_path / "count")
    last = max(at for at, name in enumerate(case.operations, 1) if name == "fallocate")  # Of a tensor file.
    points = [(change, at) for change in CHANGES for at in random.Random(1).sample(range(2, last), number)]
    figures("changes of the source", *campaign(quick_path, Case, changed, points))


def unreadable(case, point):
    """Reads fail so often in a row, from the `at`th on; a few times is a network that comes back."""
    code, at, times = point

    def prepare():
        tensor_file.FIRST_PAUSE_SECONDS = 0.001
        real, count = os.preadv, [0]

        def preadv(descriptor, buffers, offset):
            count[0] += 1
            if at <= count[0] < at + times:
                raise OSError(code, os.strerror(code))
            return real(descriptor, buffers, offset)
        os.preadv = preadv

    case.clear()
    ended, err = case.run(plain, prepare)
    expected = 0 if times <= 3 else 6
    wrong = clean_error(ended, err, (expected,))
    if expected == 6 and ".safetensors" not in err:
        wrong = f"no file named: {err}"
    return wrong or after_fault(case)


@pytest.mark.heavy
def test_reads_that_fail(quick_path, figures):
    points = [(code, at, times) for code in (errno.EIO, errno.ESTALE) for at in (1, 5, 9, 14, 20)
              for times in (1, 3, 4, 1000)]
    figures("reads that fail", *campaign(quick_path, Case, unreadable, points))


@pytest.mark.parametrize("times", [1, 4])
def test_a_stale_handle_is_opened_anew(tmp_path, monkeypatch, times):
    """And the file must still be the one that it was."""
    make_source(tmp_path / "hf")
    monkeypatch.setattr(tensor_file, "FIRST_PAUSE_SECONDS", 0.001)
    path = tmp_path / "hf" / "model.safetensors"
    file = tensor_file.SourceFile(path.parent, path.name, tensor_file.identity_of(path.stat()))
    real, seen = os.preadv, []

    def preadv(descriptor, *args):
        seen.append(descriptor)
        if len(seen) == 1:
            if times > 1:
                replace(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(descriptor, *args)

    monkeypatch.setattr(os, "preadv", preadv)
    view = memoryview(bytearray(8))
    if times == 1:
        file.read_into(view, 0)
        assert bytes(view) == path.read_bytes()[:8]
    else:
        with pytest.raises(SourceError, match="changed during the run: its inode was"):
            file.read_into(view, 0)


def pool(pause=0.0):
    def begin():
        time.sleep(pause)
        engines.die_with_parent()
    return ProcessPoolExecutor(2, mp_context=get_context("fork"), initializer=begin)


def conversion(folder):
    """A conversion of a source of some megabytes, so that a worker can be met at work."""
    config = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 11}
    if not (folder / "hf").exists():
        make_source(folder / "hf", config=config)
    return plan_conversion(Options(folder / "hf", folder / "nt", tp=2, max_memory=2**32))


def pausing_after(number, real=os.fsync, main_pid=os.getpid()):
    """An fsync that lets a worker make so many files durable, and then holds it at work for ever."""
    seen = []

    def fsync(descriptor):
        if os.getpid() != main_pid:
            seen.append(descriptor)
            if len(seen) > number:
                signal.pause()
        real(descriptor)
    return fsync


def test_a_worker_that_is_killed(tmp_path, monkeypatch):
    """The run ends with one clear error, and the same command goes on from what was done."""
    planned, killed = conversion(tmp_path), []

    def kill_one(job):
        if not killed:
            killed.append(psutil.Process().children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", pausing_after(4))
        with pool() as executor, pytest.raises(ResourceError, match="a worker process died"):
            run(planned.output, RunOptions(planned.memory.block_nbytes, executor, progress=kill_one))
    assert not (tmp_path / "nt").exists() and staging_of(tmp_path / "nt").exists()
    assert run(planned.output, RunOptions(planned.memory.block_nbytes)).num_kept >= 1
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "nt"), "--quiet", "--max-memory", "4GiB"]) == 0


def test_workers_in_processes_give_the_same_result(tmp_path):
    planned = conversion(tmp_path)
    run(planned.output, RunOptions(planned.memory.block_nbytes))
    wanted = tree_of(tmp_path / "nt")
    shutil.rmtree(tmp_path / "nt")
    with pool() as executor:
        run(planned.output, RunOptions(planned.memory.block_nbytes, executor))
    assert tree_of(tmp_path / "nt") == wanted


def has_ended(process):
    """True once no thread of a process is left. The first one may be a zombie, and so all that is seen of the process,
    while another is still ending and holds what was open: among that the lock of the run."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() == 1
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("pause", [0.0, 0.5])
def test_workers_do_not_outlive_a_run_that_is_killed(tmp_path, pause):
    """Also where they are still starting when it is killed."""
    planned = conversion(tmp_path)
    if not (child := os.fork()):
        real, main_pid = os.fsync, os.getpid()
        os.fsync = lambda descriptor: real(descriptor) if os.getpid() == main_pid else signal.pause()
        with pool(pause) as executor:
            run(planned.output, RunOptions(planned.memory.block_nbytes, executor))
        os._exit(0)
    parent = psutil.Process(child)
    assert until(lambda: len(parent.children()) == 2)
    workers = parent.children()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        assert until(lambda: all(map(has_ended, workers)))
    finally:
        for worker in workers:  # They would hold on to the pipes of whoever runs the tests.
            with suppress(psutil.NoSuchProcess):
                worker.kill()
    assert run(planned.output, RunOptions(planned.memory.block_nbytes)).num_kept >= 0
    assert (tmp_path / "nt" / "model_config.json").exists()


def test_jobs_that_run_twice_at_once(tmp_path):
    """An engine may give a job to two workers: each has a temp file of its own, and the last rename wins. The job has
    ended when both have: until then the folder holds a file that is not finished, which the last look refuses."""
    planned = conversion(tmp_path)
    run(planned.output, RunOptions(planned.memory.block_nbytes))
    wanted = tree_of(tmp_path / "nt")
    shutil.rmtree(tmp_path / "nt")

    class Twice(ProcessPoolExecutor):
        def submit(self, *args):
            first, second = super().submit(*args), super().submit(*args)
            return waiting.submit(lambda: (first.result(), second.result())[1])

    with ThreadPoolExecutor() as waiting, Twice(2, mp_context=get_context("fork")) as executor:
        run(planned.output, RunOptions(planned.memory.block_nbytes, executor))
    assert tree_of(tmp_path / "nt") == wanted
