"""The command among its neighbours: signals that are ignored or come early, a stdout that takes nothing, a mount point."""
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from sources import make_source

from stream_reshard.cli import commands as cli
from stream_reshard.cli import main
from stream_reshard.destination import staging
from stream_reshard.errors import Interrupted, Problems, SourceError, shell_word
from stream_reshard.machine.stop import Stop
from stream_reshard.storage import header

ROOT = Path(__file__).parents[2]


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
    monkeypatch.setattr(staging, "clear", lambda folder, naming: None)
    assert main([str(source), str(tmp_path / "nt"), "--tp", "2", *flags]) == 0
    left = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("left "))
    assert ".replaced: the old checkpoint could not be removed" in left and (tmp_path / "nt" / "config.yaml").exists()


def shelled(text, *words, cwd=ROOT, env={}):
    """(exit code, stdout, stderr) of the command in a shell that puts `text` behind it; what a limit needs goes before."""
    before, _, behind = text.rpartition("|>")
    command = f'{before} {"" if before.strip().endswith("exec") else "exec"} "$@" {behind}'
    run = subprocess.run(["bash", "-c", command, "bash", sys.executable, "-m", "stream_reshard", *map(str, words)],
                         cwd=cwd, capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT), **env), timeout=60)
    return run.returncode, run.stdout.decode(errors="replace"), run.stderr.decode(errors="replace")


STREAMS = {"stderr closed": ("2>&-", 0), "stdout closed": (">&-", 0), "both closed": (">&- 2>&-", 0),
           "all closed": ("<&- >&- 2>&-", 0), "stderr full": ("2>/dev/full", 0), "stdout full": (">/dev/full", 6),
           "both full": (">/dev/full 2>/dev/full", 6), "nobody reads": ("> >(exec true)", None)}


@pytest.mark.parametrize("behind, code", STREAMS.values(), ids=STREAMS)
def test_streams_that_are_closed_or_full(tmp_path, behind, code):
    """Nothing of a message ends in a file that happens to have the number of the stream."""
    make_source(tmp_path / "hf")
    found, _, err = shelled(behind, tmp_path / "hf", tmp_path / "nt")
    assert found in (0, 6) if code is None else found == code
    assert "Traceback" not in err and (tmp_path / "nt").exists() == (found == 0)
    for words, wrong in ((["plan", tmp_path / "none"], 3), (["--tpp"], 2)):
        found, _, err = shelled(behind, *words)
        assert found == wrong and "Traceback" not in err, err
    if code == 0:
        assert shelled(behind, "verify", tmp_path / "hf", tmp_path / "nt")[0] == 0
        assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "nt"), "--quiet"]) == 0


def test_no_file_gets_the_number_of_a_stream_that_was_closed(tmp_path):
    """What C libraries and dying interpreters say goes to that number."""
    code = ("import os, sys; [os.close(n) for n in (0, 1, 2)]; from stream_reshard.cli import commands; commands._mend_streams(); "
            "sys.exit(40 + os.open(os.devnull, os.O_RDONLY))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 43


def test_a_reader_that_goes_away_is_a_stdout_that_takes_nothing(tmp_path):
    make_source(tmp_path / "hf")
    reading, writing = os.pipe()
    os.close(reading)
    run = started("plan", tmp_path / "hf", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (run.returncode, run.stderr) == (6, "error: standard output: Broken pipe\n")
    reading, writing = os.pipe()
    os.close(reading)
    assert started("plan", tmp_path / "none", stderr=writing).returncode == 3
    os.close(writing)


def test_a_working_folder_that_is_gone(tmp_path):
    """Whole paths work; one that begins there is one line."""
    make_source(tmp_path / "hf")
    source, copy = tmp_path / "hf", tmp_path / "nt"

    def gone(*words):
        (tmp_path / "here").mkdir()
        return shelled('rmdir "$PWD"; |>', *words, cwd=tmp_path / "here")

    assert gone(source, copy, "--quiet") == (0, "", "")
    assert gone("verify", source, copy, "--quiet") == (0, "", "")
    for words, code in (([source, "rel"], 2), (["rel", tmp_path / "x"], 2), (["inspect", "rel"], 3),
                        ([source, tmp_path / "x", "--tokenizer", "."], 2), (["verify", source, "rel"], 5)):
        found, _, err = gone(*words)
        assert found == code and err.startswith("error: ") and err.count("\n") == 1, (words, found, err)


@pytest.mark.parametrize("name", ["é\U0001f600a\nb\u2028x\u0085q\"u'o\\t\t", "\udce9", "é"], ids=ascii)
@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                                 {"PYTHONIOENCODING": "latin-1"}], ids=lambda env: next(iter(env.values())))
def test_names_in_any_locale(tmp_path, name, env):
    """Plan, run, summary and errors are printable, and config.yaml names the folder in which it stands."""
    yaml = pytest.importorskip("yaml")
    source, copy = make_source(tmp_path / f"hf{name}"), tmp_path / f"nt{name}"
    (source / "tokenizer.json").write_text("{}")
    code, _, err = shelled("", source / "none", copy, env=env)
    assert code == 3 and err.startswith("error: ") and err.isascii() and err.count("\n") == 1
    code, out, err = shelled("", source, copy, env=env)
    assert (code, err) == (0, "") and all(line.isprintable() for line in out.splitlines())
    told = yaml.safe_load((copy / "config.yaml").read_text())
    assert told["model"]["init_method"]["path"] == told["tokenizer"]["tokenizer_name_or_path"] == str(copy)
    assert told["checkpoints"]["checkpoints_path"] == f"{copy}-training"


