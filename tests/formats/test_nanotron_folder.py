"""Which folder of Nanotron's is taken: latest.txt is followed as Nanotron follows it; litter of desktops is not read."""
import json
import os
import shutil

import pytest
from conversions import assert_same, convert, tensors, tree
from running import call, said
from sources import make_source

from stream_reshard.cli import main


@pytest.fixture
def steps(tmp_path):
    """A folder of steps with latest.txt; the source stands beside it."""
    source = make_source(tmp_path / "hf")
    for step in ("9", "10"):
        convert(source, tmp_path / "steps" / step, "--tp", 2)
    (tmp_path / "steps" / "latest.txt").write_text("10")
    return tmp_path / "steps"


NOTE = "latest.txt in '{}' names step 10: '{}/10' is taken, as Nanotron takes it"


def test_latest_is_followed_by_every_command(steps, capsys):
    source, note = steps.parent / "hf", NOTE.format(steps, steps)
    commands = [("plan", steps, "--to", "hf"), (steps, steps.parent / "back", "--to", "hf"), ("verify", source, steps),
                ("verify", steps, source), ("diff", steps, steps / "10"),
                ("plan", source, "--template", steps)]
    for command in commands:
        assert (main(list(map(str, command))) if command[0] == "diff" else call(*command)) == 0, said(capsys)
        out, err = capsys.readouterr()
        assert note in out and err == "", command
    assert call("inspect", steps, "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [note]
    assert_same(tensors(steps.parent / "back"), tensors(source))


def test_the_source_is_the_folder_that_is_followed(steps, capsys):
    (steps / "10" / "tokenizer.json").write_text("{}")
    (steps / "tokenizer.json").write_text("[]")
    (steps / "10" / "stream_reshard.json").unlink()
    assert call(steps, steps.parent / "nt", "--to", "nanotron", "--vocab-size", 11, "--tp", 1) == 0
    assert f"source   {steps}/10\n" in capsys.readouterr().out
    assert (steps.parent / "nt" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("text", ["10\n", " +10 ", "1_0", "0010", "\u0661\u0660"])
def test_the_number_is_what_python_takes_for_one(steps, text):
    """As `int(fi.read())` in Nanotron's parse_ckpt_path."""
    (steps / "latest.txt").write_text(text)
    assert call("verify", steps.parent / "hf", steps) == 0


BROKEN = [
    ("text", lambda path: path.write_text("ten"), "holds 'ten', which is not the number of a step"),
    ("nothing", lambda path: path.write_text(""), "holds '', which is not the number of a step"),
    ("bytes", lambda path: path.write_bytes(b"\xff\xfe1"), "which is not the number of a step"),
    ("another step", lambda path: path.write_text("11"), "names step 11, but there is no folder 11 beside it"),
    ("a path", lambda path: path.write_text("../10"), "which is not the number of a step"),
    ("digits without end", lambda path: path.write_text("1" * 10**6), "latest.txt"),
    ("a folder", lambda path: (path.unlink(), path.mkdir()), "latest.txt"),
    ("a pipe", lambda path: (path.unlink(), os.mkfifo(path)), "latest.txt"),
    ("a link to nothing", lambda path: (path.unlink(), path.symlink_to("gone")), "is a link to 'gone'"),
    ("a pointer", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull")]


@pytest.mark.parametrize("change, message", [pytest.param(*row[1:], id=row[0]) for row in BROKEN])
def test_a_broken_latest_is_one_line(steps, capsys, change, message):
    change(steps / "latest.txt")
    for command in (["plan", steps, "--to", "hf"], ["inspect", steps], ["verify", steps, steps.parent / "hf"]):
        assert call(*command) == 3
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out == "", err


def test_a_checkpoint_that_holds_latest_is_two(steps, capsys):
    """Nanotron would take the folder inside; a copy with such a file is not what was converted."""
    shutil.copytree(steps / "9", steps / "10" / "7")
    (steps / "10" / "latest.txt").write_text("7")
    assert call("plan", steps / "10", "--to", "hf") == 3
    assert "Nanotron would take the folder 7 that it names" in capsys.readouterr().err
    assert call("verify", steps.parent / "hf", steps / "10") == 5
    assert "'latest.txt' is extra" in capsys.readouterr().err


def test_a_step_that_is_no_checkpoint(steps, capsys):
    shutil.rmtree(steps / "10")
    (steps / "10").mkdir()
    assert call("plan", steps, "--to", "hf") == 3
    assert "steps/10' holds neither config.json nor" in capsys.readouterr().err


LITTER = [".DS_Store", "model/.DS_Store", "decoder/0/._pp_block", "lm_head/Thumbs.db", "decoder/desktop.ini",
          "__MACOSX/model/._model_weight.safetensors", "decoder/0/pp_block/.nfs00000000012345670000abcd",
          "token_position_embeddings/pp_block/token_embedding/._model_weight_pp-rank-0-of-1_tp-rank-0-of-2.safetensors",
          "decoder/.nfs00000000012345670000abcd", "decoder/.DS_Store"]


def test_litter_is_not_read(tmp_path, capsys):
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "nt", "--tp", 2)
    before = tree(tmp_path / "nt")
    for name in LITTER:
        path = tmp_path / "nt" / "model" / (name if name.startswith((".", "m", "_")) else f"model/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    (tmp_path / "nt" / "stream_reshard.json").unlink()
    assert call(tmp_path / "nt", tmp_path / "back", "--to", "hf", "--vocab-size", 11) == 0
    assert "8 files that macOS or Windows left below model/, such as" in capsys.readouterr().out
    assert_same(tensors(tmp_path / "back"), tensors(source))
    assert call("verify", source, tmp_path / "nt") == 0
    assert "left below model/" in capsys.readouterr().out
    assert call("inspect", tmp_path / "nt", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["faults"] == [] and "left below model/" in told["notes"][0] and told["num_files"] == len(before)
    assert main(["diff", str(tmp_path / "nt"), str(source)]) == 5 and "left below model/" in capsys.readouterr().out
    assert call("plan", source, "--template", tmp_path / "nt") == 0
    assert "left below model/" in capsys.readouterr().out


@pytest.mark.parametrize("name", [".nfs_my_backup.tar", "notes.txt", ".hidden", ".nfs0123"])
def test_what_is_no_litter_is_still_a_fault(tmp_path, capsys, name):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt")
    (tmp_path / "nt" / "model" / name).touch()
    assert call(tmp_path / "nt", tmp_path / "back", "--to", "hf") == 3
    assert f"'model/{name}' is not a file that Nanotron writes" in capsys.readouterr().err
