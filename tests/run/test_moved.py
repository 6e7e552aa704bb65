"""Paths and mounts may change between two runs: sources are known by what they are, and a destination by its name."""
import json
import os
import shutil
import subprocess

import pytest
from attempts import kill_in_the_middle, num_kept, weights_of
from faults import Case, clean_error, manifest_of, tree_of
from running import call
from sources import INDEX, make_source
from training import make_training

from stream_reshard import api
from stream_reshard.destination.staging import staging_of


def moved(case, source=None, destination=None):
    """The same case after its source, or what is at its destination, was renamed."""
    other = object.__new__(Case)
    other.__dict__ |= case.__dict__ | {"source": source or case.source, "destination": destination or case.destination}
    if source:
        case.source.rename(source)
    if destination:
        staging_of(case.destination).rename(staging_of(destination))
    return other


@pytest.fixture
def own(tmp_path):
    """A case whose run was killed in the middle, of a source that may be moved or changed."""
    case = Case(tmp_path)
    kill_in_the_middle(case)
    return case


def test_a_source_that_is_mounted_elsewhere_is_the_same_source(own):
    """Its path is text for people: a run goes on, and what is finished is finished."""
    num_done = len(weights_of(own))
    case = moved(own, source=own.root / "elsewhere")
    assert num_kept(case) >= num_done - 1 and case.tree() == case.wanted | {
        "stream_reshard.json": case.tree()["stream_reshard.json"]}
    assert manifest_of(case.destination)["run"]["source"] == str(case.source)
    case = moved(case, source=own.root / "elsewhere again")
    before = tree_of(case.destination)
    code, out = case.run(flags=("--json",))
    assert code == 0 and json.loads(out)["already_done"] and tree_of(case.destination) == before


def test_numbers_of_devices_and_inodes_are_no_part_of_a_run(stopped, monkeypatch):
    """A mount gives them: FUSE and NFS after each reboot, every node its own."""
    from stream_reshard.storage import identity
    num_done = len(weights_of(stopped))
    real = identity.identity_of
    for module in ("storage.identity", "run.writing", "destination.companions", "storage.source_file"):
        monkeypatch.setattr(f"stream_reshard.{module}.identity_of", lambda status: [
            real(status)[0] + 7, real(status)[1] + 1000, *real(status)[2:]])
    assert num_kept(stopped) >= num_done - 1


def written(path):
    """The same bytes once more."""
    path.write_bytes(path.read_bytes())


SHARD = "model-00001-of-00002.safetensors"
CHANGES = {"mtime": (SHARD, lambda path: os.utime(path, ns=(1, 1))), "ctime": (SHARD, lambda path: path.chmod(0o600)),
           **{name: (name, written) for name in (SHARD, "config.json", INDEX, "tokenizer.json")}}


@pytest.mark.parametrize("name, change", CHANGES.values(), ids=CHANGES)
def test_a_source_that_changed_since_is_another_source(own, name, change):
    change(own.source / name)
    code, err = own.run()
    assert clean_error(code, err, (4,)) is None and "another plan or source" in err


def test_a_destination_that_is_mounted_elsewhere_goes_on_and_names_its_new_place(stopped):
    num_done = len(weights_of(stopped))
    (stopped.root / "new").mkdir()
    case = moved(stopped, destination=stopped.root / "new" / "nt")
    assert num_kept(case) >= num_done - 1
    assert f'"{case.destination}"' in (case.destination / "config.yaml").read_text()
    assert {path: digest for path, digest in case.tree().items() if path.startswith("model/")} == {
        path: digest for path, digest in case.wanted.items() if path.startswith("model/")}


