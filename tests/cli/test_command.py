"""The command among its neighbours: signals that are ignored or come early, and what it leaves as it found it."""
import os
import signal
import subprocess
import sys
import time

import pytest
from running import ROOT
from sources import make_source

from stream_reshard.cli import entry, main
from stream_reshard.cli.flags import COMMANDS, parser, parser_of
from stream_reshard.destination import staging
from stream_reshard.errors import Interrupted, Problems, SourceError
from stream_reshard.machine.stop import Stop
from stream_reshard.storage import header


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    text = (parser_of(command) if command else parser()).format_help()
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_a_dependency_that_is_absent_is_one_line():
    """As in a clone that runs with a Python in which nothing is installed."""
    code = "import sys; sys.modules['xxhash'] = None; from stream_reshard.cli import script; script()"
    run = subprocess.run([sys.executable, "-c", code, "env"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("error: ") and "has no module xxhash" in run.stderr


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_stays_ignored(number):
    """As nohup does it, and a shell for what it runs in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with entry._listening(Stop()):
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


def test_an_overwritten_checkpoint_that_cannot_be_removed_is_named(tmp_path, monkeypatch, capsys):
    """The new one is there and right: that is no failure."""
    source, flags = make_source(tmp_path / "hf"), ["--max-memory", "4GiB", "--overwrite"]
    assert main([str(source), str(tmp_path / "nt"), "--quiet"]) == 0
    monkeypatch.setattr(staging, "clear", lambda folder, naming: None)
    assert main([str(source), str(tmp_path / "nt"), "--tp", "2", *flags]) == 0
    left = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("left "))
    assert ".replaced: the old checkpoint could not be removed" in left and (tmp_path / "nt" / "config.yaml").exists()


def test_how_threads_take_turns_is_put_back(tmp_path, monkeypatch):
    """A run sets it for itself, whoever starts it, also where it fails."""
    from stream_reshard import api
    make_source(tmp_path / "hf")
    before, seen = sys.getswitchinterval(), []
    plan = api.plan(tmp_path / "hf", tmp_path / "nt", max_memory="4GiB")
    api.run(plan, lambda done, total: seen.append(sys.getswitchinterval()))
    assert set(seen) == {api._SWITCH_SECONDS} and sys.getswitchinterval() == before
    plan = api.plan(tmp_path / "hf", tmp_path / "nt2", max_memory="4GiB")
    (tmp_path / "hf" / "model.safetensors").touch()
    with pytest.raises(SourceError):
        api.run(plan)
    assert sys.getswitchinterval() == before
