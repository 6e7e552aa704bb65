"""Run again after a stop: what is done is kept if it is what the journal says, everything else is written anew; and
what may stand at a destination before a run."""
import json
import os
import shutil
import signal
import subprocess

import pytest
from faults import Case, after_fault, clean_error, manifest_of, tree_of
from sources import edit_config, make_source

from stream_reshard import api
from stream_reshard.cli import main
from stream_reshard.destination.staging import staging_of

MIDDLE = 200
"""A call in the middle of a run."""


@pytest.fixture
def stopped(tmp_path):
    """A case whose run was killed in the middle."""
    case = Case(tmp_path)
    case.clear()
    case.run(stop_at(MIDDLE))
    assert case.tree() is None and len(finished(case)) > 5
    return case


def stop_at(at):
    def act(number, name, call):
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call()
    return act


def finished(case):
    """The tensor files under their final names in the staging folder."""
    return sorted(staging_of(case.destination).rglob("model_weight*.safetensors"))


def journal_of(case):
    return staging_of(case.destination) / "stream_reshard.journal"


def flip(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_what_is_done_is_kept(stopped):
    before = {path.relative_to(staging_of(stopped.destination)): path.stat().st_ino for path in finished(stopped)}
    code, out = stopped.run(flags=("--json",))
    assert code == 0 and json.loads(out)["num_files_kept"] in (len(before), len(before) - 1)
    after = {path: (stopped.destination / path).stat().st_ino for path in before}
    assert len(before.items() - after.items()) <= 1, "but for the file that the journal did not come to name"
    assert stopped.tree() == stopped.wanted and stopped.beside() == []


DAMAGES = {
    "a bit of a kept file": lambda case: flip(finished(case)[0]),
    "a bit of a header": lambda case: flip(finished(case)[0], 20),
    "a kept file cut": lambda case: os.truncate(finished(case)[0], 100),
    "a kept file gone": lambda case: finished(case)[0].unlink(),
    "a kept file longer": lambda case: open(finished(case)[0], "ab").write(b"x"),
    "all kept files gone": lambda case: [path.unlink() for path in finished(case)],
    "the journal's tail torn": lambda case: os.truncate(journal_of(case), journal_of(case).stat().st_size - 9),
    "the journal's tail zeros": lambda case: open(journal_of(case), "ab").write(bytes(4096)),
    "the journal's tail nonsense": lambda case: open(journal_of(case), "ab").write(b'{"path": 1}\n[]\n\xff\xfe\n'),
    "a line of the journal damaged": lambda case: flip(journal_of(case), -30),
    "a temp file of 1 MB": lambda case: (finished(case)[0].parent / ".x.0123456789ab.part").write_bytes(bytes(10**6)),
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


def test_the_same_command_on_a_finished_destination_has_nothing_to_do(tmp_path):
    """A job that a scheduler starts again must not fail because it had just ended well."""
    case = Case(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in case.destination.rglob("*")}
    code, out = case.run()
    assert code == 0 and case.tree() == case.wanted
    assert {path: path.stat().st_mtime_ns for path in case.destination.rglob("*")} == before
    assert main([str(case.source), str(case.destination), *case.flags, "--json"]) == 0


NOT_FINISHED = {
    "a file missing": lambda root: (root / "config.yaml").unlink(),
    "a file more": lambda root: (root / "notes").touch(),
    "a file cut": lambda root: os.truncate(root / "config.yaml", 9),
    "no marker": lambda root: (root / "model_config.json").unlink(),
    "no manifest": lambda root: (root / "stream_reshard.json").unlink(),
    "manifest damaged": lambda root: flip(root / "stream_reshard.json")}


@pytest.mark.parametrize("change", NOT_FINISHED.values(), ids=NOT_FINISHED.keys())
def test_a_destination_that_is_not_this_output_is_refused(tmp_path, change):
    case = Case(tmp_path)
    change(case.destination)
    before = case.tree()
    code, err = case.run()
    assert clean_error(code, err, (4,)) is None and "is not empty" in err and "--overwrite" in err
    assert case.tree() == before


@pytest.mark.parametrize("flags", [("--tp", "1"), ("--dp", "4"), ()], ids=str)
def test_overwrite_replaces_a_checkpoint(tmp_path, flags):
    case = Case(tmp_path)
    old = case.tree()
    if flags:
        assert case.run(flags=flags)[0] == 4 and case.tree() == old, "without --overwrite nothing happens"
    assert case.run(flags=(*flags, "--overwrite"))[0] == 0
    assert (case.tree() == old) == (not flags) and case.beside() == []


def test_overwrite_keeps_the_old_one_until_the_new_one_is_whole(tmp_path):
    case = Case(tmp_path)
    old = case.tree()
    assert case.run(stop_at(MIDDLE), flags=("--tp", "1", "--overwrite"))[0] == -9
    assert case.tree() == old
    assert case.run(flags=("--tp", "1", "--overwrite"))[0] == 0 and case.tree() != old and case.beside() == []


def test_overwrite_does_not_replace_what_is_no_checkpoint(tmp_path):
    case = Case(tmp_path)
    case.clear()
    case.destination.mkdir()
    (case.destination / "thesis.tex").write_text("mine")
    code, err = case.run(flags=("--overwrite",))
    assert clean_error(code, err, (4,)) is None and "does not look like a Nanotron checkpoint" in err
    assert (case.destination / "thesis.tex").read_text() == "mine" and case.beside() == []


@pytest.mark.parametrize("name", ["train.py", "notes/thesis.tex", "model/notes.txt"])
def test_overwrite_does_not_take_away_what_stands_in_a_checkpoint(tmp_path, name):
    case = Case(tmp_path)
    (case.destination / name).parent.mkdir(exist_ok=True)
    (case.destination / name).write_text("mine")
    code, err = case.run(flags=("--tp", "1", "--overwrite"))
    assert clean_error(code, err, (4,)) is None and "would be lost" in err
    assert (case.destination / name).read_text() == "mine" and case.beside() == []


def test_overwrite_does_not_replace_hugging_face_weights(tmp_path):
    case = Case(tmp_path)
    case.clear()
    make_source(case.destination)
    before = case.tree()
    code, err = case.run(flags=("--overwrite",))
    assert clean_error(code, err, (4,)) is None and case.tree() == before


def test_the_working_folder_is_not_renamed_away(tmp_path, monkeypatch, capsys):
    make_source(tmp_path / "hf")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["../hf", ".", "--quiet"]) == 4 and "working folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["../hf", "", "--overwrite"])
    assert os.getcwd() == str(tmp_path / "here")


def test_a_finished_destination_that_was_damaged_is_not_called_finished(tmp_path):
    case = Case(tmp_path)
    flip(next(case.destination.rglob("*o_proj/*")))
    code, err = case.run()
    assert clean_error(code, err, (4,)) is None and "damaged since" in err and "o_proj" in err
    assert case.run(flags=("--overwrite",))[0] == 0 and case.tree() == case.wanted


def test_a_destination_that_fills_up_meanwhile_is_not_replaced(tmp_path):
    case = Case(tmp_path)
    case.clear()

    def fill(number, name, call):
        if number == MIDDLE:
            os.makedirs(case.destination / "photos")
        return call()

    code, err = case.run(fill)
    assert clean_error(code, err, (4,)) is None and "is not empty" in err
    assert (case.destination / "photos").is_dir()
    os.removedirs(case.destination / "photos")
    assert after_fault(case) is None


def test_the_manifest_tells_the_source_and_every_file(tmp_path):
    case = Case(tmp_path)
    manifest = manifest_of(case.destination)
    assert {file["path"] for file in manifest["files"]} == case.wanted.keys() - {"stream_reshard.json"}
    assert manifest["run"]["source"] == str(case.source)
    assert str(case.source / "tokenizer.json") in manifest["run"]["copied"]


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


def moved(case, source=None, destination=None):
    """The same case after its source, or what is at its destination, was renamed."""
    other = object.__new__(Case)
    other.__dict__ |= case.__dict__ | {"source": source or case.source, "destination": destination or case.destination}
    if source:
        case.source.rename(source)
    if destination:
        staging_of(case.destination).rename(staging_of(destination))
    return other


def kept_of(case, *flags):
    code, out = case.run(flags=("--json", *flags))
    assert code == 0, out
    return json.loads(out)["num_files_kept"]


def test_a_source_that_is_mounted_elsewhere_is_the_same_source(stopped):
    """Its path is text for people: a run goes on, and what is finished is finished."""
    num_done = len(finished(stopped))
    case = moved(stopped, source=stopped.root / "elsewhere")
    assert kept_of(case) >= num_done - 1 and case.tree() == case.wanted | {
        "stream_reshard.json": case.tree()["stream_reshard.json"]}
    assert manifest_of(case.destination)["run"]["source"] == str(case.source)
    case = moved(case, source=stopped.root / "elsewhere again")
    before = tree_of(case.destination)
    code, out = case.run(flags=("--json",))
    assert code == 0 and json.loads(out)["already_done"] and tree_of(case.destination) == before


def test_numbers_of_devices_and_inodes_are_no_part_of_a_run(stopped, monkeypatch):
    """A mount gives them: FUSE and NFS after each reboot, every node its own."""
    from stream_reshard.storage import identity
    num_done = len(finished(stopped))
    real = identity.identity_of
    for module in ("storage.identity", "run.output", "destination.companions", "storage.source_file"):
        monkeypatch.setattr(f"stream_reshard.{module}.identity_of", lambda status: [
            real(status)[0] + 7, real(status)[1] + 1000, *real(status)[2:]])
    assert kept_of(stopped) >= num_done - 1


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json",
                                  "tokenizer.json"])
