"""Before the last rename every file is there as it was written, the folder is the run's own, and so is the lock; or
nothing is committed, and what another run has put there stays as it is."""
import json
import os
import shutil
import subprocess
import time

import pytest
from faults import FLAGS, Case, after_fault, campaign, clean_error, tree_of, until

from stream_reshard.cli import main
from stream_reshard.destination import staging as package
from stream_reshard.destination.staging import lock_of, staging_of

FOREIGN = {"pid": 17, "host": "node7", "boot": "elsewhere", "since": "2024-01-01 00:00:00 +0000", "token": "other"}


def make(root):
    return with_gate(Case(root))


def make_overwriting(root):
    """An older checkpoint of another topology stands at the destination."""
    def before(case):
        assert main([str(case.source), str(case.destination), "--quiet", "--max-memory", "4GiB"]) == 0
        case.old = tree_of(case.destination)

    return with_gate(Case(root, (*FLAGS, "--overwrite"), before=before))


def with_gate(case):
    """Notes the number of the call by which the output gets its name, and that of the last one before which a file is
    looked at."""
    names = case.operations
    case.named = max(at for at, name in enumerate(names, 1) if name in ("rename", "exchange")
                     and (name == "exchange" or "exchange" not in names))
    case.looked = case.named - 3  # In between the folder is opened and closed, to see whether it is still there.
    return case


def at_call(number, act):
    def acted(count, name, call):
        if count == number:
            act()
        return call()
    return acted


def remove(path):
    subprocess.run(["rm", "-rf", str(path)], check=True)  # Not by functions that the harness counts.


def untouched(case):
    """The destination is as it was before the run."""
    return case.tree() == getattr(case, "old", None)


def emptied(case, point):
    part, is_replaced = point
    number = max(1, round(part * (case.looked + 1)))
    staging = staging_of(case.destination)

    def act():
        remove(staging)
        if is_replaced:
            subprocess.run(["sh", "-c", 'mkdir "$1" && echo theirs > "$1/theirs"', "sh", str(staging)], check=True)

    case.clear()
    code, err = case.run(at_call(number, act))
    if code == 0:
        return "committed" if number > 12 or case.tree() != case.wanted else None
    if is_replaced and tree_of(staging).keys() != {"theirs"}:
        return f"wrote into another's folder: {sorted(tree_of(staging))}"
    remove(staging)
    expected = (4, 6) if number < 12 else (6,)  # What stands there as the run begins is refused.
    wrong = clean_error(code, err, expected) or (None if untouched(case) else "touched the destination")
    return wrong or after_fault(case, [getattr(case, "old", None)])


BOTH = [make, pytest.param(make_overwriting, marks=pytest.mark.heavy)]


@pytest.mark.parametrize("make_case", BOTH)
def test_the_staging_folder_is_removed_under_the_run(quick_path, figures, make_case):
    points = [(at / 20, at % 2 == 0) for at in range(1, 21)]
    figures(f"rm -rf DST.partial, {make_case.__name__}", *campaign(quick_path, make_case, emptied, points))


def weights(root, word):
    return next((path for path in sorted(root.rglob("*.safetensors")) if word in str(path)), None)


def swap(root, path):
    other = weights(root, "embedding")
    os.system(f"mv '{path}' '{path}.x' && mv '{other}' '{path}' && mv '{path}.x' '{other}'")


def link(root, path):
    shutil.copy(path, root.parent / "elsewhere")
    os.system(f"ln -sf '{root.parent / 'elsewhere'}' '{path}'")


def link_above(root, path):
    os.system(f"mv '{path.parent}' '{root.parent / 'above'}' && ln -s '{root.parent / 'above'}' '{path.parent}'")


DAMAGES = {
    "cut": lambda root, path: os.system(f"truncate -s 10 '{path}'"),
    "longer": lambda root, path: os.system(f"echo >> '{path}'"),
    "swapped with one of another size": swap,
    "removed": lambda root, path: remove(path),
    "its folder removed": lambda root, path: remove(path.parent),
    "a link to the same bytes": link,
    "a link above it": link_above,
    "a folder": lambda root, path: os.system(f"rm '{path}' && mkdir '{path}'"),
    "a pipe": lambda root, path: os.system(f"rm '{path}' && mkfifo '{path}'"),
    "the marker removed": lambda root, path: remove(root / "model_config.json"),
    "the manifest removed": lambda root, path: remove(root / "stream_reshard.json"),
    "the manifest cut": lambda root, path: os.system(f"truncate -s 99 '{root / 'stream_reshard.json'}'"),
    "a tokenizer removed": lambda root, path: remove(root / "tokenizer.json")}


def damaged(case, point):
    name, before = point
    staging = staging_of(case.destination)

    def act():
        DAMAGES[name](staging, weights(staging, "input_layernorm"))

    case.clear()
    remove(case.root / "elsewhere")
    remove(case.root / "above")
    code, err = case.run(at_call(case.looked - before, act))
    wrong = clean_error(code, err, (6,)) or (None if "nothing was committed" in err else err)
    if wrong or not untouched(case):
        return wrong or "touched the destination"
    if (staging / "model_config.json").exists():
        return "what is not whole is still marked as whole"
    for path in [path for path in staging.rglob("*") if path.is_symlink() or path.is_fifo() or
                 (path.is_dir() and path.suffix)]:
        remove(path)  # What no run has made is for a person to remove.
    return after_fault(case, [getattr(case, "old", None)])


