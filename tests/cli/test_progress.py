"""Progress in a log: lines when stderr is no terminal, none where a user does not want them."""
import os
import re

import pytest
from shells import shelled
from sources import make_source

from stream_reshard.cli.screen import Progress

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (converting|verifying) \d+%, .* of .*, memory \d.*")


def test_a_batch_log_has_lines(tmp_path):
    """Each phase begins and ends with one, and nothing else stands there."""
    source = make_source(tmp_path / "hf")
    code, _, err = shelled("", source, tmp_path / "nt", "--verify", env={"TQDM_DISABLE": ""})
    assert code == 0 and all(map(LINE.fullmatch, err.splitlines())), err
    assert [line for line in err.splitlines() if " converting 100%" in line] and " verifying 100%" in err
    code, _, err = shelled("", "verify", source, tmp_path / "nt", env={"TQDM_DISABLE": ""})
    assert code == 0 and err.splitlines()[-1].count(" verifying 100%") == 1


@pytest.mark.parametrize("env, flags", [({"TQDM_DISABLE": "1"}, []), ({"TQDM_DISABLE": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}, []),
                                        ({"TQDM_DISABLE": ""}, ["--quiet"])])
def test_nobody_is_told_who_does_not_want_it(tmp_path, env, flags):
    source = make_source(tmp_path / "hf")
    assert shelled("", source, tmp_path / "nt", *flags, env=env)[::2] == (0, "")


def test_a_long_run_is_not_a_long_log(monkeypatch, capsys):
    """A line for each tenth of the work, or after half a minute, however often a file becomes durable."""
    monkeypatch.setenv("TQDM_DISABLE", "")
    clock = [0.0]
    monkeypatch.setattr("stream_reshard.cli.screen.time.monotonic", lambda: clock[0])
    with Progress("converting", "B", False) as show:
        for done in range(10_001):
            clock[0] += 0.1  # 1,000 seconds in all
            show(done * 2**20, 10_000 * 2**20)
    lines = capsys.readouterr().err.splitlines()
    assert 30 <= len(lines) <= 45 and "100%" in lines[-1] and "s left" in lines[5], len(lines)


def test_errors_are_red_on_a_terminal_alone(tmp_path):
    import pty
    for env, word in (({}, b"\x1b[1;31merror:\x1b[0m"), ({"NO_COLOR": "1"}, b"error: ")):
        pid, terminal = pty.fork()
        if not pid:
            import sys
            os.environ.update(env)
            os.execv(sys.executable, [sys.executable, "-m", "stream_reshard", "plan", str(tmp_path / "none")])
        seen = b""
        while True:
            try:
                piece = os.read(terminal, 4096)
            except OSError:
                break
            if not piece:
                break
            seen += piece
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3 and seen.startswith(word), seen
        os.close(terminal)
