"""Jobs read in the order in which they were begun, however their threads overtake each other."""
import threading
import time
from contextlib import ExitStack

import pytest

from stream_reshard.run.lanes import Lanes, Writing


@pytest.mark.parametrize("num_workers", [1, 3])
def test_lanes_are_taken_in_the_order_of_the_tickets(num_workers):
    lanes, order = Lanes(num_workers, 64), []

    def job(ticket, delay):
        time.sleep(delay)
        with lanes.taken(ticket):
            order.append(ticket)

    with ExitStack() as held:
        tickets = [held.enter_context(lanes.ticket()) for _ in range(8)]
        threads = [threading.Thread(target=job, args=(ticket, 0.02 * (8 - ticket))) for ticket in tickets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert len(order) == 8 and all(abs(place - ticket) < num_workers for place, ticket in enumerate(order)), order
    lanes.close()


def test_a_job_that_needs_no_lane_holds_nobody_up():
    lanes = Lanes(1, 64)
    with lanes.ticket() as first, lanes.ticket() as third:
        with lanes.ticket() as unused:
            assert unused > third > first
        with lanes.taken(first), lanes.ticket():
            pass
        with lanes.taken(third) as lane, pytest.raises(ZeroDivisionError):
            writing = Writing(lane)
            with writing.settled():
                writing.write(lambda: 1 / 0)
                writing.write(lambda: pytest.fail("nothing is done after an error"))
        with lanes.taken(first):
            pass  # Again, as after an I/O error.
    lanes.close()


def test_what_reads_nothing_takes_no_buffer():
    """Of buffers that are few, none is held up by a task that closes a file or writes zeros."""
    lanes = Lanes(1, 64)
    with lanes.ticket() as ticket, lanes.taken(ticket) as lane:
        writing, begun, go_on = Writing(lane), lane.buffer(), threading.Event()
        with writing.settled():
            writing.write(lambda: go_on.wait(5), reads=False)
            assert lane.buffer() is begun
            go_on.set()
            writing.write(lambda: None)
            assert lane.buffer() is not begun
    lanes.close()