@pytest.mark.parametrize("change", [lambda path: os.utime(path, ns=(1, 1)), lambda path: path.write_bytes(path.read_bytes()),
                                    lambda path: path.chmod(0o600)], ids=["mtime", "written", "ctime"])
def test_a_source_that_changed_since_is_another_source(stopped, name, change):
    change(stopped.source / name)
    code, err = stopped.run()
    assert clean_error(code, err, (4,)) is None and "another plan or source" in err


def test_a_destination_that_is_mounted_elsewhere_goes_on_and_names_its_new_place(stopped):
    num_done = len(finished(stopped))
    (stopped.root / "new").mkdir()
    case = moved(stopped, destination=stopped.root / "new" / "nt")
    assert kept_of(case) >= num_done - 1
    assert f'"{case.destination}"' in (case.destination / "config.yaml").read_text()
    assert {path: digest for path, digest in case.tree().items() if path.startswith("model/")} == {
        path: digest for path, digest in case.wanted.items() if path.startswith("model/")}


def test_a_finished_destination_that_moved_is_not_called_done(tmp_path):
    """Its config.yaml starts from where it stood."""
    case = Case(tmp_path)
    case.destination.rename(tmp_path / "moved")
    other = object.__new__(Case)
    other.__dict__ |= case.__dict__ | {"destination": tmp_path / "moved"}
    code, err = other.run()
    assert clean_error(code, err, (4,)) is None and "complete, but was made at another place, which config.yaml names" in err
    assert other.run(flags=("--overwrite",))[0] == 0 and f"{tmp_path}/moved" in (tmp_path / "moved/config.yaml").read_text()