@pytest.mark.parametrize("make_case", BOTH)
def test_a_file_changes_before_the_commit(quick_path, figures, make_case):
    """Just before, and a few calls earlier; the same command writes what is missing."""
    points = [(name, before) for name in DAMAGES for before in ((0, 3) if make_case == make_overwriting else (0,))]
    figures(f"files damaged before the commit, {make_case.__name__}", *campaign(quick_path, make_case, damaged, points))


def robbed(case, point):
    is_new, part = point
    lock, staging = lock_of(case.destination), staging_of(case.destination)

    def act():
        if is_new:
            remove(lock)
        with open(lock, "w" if is_new else "r+") as stream:
            stream.write(json.dumps(FOREIGN).ljust(1024))
        (case.root / "seen").write_text(json.dumps(sorted(tree_of(staging))))

    case.clear()
    code, err = case.run(at_call(round(part * case.looked), act))
    if wrong := clean_error(code, err, (7,)) or (None if "process 17 on 'node7' since '2024" in err else err):
        return wrong
    if not untouched(case) or json.loads(lock.read_text()) != FOREIGN:
        return "touched the destination, or the other run's lock"
    gone = {path for path in json.loads((case.root / "seen").read_text()) if not path.endswith(".part")}
    if gone := gone - tree_of(staging).keys() - {"stream_reshard.journal"}:
        return f"removed from the folder: {gone}"
    lock.unlink()
    return after_fault(case, [getattr(case, "old", None)])


@pytest.mark.parametrize("make_case", BOTH)
def test_the_lock_is_taken_by_another(quick_path, figures, make_case):
    """Also where the file stays and only says another name, as two mounts of one folder may have it."""
    points = [(is_new, part) for is_new in (False, True) for part in (0.5, 0.7, 0.8, 0.9, 1)]
    figures(f"locks lost, {make_case.__name__}", *campaign(quick_path, make_case, robbed, points))


def test_a_lost_lock_is_noticed_while_jobs_run(tmp_path):
    """Not only at the end: what is written until then goes into a folder that may be another run's."""
    case = make(tmp_path)
    staging = staging_of(case.destination)

    def act():
        lock_of(case.destination).write_text(json.dumps(FOREIGN))
        (tmp_path / "seen").write_text(str(len(list(staging.rglob("*.safetensors")))))

    case.clear()
    code, err = case.run(at_call(case.named // 3, act), lambda: setattr(package, "CONFIRM_SECONDS", 0))
    assert clean_error(code, err, (7,)) is None
    after = len(list(staging.rglob("*.safetensors"))) - int((tmp_path / "seen").read_text())
    assert after <= 6 < sum(path.endswith(".safetensors") for path in case.wanted) // 2, "no more than its job"


@pytest.fixture
def two_mounts(tmp_path):
    """One folder under two names, each a FUSE mount of its own that keeps its locks to itself."""
    if os.geteuid() or not shutil.which("bindfs"):
        pytest.skip("needs root and bindfs")
    mounts = [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "real").mkdir()
    try:
        for mount in mounts:
            mount.mkdir()
            subprocess.run(["bindfs", tmp_path / "real", mount], check=True)
        yield mounts
    finally:
        for mount in mounts:
            subprocess.run(["umount", "-l", mount], check=False)


def waiting_case(tmp_path, one, number):
    """A run through the first mount that waits before a call, and what lets it go on."""
    case = Case(tmp_path, destination=one / "nt")
    case.clear()

    def pause(count, name, call):
        while count == number and not (tmp_path / "go").exists():
            (tmp_path / "waits").touch()
            time.sleep(0.01)
        return call()

    pid = case.start(pause)
    assert until((tmp_path / "waits").exists)
    return case, pid


@pytest.mark.heavy
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 1])
def test_two_mounts_of_one_folder(tmp_path, two_mounts, part):
    """The second run sees that the first is alive, whatever the locks of its own mount say; and where a person takes
    the lock away, it is the first that ends."""
    one, other = two_mounts
    number = round(part * with_gate(Case(tmp_path, destination=one / "nt")).looked)
    second = Case(tmp_path, destination=other / "nt")
    first, pid = waiting_case(tmp_path, one, number)
    pipe = first.pipe
    for flags in ((), ("--restart",), ("--break-lock",), ("--overwrite", "--break-lock")):
        code, err = second.run(flags=flags)
        assert code == 7 and f"process {pid} on" in err, (code, err)
    lock_of(other / "nt").unlink()
    code, err = second.run(flags=("--restart",))
    if code == 4:  # All but its name: without the lock nothing shows that it was to get that.
        staging_of(other / "nt").rename(other / "away")
        code, err = second.run()
    assert code == 0, err
    (tmp_path / "go").touch()
    first.pipe = pipe
    code, err = first.wait(pid)
    assert code in (6, 7) and clean_error(code, err, (6, 7)) is None, (code, err)
    assert second.tree() == second.wanted and second.beside() == []


def test_random_points_of_the_last_gate_are_before_the_rename(tmp_path):
    """The campaigns above end where they should: the call after the last of theirs gives the output its name."""
    case = make(tmp_path)
    assert case.operations[case.named - 1] == "rename" and case.looked < case.named
