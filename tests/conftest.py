"""What several test files share: figures of the campaigns, printed at the end of a run; runs that ended or were killed;
the fixtures of verify."""
import os
import shutil
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from attempts import make_shared, place, place_half
from damage import bare
from running import call, deadline
from sources import make_source
from trees import make

from stream_reshard.machine import memory

CAMPAIGN = "campaign"

os.environ["TQDM_DISABLE"] = "1"
"""Lines of progress would stand between the messages that tests read; tests of progress take it away."""


@pytest.fixture
def figures(record_property):
    """figures(what, tried, violations): note a campaign for the summary, and fail where there are violations."""
    def note(what, tried, violations):
        record_property(CAMPAIGN, f"{what}: {tried} tried, {len(violations)} violations")
        assert tried and not violations, "\n".join(map(str, violations[:10]))
    return note


def pytest_terminal_summary(terminalreporter):
    """One line per campaign, also of those that other processes of pytest-xdist have run."""
    for report in (*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())):
        for name, line in report.user_properties if report.when == "call" else ():
            if name == CAMPAIGN:
                terminalreporter.write_line(f"campaign: {line}")


MEMORY_DISK = Path("/dev/shm")


def has_room_in_memory(nbytes):
    """A disk in memory is there, and has so many bytes free."""
    status = os.statvfs(MEMORY_DISK) if os.access(MEMORY_DISK, os.W_OK) else None
    return status is not None and status.f_bavail * status.f_frsize >= nbytes


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """The quick tests work in memory where there is room: a disk would take as long to sync their thousands of small
    files as the tests take. The heavy tests, whose models are large, work on the disk."""
    is_quick = config.option.markexpr == "not heavy" and config.option.basetemp is None
    if is_quick and has_room_in_memory(2**32):
        folder = TemporaryDirectory(dir=MEMORY_DISK, prefix="stream_reshard_tests_")
        config.add_cleanup(folder.cleanup)
        config.option.basetemp = Path(folder.name) / "pytest"


@contextmanager
def folder_in_memory(otherwise):
    """What a killed process has written is there whatever holds the files: a disk would only take its time to sync
    them. Power cuts, clones and full disks have disks of their own."""
    if not has_room_in_memory(2**30):
        yield otherwise
        return
    with TemporaryDirectory(dir=MEMORY_DISK, prefix="stream_reshard_test_") as folder:
        yield Path(folder)


@pytest.fixture
def quick_path(tmp_path):
    """A folder for campaigns of faults and for many small files, in memory where there is room."""
    with folder_in_memory(tmp_path) as folder:
        yield folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A case with copies of what its runs leave (attempts.py). Its source stays as it is: a journal knows it by its
    times."""
    with folder_in_memory(tmp_path_factory.mktemp("shared")) as folder:
        yield make_shared(folder)


@pytest.fixture
def stopped(shared):
    """A case whose run was killed in the middle."""
    return place_half(shared)


@pytest.fixture
def done(shared):
    """A case whose run has ended well."""
    place(shared, "whole", shared.destination)
    return shared


@pytest.fixture
def open_to_all(tmp_path):
    """A folder in which anybody may write, and into which anybody may go. All that a run imports is imported, as not
    everybody may read the modules of this interpreter."""
    first, copy = make_source(tmp_path / "first"), tmp_path / "copy"
    assert call(first, copy, "--quiet") == call("verify", first, copy, "--quiet") == 0
    shutil.rmtree(first)
    shutil.rmtree(copy)
    for folder in (tmp_path, *tmp_path.parents):
        if os.stat(folder).st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o005)
    tmp_path.chmod(0o777)
    return tmp_path


@pytest.fixture(scope="session")
def torch():
    """torch, for the tests that ask for it, and not before: a process that holds it takes twice as long to fork. It has
    one thread, as the other cores run other tests."""
    module = pytest.importorskip("torch")
    module.set_num_threads(1)
    return module


@pytest.fixture(scope="session")
def transformers(torch):
    """transformers, in the same way."""
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind): a checkpoint that stays as it is."""
    root = tmp_path_factory.mktemp("made")
    return cache(partial(make, root))


@pytest.fixture
def copied(made, tmp_path):
    """copied(kind, is_bare): one that a test may break, without its manifest where it is bare."""
    def copy(kind, is_bare=True):
        shutil.copytree(made(kind), root := tmp_path / "copy")
        if is_bare:
            bare(root)
        return root
    return copy


@pytest.fixture
def verify(capsys):
    """verify(source, copy, *flags): (exit code, stdout, problems). What is wrong is told in printable lines, soon."""
    def run(*arguments, command="verify"):
        with deadline(30):
            code = call(command, *arguments)
        out, err = capsys.readouterr()
        assert all(line.isprintable() and line.isascii() for line in err.splitlines()), err
        assert (code in (0, 2)) or all(line.startswith("error: ") for line in err.splitlines()), err
        return code, out, [line.removeprefix("error: ") for line in err.splitlines()]
    return run


@pytest.fixture
def differs(verify):
    """The copy is refused with exit code 5, in words that hold all of these."""
    def run(source, copy, words, *flags):
        code, out, problems = verify(source, copy, *flags)
        assert (code, out) == (5, ""), (code, out, problems)
        assert problems and all(word in "\n".join(problems) for word in words), problems
        return problems
    return run


pytest.register_assert_rewrite("headers", "refusals")


@pytest.fixture(autouse=True, scope="session")
def imports_of_other_tests_do_not_count():
    """This process may hold torch and transformers, half a GiB. What a run reckons with is that of a process of its
    own, in which the tests of memory start the command. Nor is it measured: to look for the children of a process
    takes a fifth of a plan."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "resident", lambda: 128 * 2**20)
        yield
