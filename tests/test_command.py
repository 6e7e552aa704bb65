"""The command among its neighbours: signals that are ignored or come early, a stdout that takes nothing, a mount point."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sources import make_source

from stream_reshard import cli, header, staging
from stream_reshard.cli import main
from stream_reshard.errors import Interrupted, Problems
from stream_reshard.stop import Stop

ROOT = Path(__file__).parents[1]


def started(*words, **how):
    return subprocess.run([sys.executable, "-m", "stream_reshard", *map(str, words)], cwd=ROOT, text=True, **how)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_stays_ignored(number):
    """As nohup does it, and a shell for what it runs in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with cli._listening(Stop()):
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_signal_while_headers_are_read_ends_at_once(tmp_path, monkeypatch, capsys):
    """And not after all of them, as one problem among others."""
    make_source(tmp_path / "hf", num_shards=5)
    read, seen = header.parse_header, []

    def slow(*args):
        seen.append(args)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return read(*args)

    monkeypatch.setattr(header, "parse_header", slow)
    assert main(["plan", str(tmp_path / "hf")]) == 143
    assert len(seen) == 1 and capsys.readouterr().err == "error: interrupted by SIGTERM\n"


def test_an_interruption_is_no_problem_among_others():
    def interrupted():
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        Problems().collect(interrupted)


def test_the_first_signal_counts_also_after_a_failure_elsewhere():
    stop = Stop()
    stop.request()
    assert stop.interruption().exit_code == 130 and not stop.signal_number
    stop.request(signal.SIGTERM)
    stop.request(signal.SIGINT)
    assert stop.interruption().exit_code == 143


@pytest.mark.parametrize("flags", [["--json"], []], ids=str)
def test_a_stdout_that_is_full_is_named_as_such(tmp_path, flags):
    make_source(tmp_path / "hf")
    with open("/dev/full", "w") as full:
        run = started(tmp_path / "hf", tmp_path / "nt", *flags, stdout=full, stderr=subprocess.PIPE)
    assert run.returncode == 6 and run.stderr.startswith("error: standard output: No space left on device")
    assert (tmp_path / "nt").exists() == bool(flags)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
def test_a_mount_point_is_refused_before_the_work(tmp_path, capsys, flags):
    """No other folder can take its name: at the end of the run it would be too late to say so."""
    make_source(tmp_path / "hf")
    (tmp_path / "nt").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "nt"], check=True)
    try:
        assert main([str(tmp_path / "hf"), str(tmp_path / "nt"), "--quiet", *flags]) == 4
        assert "is a mount point" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", tmp_path / "nt"], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "nt"]


def test_a_vast_number_of_stages_is_refused_at_once(tmp_path, capsys):
    make_source(tmp_path / "hf")
    assert main(["plan", str(tmp_path / "hf"), "--pp", "2000000000"]) == 2
    assert "--pp can be 1, 2" in capsys.readouterr().err


def test_an_overwritten_checkpoint_that_cannot_be_removed_is_named(tmp_path, monkeypatch, capsys):
    """The new one is there and right: that is no failure."""
    source, flags = make_source(tmp_path / "hf"), ["--max-memory", "4GiB", "--overwrite"]
    assert main([str(source), str(tmp_path / "nt"), "--quiet"]) == 0
    monkeypatch.setattr(staging, "clear", lambda folder: None)
    assert main([str(source), str(tmp_path / "nt"), "--tp", "2", *flags]) == 0
    left = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("left "))
    assert ".replaced: the old checkpoint could not be removed" in left and (tmp_path / "nt" / "config.yaml").exists()