def test_a_working_folder_that_changes_after_the_plan_changes_nothing(tmp_path, monkeypatch):
    make_source(tmp_path / "a" / "hf")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    plan = api.plan("hf", "nt", max_memory="4GiB")
    monkeypatch.chdir(tmp_path / "b")
    lines = "\n".join(api.run(plan).lines)
    assert (tmp_path / "a" / "nt" / "config.yaml").exists() and not os.listdir(tmp_path / "b")
    assert lines.count(f"{tmp_path}/a/nt") == 2


def mounted(kind, root, image):
    """Mount what holds source and destination, under another device number each time."""
    command = {"ext4": ["mount", "-o", "loop", image, root], "bindfs": ["bindfs", image, root]}[kind]
    subprocess.run(list(map(str, command)), check=True)


@pytest.mark.heavy
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kind", ["ext4", "bindfs"])
@pytest.mark.parametrize("is_elsewhere", [False, True], ids=["same path", "another path"])
def test_a_remount_between_two_attempts(tmp_path, kind, is_elsewhere):
    """ext4 on another loop device, FUSE with another number; at the same path, or at another one."""
    if not shutil.which({"ext4": "mkfs.ext4", "bindfs": "bindfs"}[kind]):
        pytest.skip(f"{kind} is not installed")
    image, one, other, spare = (tmp_path / name for name in ("image", "one", "other", "spare"))
    for folder in (one, other, spare):
        folder.mkdir()
    if kind == "ext4":
        with open(image, "wb") as stream:
            stream.truncate(2**26)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        shutil.copy(image, tmp_path / "image2")
    else:
        image.mkdir()
    roots = []

    def mount(root, image):
        mounted(kind, root, image)
        roots.append(root)

    def unmount(root):
        subprocess.run(["umount", root], check=True)
        roots.remove(root)

    try:
        mount(one, image)
        case = Case(one)
        wanted = case.wanted
        case.clear()
        case.run(stop_at(MIDDLE))
        num_done, device = len(finished(case)), os.stat(case.source).st_dev
        assert num_done > 5
        unmount(one)
        mount(spare, tmp_path / "image2" if kind == "ext4" else image)  # It takes the number that was free.
        place = other if is_elsewhere else one
        mount(place, image)
        case.source, case.destination, case.root = place / "hf", place / "nt", place
        assert os.stat(case.source).st_dev != device
        assert kept_of(case) >= num_done - 1
        assert {path for path in wanted if case.tree()[path] != wanted[path]} <= {"config.yaml", "stream_reshard.json"}
        assert case.run(flags=("--json",))[0] == 0
    finally:
        for root in list(roots):
            unmount(root)