@pytest.mark.parametrize("name", ["moved", "a: b", "\xe4", "a long name of many words " * 4])
def test_a_training_that_was_renamed_is_known(tmp_path, capsys, name):
    """However YAML writes the path."""
    source, flags = make_training(tmp_path / "source"), ("--quiet", "--to", "nanotron")
    assert call(source, tmp_path / "first", *flags) == 0
    (tmp_path / "first").rename(tmp_path / name)
    assert call(source, tmp_path / name, *flags) == 4
    assert "complete, but was made at another place, which config.yaml names" in capsys.readouterr().err
    assert call(source, tmp_path / name, *flags, "--overwrite") == 0
    (tmp_path / name).rename(tmp_path / "second")
    assert call(source, tmp_path / "second", *flags) == 4
    assert "made at another place" in capsys.readouterr().err


def test_a_finished_destination_that_moved_is_not_called_done(done):
    """Its config.yaml starts from where it stood."""
    done.destination.rename(place := done.root / "moved")
    other = object.__new__(Case)
    other.__dict__ |= done.__dict__ | {"destination": place}
    code, err = other.run()
    assert clean_error(code, err, (4,)) is None and "complete, but was made at another place, which config.yaml names" in err
    assert other.run(flags=("--overwrite",))[0] == 0 and str(place) in (place / "config.yaml").read_text()


def test_a_working_folder_that_changes_after_the_plan_changes_nothing(tmp_path, monkeypatch):
    make_source(tmp_path / "a" / "hf")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    plan = api.plan("hf", "nt", max_memory="4GiB")
    monkeypatch.chdir(tmp_path / "b")
    lines = "\n".join(api.run(plan).lines)
    assert (tmp_path / "a" / "nt" / "config.yaml").exists() and not os.listdir(tmp_path / "b")
    assert lines.count(f"{tmp_path}/a/nt") == 3


class Mounts:
    """What holds source and destination, mounted under another device number each time."""

    def __init__(self, folder, kind):
        self.kind, self.image, self.spare, self.roots = kind, folder / "image", folder / "image2", []
        if kind == "bindfs":
            self.image.mkdir()
            self.spare = self.image
            return
        with open(self.image, "wb") as stream:
            stream.truncate(2**26)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True)
        shutil.copy(self.image, self.spare)

    def mount(self, root, image=None):
        root.mkdir(exist_ok=True)
        command = {"ext4": ["mount", "-o", "loop"], "bindfs": ["bindfs"]}[self.kind]
        subprocess.run([*command, image or self.image, root], check=True)
        self.roots.append(root)

    def unmount(self, root):
        subprocess.run(["umount", root], check=True)
        self.roots.remove(root)

    def close(self):
        for root in list(self.roots):
            self.unmount(root)


@pytest.mark.heavy
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kind", ["ext4", "bindfs"])
@pytest.mark.parametrize("is_elsewhere", [False, True], ids=["same path", "another path"])
def test_a_remount_between_two_attempts(tmp_path, kind, is_elsewhere):
    """ext4 on another loop device, FUSE with another number; at the same path, or at another one."""
    if not shutil.which({"ext4": "mkfs.ext4", "bindfs": "bindfs"}[kind]):
        pytest.skip(f"{kind} is not installed")
    mounts, one = Mounts(tmp_path, kind), tmp_path / "one"
    try:
        mounts.mount(one)
        case = Case(one)
        kill_in_the_middle(case)
        num_done, device = len(weights_of(case)), os.stat(case.source).st_dev
        mounts.unmount(one)
        mounts.mount(tmp_path / "spare", mounts.spare)  # It takes the number that was free.
        place = tmp_path / "other" if is_elsewhere else one
        mounts.mount(place)
        case.source, case.destination, case.root = place / "hf", place / "nt", place
        assert os.stat(case.source).st_dev != device
        assert num_kept(case) >= num_done - 1
        tree, wanted = case.tree(), case.wanted
        assert {path for path in wanted if tree[path] != wanted[path]} <= {"config.yaml", "stream_reshard.json"}
        assert case.run(flags=("--json",))[0] == 0
    finally:
        mounts.close()
