"""What may stand at a destination before a run: this very output, which is done; anything else is replaced only where it
is asked for, and only by a whole one."""
import os

import pytest
from attempts import MIDDLE, flip
from faults import after_fault, clean_error, kill, manifest_of, tree_of
from sources import edit_config, make_source

from stream_reshard.cli import main


def test_the_same_command_on_a_finished_destination_has_nothing_to_do(done):
    """A job that a scheduler starts again must not fail because it had just ended well."""
    before = {path: path.stat().st_mtime_ns for path in done.destination.rglob("*")}
    code, out = done.run()
    assert code == 0 and done.tree() == done.wanted
    assert {path: path.stat().st_mtime_ns for path in done.destination.rglob("*")} == before
    assert main([str(done.source), str(done.destination), *done.flags, "--json"]) == 0


NOT_FINISHED = {
    "a file missing": lambda root: (root / "config.yaml").unlink(),
    "a file more": lambda root: (root / "notes").touch(),
    "a file cut": lambda root: os.truncate(root / "config.yaml", 9),
    "no marker": lambda root: (root / "model_config.json").unlink(),
    "no manifest": lambda root: (root / "stream_reshard.json").unlink(),
    "manifest damaged": lambda root: flip(root / "stream_reshard.json")}


@pytest.mark.parametrize("change", NOT_FINISHED.values(), ids=NOT_FINISHED.keys())
def test_a_destination_that_is_not_this_output_is_refused(done, change):
    change(done.destination)
    before = done.tree()
    code, err = done.run()
    assert clean_error(code, err, (4,)) is None and "is not empty" in err and "--overwrite" in err
    assert done.tree() == before


@pytest.mark.parametrize("flags", [("--tp", "1"), ("--dp", "4"), ()], ids=str)
def test_overwrite_replaces_a_checkpoint(done, flags):
    old = done.tree()
    if flags:
        assert done.run(flags=flags)[0] == 4 and done.tree() == old, "without --overwrite nothing happens"
    assert done.run(flags=(*flags, "--overwrite"))[0] == 0
    assert (done.tree() == old) == (not flags) and done.beside() == []


def test_overwrite_keeps_the_old_one_until_the_new_one_is_whole(done):
    old = done.tree()
    assert done.run(kill(MIDDLE, False), flags=("--tp", "1", "--overwrite"))[0] == -9
    assert done.tree() == old
    assert done.run(flags=("--tp", "1", "--overwrite"))[0] == 0 and done.tree() != old and done.beside() == []


def test_overwrite_does_not_replace_what_is_no_checkpoint(done):
    done.clear()
    done.destination.mkdir()
    (done.destination / "thesis.tex").write_text("mine")
    code, err = done.run(flags=("--overwrite",))
    assert clean_error(code, err, (4,)) is None and "does not look like a Nanotron checkpoint" in err
    assert (done.destination / "thesis.tex").read_text() == "mine" and done.beside() == []


@pytest.mark.parametrize("name", ["train.py", "notes/thesis.tex", "model/notes.txt"])
def test_overwrite_does_not_take_away_what_stands_in_a_checkpoint(done, name):
    (done.destination / name).parent.mkdir(exist_ok=True)
    (done.destination / name).write_text("mine")
    code, err = done.run(flags=("--tp", "1", "--overwrite"))
    assert clean_error(code, err, (4,)) is None and "would be lost" in err
    assert (done.destination / name).read_text() == "mine" and done.beside() == []


def test_overwrite_does_not_replace_hugging_face_weights(done):
    done.clear()
    make_source(done.destination)
    before = done.tree()
    code, err = done.run(flags=("--overwrite",))
    assert clean_error(code, err, (4,)) is None and done.tree() == before


def test_the_working_folder_is_not_renamed_away(tmp_path, monkeypatch, capsys):
    make_source(tmp_path / "hf")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["../hf", ".", "--quiet"]) == 4 and "working folder" in capsys.readouterr().err
    assert main(["../hf", "", "--overwrite"]) == 2
    assert os.getcwd() == str(tmp_path / "here")


def test_a_finished_destination_that_was_damaged_is_not_called_finished(done):
    flip(next(done.destination.rglob("*o_proj/*")))
    code, err = done.run()
    assert clean_error(code, err, (4,)) is None and "damaged since" in err and "o_proj" in err
    assert done.run(flags=("--overwrite",))[0] == 0 and done.tree() == done.wanted


def test_a_destination_that_fills_up_meanwhile_is_not_replaced(done):
    done.clear()

    def fill(number, name, call):
        if number == MIDDLE:
            os.makedirs(done.destination / "photos")
        return call()

    code, err = done.run(fill)
    assert clean_error(code, err, (4,)) is None and "is not empty" in err
    assert (done.destination / "photos").is_dir()
    os.removedirs(done.destination / "photos")
    assert after_fault(done) is None


def test_the_manifest_tells_the_source_and_every_file(done):
    manifest = manifest_of(done.destination)
    assert {file["path"] for file in manifest["files"]} == done.wanted.keys() - {"stream_reshard.json"}
    assert manifest["run"]["source"] == str(done.source)
    assert str(done.source / "tokenizer.json") in manifest["run"]["copied"]


def test_a_source_named_by_a_relative_path_is_the_same_source(tmp_path, monkeypatch, capsys):
    make_source(tmp_path / "hf")
    command = ["nt", "--quiet", "--max-memory", "4GiB"]
    monkeypatch.chdir(tmp_path)
    assert main(["hf", *command]) == 0
    before = tree_of(tmp_path / "nt")
    assert main([str(tmp_path / "hf"), *command]) == 0, capsys.readouterr().err
    edit_config(tmp_path / "hf", {"rms_norm_eps": 1e-6})
    assert main(["hf", *command]) == 4
    assert tree_of(tmp_path / "nt") == before