@pytest.mark.parametrize("name", ["plain", "a b", "it's", "é", "a\nb", "it's\n", "\udce9", "x\u2028y", "\\\n", "\"'\x1b$(x)`"],
                         ids=ascii)
def test_a_command_to_go_on_is_what_a_shell_reads(name):
    run = subprocess.run(["bash", "-c", f"printf %s {shell_word(name)}".encode(errors="surrogateescape")], capture_output=True)
    assert run.stdout == os.fsencode(name)


VAST = ["1" + "0" * 30, "9" * 5000, "-" + "9" * 40]


@pytest.mark.parametrize("number", VAST + ["999999999999999"], ids=lambda number: number[:20])
def test_vast_numbers_are_one_line(tmp_path, capsys, number):
    """Also as sizes; those that only set a limit may be as large as they like."""
    source = make_source(tmp_path / "hf")
    flags = ["--tp", "--pp", "--vocab-multiple", "--workers", "--vocab-size", "--max-memory", "--max-shard-size"]
    for words in ([str(source), str(tmp_path / "nt"), flag, number] for flag in flags):
        code = code_of(words)
        err = capsys.readouterr().err.splitlines()
        assert code in (2, 6) or (words[2] in ("--max-memory", "--max-shard-size") and code == 0), (words, code)
        assert all(len(line) < 400 for line in err)
        subprocess.run(["rm", "-rf", tmp_path / "nt"], check=True)
    assert main([str(source), str(tmp_path / "nt"), "--quiet"]) == 0
    for flag in ("--seed", "--workers", "--sample", "--tokens"):
        assert code_of(["verify", str(source), str(tmp_path / "nt"), flag, number]) in (0, 2, 6)
        capsys.readouterr()


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rope_theta", "rms_norm_eps", "max_position_embeddings",
                                 "bos_token_id", "initializer_range", "num_hidden_layers", "head_dim", "sliding_window",
                                 "attention_dropout", "partial_rotary_factor", "rope_scaling"])
def test_vast_numbers_in_a_config_are_no_traceback(tmp_path, capsys, key):
    source = make_source(tmp_path / "hf", config={"rope_scaling": None})
    text = (source / "config.json").read_text().rstrip()[:-1]
    lines = [line for line in text.splitlines() if f'"{key}"' not in line]
    for number in ("1" + "0" * 30, "1" + "0" * 400, "9" * 5000, "1e999", "-1e999"):
        value = f'{{"rope_type": "linear", "factor": {number}}}' if key == "rope_scaling" else number
        (source / "config.json").write_text("\n".join(lines).rstrip().rstrip(",") + f', "{key}": {value}}}')
        assert main(["plan", str(source), "--max-memory", "4GiB"]) in (0, 3)
        assert all(len(line) < 700 for line in capsys.readouterr().err.splitlines())


def code_of(words):
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


def loops(root):
    os.symlink("loop", root / "loop")
    return root / "loop"


def test_links_that_lead_back_to_themselves(tmp_path, capsys):
    """As a folder, and as a file that is given by name."""
    source, loop = make_source(tmp_path / "hf"), loops(tmp_path)
    for words, code in (([loop, tmp_path / "nt"], 3), ([source, loop], 4), ([source, loop / "nt"], 4), (["inspect", loop], 3),
                        (["plan", loop], 3), (["verify", loop, source], 3), (["verify", source, loop], 5), (["diff", loop, source], 3),
                        ([source, tmp_path / "nt", "--tokenizer", loop], 2), ([source, tmp_path / "nt", "--template", loop], 3),
                        ([source, tmp_path / "nt", "--source-sha256", loop], 2)):
        assert code_of([*map(str, words)]) == code, words
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted(os.listdir(tmp_path)) == ["hf", "loop"]


@pytest.mark.parametrize("name, code", [("x", 0), ("tokenizer.json", 0), ("config.json", 3), ("model.safetensors", 3),
                                        ("model/x", 0), ("generation_config.json", 0)])
def test_a_link_in_a_source_that_leads_back_to_itself(tmp_path, capsys, name, code):
    path = make_source(tmp_path / "hf") / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.symlink(path.name, path)
    assert main([str(tmp_path / "hf"), str(tmp_path / "nt"), "--quiet", "--max-memory", "4GiB"]) == code
    assert capsys.readouterr().err.count("\n") == (code != 0)


def nested(root, number=1000):
    """So many folders within each other, made from the inside: no path is that long."""
    os.makedirs(root, exist_ok=True)
    for _ in range(number):
        inner = root.with_name("inner")
        root.rename(inner)
        root.mkdir()
        inner.rename(root / "d")


