"""Jobs are read in the order in which they were handed out, one by a lane, while those before come to their end."""
import gc
import os
import pickle
import threading
import time
from concurrent.futures import Future
from contextlib import closing

import pytest
from sources import make_source

from stream_reshard.convert.conversion import Options, plan_conversion
from stream_reshard.errors import Interrupted
from stream_reshard.machine.stop import Stop
from stream_reshard.run.engines import run_all
from stream_reshard.run.jobs import Work, run_job
from stream_reshard.run.lanes import Lane, Lanes, Writing
from stream_reshard.storage.durable import WriteFault
from stream_reshard.storage.folder import Folder


class Counted:
    """The highest number of threads that were in here at once."""

    def __init__(self):
        self.now = self.most = 0
        self.lock = threading.Lock()

    def __enter__(self):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *exception):
        with self.lock:
            self.now -= 1


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_jobs_are_read_in_the_order_in_which_they_are_submitted(num_lanes):
    order, reading, under_way = [], Counted(), Counted()

    def begun(number):
        def read(lane):
            order.append(number)
            under_way.__enter__()
            with reading:
                time.sleep(0.02 * (number % 3))
            return lambda: finish(number)
        return read

    def finish(number):
        time.sleep(0.02 * ((8 - number) % 5))
        under_way.__exit__()
        return number

    with closing(Lanes(num_lanes, 64, 5)) as lanes:
        results = list(run_all(lambda number: lanes.submit(begun(number)), range(20), Stop(), 5))
    assert all(job == result for job, result in results) and sorted(job for job, _ in results) == list(range(20))
    assert len(order) == 20 and all(abs(place - number) < num_lanes for place, number in enumerate(order)), order
    assert reading.most <= num_lanes and num_lanes < under_way.most <= 5


def test_the_next_job_reads_while_the_one_before_comes_to_its_end():
    has_read = threading.Event()
    with closing(Lanes(1, 64, 2)) as lanes:
        first = lanes.submit(lambda lane: lambda: has_read.wait(5))
        second = lanes.submit(lambda lane: has_read.set() or (lambda: "done"))
        assert first.result() is True and second.result() == "done"


@pytest.mark.parametrize("fails", ["reading", "finishing"])
def test_a_job_that_fails_stops_the_others_and_what_they_finish_is_not_lost(fails):
    stop, late, begun, before = Stop(), [], [], threading.active_count()
    failed = threading.Event()

    def job(number):
        def read(lane):
            begun.append(number)
            if number == 1 and fails == "reading":
                failed.set()
                raise ZeroDivisionError
            return lambda: finish(number)
        return lanes.submit(read)

    def finish(number):
        if number == 1:
            failed.set()
            raise ZeroDivisionError
        failed.wait(5)
        time.sleep(0.1)
        stop.check() if number == 2 else None
        return number

    with closing(Lanes(1, 64, 4)) as lanes, pytest.raises(ZeroDivisionError):
        list(run_all(job, range(100), stop, 4, late.append))
    assert 0 in late and 2 not in late and len(begun) < 10
    assert threading.active_count() == before, "threads outlive the run"


def test_a_job_can_be_cancelled_until_it_begins_to_read():
    is_reading, go_on = threading.Event(), threading.Event()

    def read(lane):
        is_reading.set()
        assert go_on.wait(5)
        return lambda: "done"

    with closing(Lanes(1, 64, 4)) as lanes:
        first, second = lanes.submit(read), lanes.submit(lambda lane: pytest.fail("it was cancelled"))
        assert is_reading.wait(5) and second.cancel() and not first.cancel()
        go_on.set()
        assert first.result() == "done"


@pytest.mark.parametrize("num_faults", [1, 2])
def test_a_job_that_may_fail_once_is_handed_out_once_more(num_faults):
    tried = []

    def submit(number):
        tried.append(number)
        future = Future()
        if number == 3 and tried.count(3) <= num_faults:
            future.set_exception(WriteFault("lost"))
        else:
            future.set_result(-number)
        return future

    results = run_all(submit, range(6), Stop(), 2, again=(WriteFault,))
    if num_faults == 1:
        assert sorted(results) == [(number, -number) for number in range(6)]
    else:
        with pytest.raises(WriteFault, match="lost"):
            list(results)
    assert tried.count(3) == 2 and all(tried.count(number) < 2 for number in range(6) if number != 3)


def test_a_caller_that_goes_away_stops_the_jobs():
    stop, late = Stop(), []
    with closing(Lanes(2, 64, 4)) as lanes:
        with closing(run_all(lambda number: lanes.submit(lambda lane: lambda: number), range(100), stop, 4,
                             late.append)) as results:
            assert next(results)[0] in range(4)
        with pytest.raises(Interrupted):
            stop.check()
        assert len(late) < 4


def test_a_job_on_a_lane_of_its_own_leaves_nothing_open(tmp_path):
    """An executor in another process runs thousands of jobs, each with a copy of all that it needs."""
    make_source(tmp_path / "hf")
    planned = plan_conversion(Options(tmp_path / "hf", tmp_path / "nt", tp=2))
    (tmp_path / "files").mkdir()
    work = pickle.dumps(Work(planned.plan, Folder(tmp_path / "files"), 4096, planned.identities))
    gc.collect()
    held = len(os.listdir("/proc/self/fd")), threading.active_count()
    for job in planned.plan.jobs:
        assert [file.path for file in run_job(pickle.loads(work), job).files] == [file.path for file in job.files]
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == held


def test_nothing_is_written_after_an_error():
    with closing(Lane(64)) as lane, pytest.raises(ZeroDivisionError):
        writing = Writing(lane)
        with writing.settled():
            writing.write(lambda: 1 / 0)
            writing.write(lambda: pytest.fail("nothing is done after an error"))


def test_what_reads_nothing_takes_no_buffer():
    """Of buffers that are few, none is held up by a task that closes a file or writes zeros."""
    with closing(Lane(64)) as lane:
        writing, begun, go_on = Writing(lane), lane.buffer(), threading.Event()
        with writing.settled():
            writing.write(lambda: go_on.wait(5), reads=False)
            assert lane.buffer() is begun
            go_on.set()
            writing.write(lambda: None)
            assert lane.buffer() is not begun
