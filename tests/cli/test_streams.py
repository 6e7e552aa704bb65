"""Streams, locales and working folders of all kinds: what is said is a printable line, and what is asked for is done."""
import os
import subprocess
import sys

import pytest
import yaml
from running import ROOT
from shells import shelled, started
from sources import make_source

from stream_reshard.cli import main
from stream_reshard.errors import shell_word


@pytest.mark.parametrize("flags", [["--json"], []], ids=str)
def test_a_stdout_that_is_full_is_named_as_such(tmp_path, flags):
    make_source(tmp_path / "hf")
    with open("/dev/full", "w") as full:
        run = started(tmp_path / "hf", tmp_path / "nt", *flags, stdout=full, stderr=subprocess.PIPE)
    assert run.returncode == 6 and "error: standard output: No space left on device" in run.stderr.splitlines()
    assert (tmp_path / "nt").exists() == bool(flags)


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
    found, _, err = shelled(behind, "plan", tmp_path / "none")
    assert found == 3 and "Traceback" not in err, err
    if code == 0:
        assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "nt"), "--quiet"]) == 0


def test_no_file_gets_the_number_of_a_stream_that_was_closed(tmp_path):
    """What C libraries and dying interpreters say goes to that number."""
    code = ("import os, sys; [os.close(n) for n in (0, 1, 2)]; from stream_reshard.cli import entry; entry._mend_streams(); "
            "sys.exit(40 + os.open(os.devnull, os.O_RDONLY))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 43


def test_a_reader_that_goes_away_is_no_failure(tmp_path):
    """`... | head -1` in a script with pipefail: the work is done all the same, and its exit code says so."""
    make_source(tmp_path / "hf")
    for words in (["plan", tmp_path / "hf"], [tmp_path / "hf", tmp_path / "nt"], ["verify", tmp_path / "hf", tmp_path / "nt"]):
        reading, writing = os.pipe()
        os.close(reading)
        run = started(*words, "--quiet" if words[0] == "verify" else "--max-memory=4GiB", stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        assert run.returncode == 0 and "error" not in run.stderr, run.stderr
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


ASCII, LATIN = {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}
PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ODD = "é\U0001f600a\nb\u2028x\u0085q\"u'o\\t\t"


@pytest.mark.parametrize("name, env", [
    pytest.param(name, env, id=f"{next(iter(env.values()))}-{ascii(name)}")
    for name, env in ((ODD, ASCII), (ODD, PLAIN_C), (ODD, LATIN), ("\udce9", PLAIN_C), ("\udce9", LATIN), ("é", ASCII))])
def test_names_in_any_locale(tmp_path, name, env):
    """Plan, run, summary and errors are printable, and config.yaml names the folder in which it stands."""
    source, copy = make_source(tmp_path / f"hf{name}"), tmp_path / f"nt{name}"
    (source / "tokenizer.json").write_text("{}")
    code, _, err = shelled("", source / "none", copy, env=env)
    assert code == 3 and err.startswith("error: ") and err.isascii() and err.count("\n") == 1
    code, out, err = shelled("", source, copy, env=env)
    assert code == 0 and all(line.isprintable() for line in (out + err).splitlines())
    told = yaml.safe_load((copy / "config.yaml").read_text())
    assert told["model"]["init_method"]["path"] == told["tokenizer"]["tokenizer_name_or_path"] == str(copy)
    assert told["checkpoints"]["checkpoints_path"] == f"{copy}-training"


@pytest.mark.parametrize("name", ["plain", "a b", "it's", "é", "a\nb", "it's\n", "\udce9", "x\u2028y", "\\\n", "\"'\x1b$(x)`"],
                         ids=ascii)
def test_a_command_to_go_on_is_what_a_shell_reads(name):
    run = subprocess.run(["bash", "-c", f"printf %s {shell_word(name)}".encode(errors="surrogateescape")], capture_output=True)
    assert run.stdout == os.fsencode(name)
