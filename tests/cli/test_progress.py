"""Progress in a log: lines when stderr is no terminal, none where a user does not want them."""
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from contextlib import suppress

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


def seen_on(terminal):
    """What was written to a terminal, once nobody has its other end open; closes it."""
    seen = b""
    with suppress(OSError):
        while piece := os.read(terminal, 4096):
            seen += piece
    os.close(terminal)
    return seen


@pytest.mark.parametrize("lines, columns", [(24, 80), (24, 0), (0, 80), (0, 0)])
def test_a_bar_is_drawn_on_a_terminal_that_does_not_tell_its_size(monkeypatch, lines, columns):
    """As it is under script(1) and `docker exec -t`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
    monkeypatch.setenv("TQDM_DISABLE", "")
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("converting", "B", False) as show:
            show(2**20, 2**20)
    drawn = seen_on(ours).decode()
    assert "converting: 100%" in drawn and max(map(len, drawn.split("\r"))) <= 81


def test_errors_are_red_on_a_terminal_alone(tmp_path):
    for env, word in (({}, b"\x1b[1;31merror:\x1b[0m"), ({"NO_COLOR": "1"}, b"error: ")):
        pid, terminal = pty.fork()
        if not pid:
            os.environ.update(env)
            os.execv(sys.executable, [sys.executable, "-m", "stream_reshard", "plan", str(tmp_path / "none")])
        seen = seen_on(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3 and seen.startswith(word), seen
