"""Run again after a stop: what is done is kept if it is what the journal says, everything else is written anew; what
others have put there is neither taken up nor removed."""
import json
import os
import signal

import pytest
from attempts import MIDDLE, flip, journal_of, weights_of
from faults import Case, after_fault, clean_error, tree_of

from stream_reshard.destination.staging import staging_of


def test_what_is_done_is_kept(stopped):
    before = {path.relative_to(staging_of(stopped.destination)): path.stat().st_ino for path in weights_of(stopped)}
    code, out = stopped.run(flags=("--json",))
    assert code == 0 and json.loads(out)["num_files_kept"] in (len(before), len(before) - 1)
    after = {path: (stopped.destination / path).stat().st_ino for path in before}
    assert len(before.items() - after.items()) <= 1, "but for the file that the journal did not come to name"
    assert stopped.tree() == stopped.wanted and stopped.beside() == []


DAMAGES = {
    "a bit of a kept file": lambda case: flip(weights_of(case)[0]),
    "a bit of a header": lambda case: flip(weights_of(case)[0], 20),
    "a kept file cut": lambda case: os.truncate(weights_of(case)[0], 100),
    "a kept file gone": lambda case: weights_of(case)[0].unlink(),
    "a kept file longer": lambda case: open(weights_of(case)[0], "ab").write(b"x"),
    "all kept files gone": lambda case: [path.unlink() for path in weights_of(case)],
    "the journal's tail torn": lambda case: os.truncate(journal_of(case), journal_of(case).stat().st_size - 9),
    "the journal's tail zeros": lambda case: open(journal_of(case), "ab").write(bytes(4096)),
    "the journal's tail nonsense": lambda case: open(journal_of(case), "ab").write(b'{"path": 1}\n[]\n\xff\xfe\n'),
    "a line of the journal damaged": lambda case: flip(journal_of(case), -30),
    "a temp file of 1 MB": lambda case: (weights_of(case)[0].parent / ".x.0123456789ab.part").write_bytes(bytes(10**6)),
    "an empty lock": lambda case: case.destination.with_name("nt.partial.lock").touch(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_to_what_was_left_is_mended(stopped, damage):
    damage(stopped)
    assert after_fault(stopped) is None


STRANGERS = {
    "a file of the user": lambda root: (root / "notes.txt").write_text("mine"),
    "a file among the weights": lambda root: (root / "model" / "model" / "model_x.safetensors").write_text("mine")}


@pytest.mark.parametrize("plant", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_file_of_someone_else_is_neither_committed_nor_removed(stopped, plant):
    plant(staging_of(stopped.destination))
    code, err = stopped.run()
    assert clean_error(code, err, (4,)) is None and "was not written by this run" in err
    assert [path.read_text() for path in staging_of(stopped.destination).rglob("*") if path.suffix in (".txt",)
            or path.name == "model_x.safetensors"] == ["mine"]
    for path in staging_of(stopped.destination).rglob("*"):
        if path.name in ("notes.txt", "model_x.safetensors"):
            path.unlink()
    assert after_fault(stopped) is None


OTHERS = [(("--tp", "1"), "another plan"), (("--vocab-multiple", "8"), "another plan"),
          (("--rope", "interleaved"), "another plan"), (("--dp", "2"), "another plan"),
          (("--checkpoint-version", "1.4"), "another plan")]


@pytest.mark.parametrize("flags, words", OTHERS, ids=[" ".join(flags) for flags, _ in OTHERS])
def test_another_run_in_the_staging_folder_is_refused(stopped, flags, words):
    """Also where only the files beside the weights would differ; --restart discards it."""
    code, err = stopped.run(flags=flags)
    assert clean_error(code, err, (4,)) is None and words in err and "--restart" in err
    assert stopped.run(flags=(*flags, "--restart"))[0] == 0
    assert stopped.beside() == []


def test_a_staging_folder_of_nobody_is_refused(tmp_path):
    case = Case(tmp_path)
    case.clear()
    (staging_of(case.destination) / "photos").mkdir(parents=True)
    for flags in ((), ("--restart",), ("--restart", "--overwrite")):
        code, err = case.run(flags=flags)
        assert clean_error(code, err, (4,)) is None and "was not left by an interrupted run" in err
    assert (staging_of(case.destination) / "photos").is_dir()


def test_a_finished_checkpoint_in_place_of_the_staging_folder_is_not_thrown_away(tmp_path):
    """`x.partial` may be a destination of its own."""
    case = Case(tmp_path)
    case.destination.rename(staging_of(case.destination))
    before = tree_of(staging_of(case.destination))
    code, err = case.run(flags=("--tp", "1", "--restart"))
    assert clean_error(code, err, (4,)) is None and "was not left by an interrupted run" in err
    assert tree_of(staging_of(case.destination)) == before


@pytest.mark.parametrize("plant", [lambda path, other: os.link(other, path), lambda path, other: os.mkfifo(path),
                                   lambda path, other: path.write_text("my notes\n")],
                         ids=["hard link", "pipe", "someone's file"])
@pytest.mark.parametrize("flags", [(), ("--restart",)], ids=str)
def test_a_journal_of_someone_else_is_not_written_to(stopped, plant, flags):
    journal, other = journal_of(stopped), stopped.root / "mine.csv"
    journal.rename(other)
    content = other.read_bytes()
    plant(journal, other)
    code, err = stopped.run(flags=flags)
    assert clean_error(code, err, (4,)) is None and other.read_bytes() == content


def test_the_resume_command_does_not_throw_away(stopped):
    def interrupt(number, name, call):
        if number == MIDDLE:
            os.kill(os.getpid(), signal.SIGTERM)
        return call()

    code, err = stopped.run(interrupt, flags=("--restart",))
    assert code == 143 and "to go on: python -m stream_reshard" in err and "--restart" not in err.splitlines()[-1]