def test_folders_nested_without_end(tmp_path, capsys):
    source, copy = make_source(tmp_path / "hf"), tmp_path / "nt"
    assert main([str(source), str(copy), "--quiet"]) == 0
    nested(tmp_path / "deep")
    for place, runs in ((source / "other", [([source, tmp_path / "nt2"], 0)]),
                        (source / "model", [([source, tmp_path / "nt3"], 3)]),
                        (copy / "model" / "x", [([copy, tmp_path / "hf2", "--to", "hf"], 3), (["inspect", copy], 3),
                                                ([source, copy], 0)]),
                        (tmp_path / "nt4.partial", [([source, tmp_path / "nt4"], 4)])):
        (tmp_path / "deep").rename(place)
        for words, code in runs:
            assert code_of([*map(str, words), "--quiet"]) == code, words
            err = capsys.readouterr().err
            assert err.count("\n") == (code != 0) and len(err) < 1500, err
        place.rename(tmp_path / "deep")
    subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)


def as_nobody(*words, limits={}):
    """(exit code, stderr) of the command in a fork that has given up the rights of root."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        sys.stderr = open(writing, "w")
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65533)
            os.setuid(65533)
        for number, limit in limits.items():
            resource.setrlimit(number, (limit, limit))
        try:
            code = code_of([*map(str, words), "--quiet"])
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    os.close(writing)
    with open(reading) as stream:
        err = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), err


@pytest.fixture
def open_to_all(tmp_path):
    """A folder in which anybody may write, and into which anybody may go."""
    for folder in (tmp_path, *tmp_path.parents):
        if os.stat(folder).st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o005)
    tmp_path.chmod(0o777)
    return tmp_path


def test_a_folder_that_may_not_be_read_is_an_error(open_to_all):
    """And is not skipped: what is in it would be taken for not there."""
    source, copy = make_source(open_to_all / "hf"), open_to_all / "nt"
    assert as_nobody(source, copy) == (0, "")
    for closed, runs in ((copy / "model" / "closed", [([source, copy, "--overwrite"], 4), ([source, copy], 4), (["inspect", copy], 3),
                                                      ([copy, open_to_all / "hf2", "--to", "hf"], 3)]),
                         (source / "model", [([source, open_to_all / "nt2"], 3)]),
                         (source / "other", [([source, open_to_all / "nt3"], 0)])):
        closed.mkdir(mode=0)
        for words, code in runs:
            found, err = as_nobody(*words)
            assert found == code and err.count("\n") == (code != 0) and ("Permission denied" in err) == (code != 0), (words, err)
        closed.rmdir()
    for mode in (0, 0o444, 0o111):
        source.chmod(mode)
        for words in ([source, open_to_all / "nt4"], ["plan", source]):
            code, err = as_nobody(*words)
            assert code == 3 and "Permission denied" in err and err.count("\n") == 1, err
    source.chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="a user of its own has no other threads")
@pytest.mark.parametrize("number", [1, 4, 8])
def test_threads_that_are_refused(open_to_all, number):
    """One line, and the same command goes on."""
    source, copy = make_source(open_to_all / "hf"), open_to_all / "nt"
    code, err = as_nobody(source, copy, limits={resource.RLIMIT_NPROC: number})
    if code:
        assert code == 6 and err.startswith("error: the system refuses another thread") and "to go on: " in err, err
        assert as_nobody(source, copy) == (0, "")
    assert main(["verify", str(source), str(copy), "--quiet"]) == 0
    if number == 1:
        code, err = as_nobody("verify", source, copy, "--workers", 4, limits={resource.RLIMIT_NPROC: 1})
        assert code == 6 and err.startswith("error: the system refuses another thread") and err.count("\n") == 1


@pytest.mark.parametrize("mib", [60, 120, 180])
def test_memory_that_is_refused(tmp_path, mib):
    """ulimit -v: also where numpy's library would end the process by itself."""
    source, copy = make_source(tmp_path / "hf"), tmp_path / "nt"
    code, _, err = shelled(f"ulimit -v {mib * 1024}; |>", source, copy, "--quiet")
    if code:
        assert code == 6 and err.startswith("error: the system refuses ") and err.count("\n") <= 2, err
    assert shelled("", source, copy, "--quiet")[0] == 0 and main(["verify", str(source), str(copy), "--quiet"]) == 0


@pytest.mark.parametrize("number", [6, 15, 33])
def test_files_that_cannot_be_opened_are_known_beforehand(tmp_path, number):
    """ulimit -n: nothing is begun that could not be finished, and with a few more the run needs no more."""
    source, copy = make_source(tmp_path / "hf"), tmp_path / "nt"
    code, _, err = shelled(f"ulimit -n {number}; |>", source, copy, "--tp", 2, "--quiet")
    if code:
        assert code == 6 and "ulimit -n" in err and err.count("\n") == 1 and sorted(os.listdir(tmp_path)) == ["hf"], err
    else:
        assert main(["verify", str(source), str(copy), "--quiet"]) == 0
    assert code == 0 or number < 33


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
