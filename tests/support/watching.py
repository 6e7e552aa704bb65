"""Watching that nothing is imported, executed or removed, and how much memory is taken meanwhile."""
import sys
import tracemalloc
from contextlib import contextmanager


_WATCHED = {"import", "exec", "compile", "os.system", "os.exec", "os.fork", "subprocess.Popen", "pickle.find_class",
            "marshal.loads", "os.remove", "os.rename", "os.mkdir", "socket.__new__", "ctypes.dlopen"}
_EVENTS, _ARMED = [], []


def _hook(event, arguments):
    """Audit hooks stay for ever: this one listens while there is something in a list."""
    if _ARMED and event in _WATCHED:
        _EVENTS.append((event, str(arguments)[:200]))


sys.addaudithook(_hook)


@contextmanager
def watched(is_traced=True):
    """Lets nothing be imported, executed or removed meanwhile; gives a list in which the peak of memory stands then."""
    peak = []
    if is_traced:
        tracemalloc.start()
    _ARMED.append(1)
    try:
        yield peak
    finally:
        _ARMED.clear()
        peak.append(tracemalloc.get_traced_memory()[1] if is_traced else 0)
        tracemalloc.stop()
    assert not _EVENTS
