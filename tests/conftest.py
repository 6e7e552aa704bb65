"""What several test files share: figures of the campaigns, printed at the end of a run, and the fixtures of verify."""
import shutil
from functools import cache, partial

import pytest
from damage import bare
from running import call, deadline
from trees import make

from stream_reshard.machine import memory

_KEY = pytest.StashKey[list]()


@pytest.fixture
def figures(request):
    """figures(what, tried, violations): note a campaign for the summary, and fail where there are violations."""
    def note(what, tried, violations):
        request.config.stash.setdefault(_KEY, []).append((what, tried, len(violations)))
        assert tried and not violations, "\n".join(map(str, violations[:10]))
    return note


def pytest_terminal_summary(terminalreporter, config):
    """One line per campaign."""
    for what, tried, wrong in config.stash.get(_KEY, []):
        terminalreporter.write_line(f"campaign: {what}: {tried} tried, {wrong} violations")


@pytest.fixture
def held(monkeypatch):
    """Looking for the children of the test process takes a third of a run. Limits are tested in other processes."""
    monkeypatch.setattr(memory, "resident", lambda: 2**28)


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
        with deadline(2):
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


pytest.register_assert_rewrite("headers")


@pytest.fixture(autouse=True, scope="session")
def imports_of_other_tests_do_not_count():
    """This process may hold torch and transformers, half a GiB. What a run reckons with is that of a process of its
    own, in which the tests of memory start the command."""
    real = memory.resident
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "resident", lambda: min(real(), 128 * 2**20))
        yield
