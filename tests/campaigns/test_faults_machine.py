"""Faults as the kernel itself makes them: full and read-only disks, limits on file sizes, errors injected into system
calls; and what the file system decides: modes, groups, links."""
import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FLAGS, Case, after_fault, campaign, clean_error, plain
from sources import make_source

from stream_reshard.cli import main
from stream_reshard.storage import durable

ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting and chown need root")
needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")


def at_call(number, prepare):
    """A fault that prepares something when a call's turn comes, and lets the kernel do the rest."""
    def act(count, name, call):
        if count == number:
            prepare()
        return call()
    return act


def limited(case, nbytes):
    """No file may grow past a limit (ulimit -f): first a short write, then EFBIG."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    case.clear()
    code, err = case.run(at_call(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))))
    wrong = clean_error(code, err, (0, 6))
    if wrong is None and code == 6 and "ulimit -f" not in err:
        return f"no cure: {err}"
    return wrong or after_fault(case)


def test_limit_on_file_sizes(tmp_path, figures):
    sizes = [0, 1, 7, 100, 300, 400, 500, 555, 600, 700, 800, 900, 1000, 1100, 1500, 3000, 10**4, 10**5]
    figures("limits on file sizes", *campaign(tmp_path, Case, limited, sizes))


@pytest.fixture
def mounted(tmp_path):
    """mounted(options) is a new tmpfs."""
    made = []

    def mount(*options):
        folder = tmp_path / f"mnt{len(made)}"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], check=True)
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


@needs_root
@pytest.mark.parametrize("options, fill", [
    (["size=2m"], lambda root: (root / "filler").write_bytes(bytes(os.statvfs(root).f_bavail * 4096))),
    (["size=2m", "nr_inodes=80"], lambda root: [(root / f"f{i}").touch() for i in range(os.statvfs(root).f_favail)])])
@pytest.mark.parametrize("number", [1, 20, 60, 200, 300, 390])
def test_a_disk_that_fills_under_the_run(tmp_path, mounted, options, fill, number):
    root = mounted(*options)
    case = Case(tmp_path, destination=root / "nt")
    case.clear()
    code, err = case.run(at_call(number, lambda: fill(root)))
    assert clean_error(code, err, (0, 6)) is None
    assert code == 0 or ("free some space" in err and "to go on: " in err)
    assert not list(root.rglob(".*.part"))
    for path in root.glob("f*"):
        path.unlink()
    assert after_fault(case) is None


@needs_root
@pytest.mark.parametrize("options, words", [(["size=64k"], ["needs", "free"]),
                                            (["size=2m", "nr_inodes=9"], ["files", "room for"])])
def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, mounted, capsys, options, words):
    root = mounted(*options)
    make_source(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(root / "nt"), *FLAGS]) == 6
    err = capsys.readouterr().err
    assert all(word in err for word in words) and not list(root.iterdir())


@needs_root
@pytest.mark.parametrize("how", ["read-only mount", "immutable folder", "plain file", "in a plain file"])
def test_a_destination_that_cannot_be_written(tmp_path, capsys, how):
    """Refused with 4, and nothing is left behind."""
    make_source(tmp_path / "hf")
    folder, undo = tmp_path / "folder", None
    folder.mkdir()
    destination = folder / "nt"
    if how == "read-only mount":
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        undo = ["umount", folder]
    elif how == "immutable folder":
        if subprocess.run(["chattr", "+i", folder], check=False).returncode:
            pytest.skip("this file system has no immutable folders")
        undo = ["chattr", "-i", folder]
    else:
        destination.write_text("kept")
        destination = destination / "nt" if how.startswith("in") else destination
    try:
        assert main([str(tmp_path / "hf"), str(destination), *FLAGS]) == 4
    finally:
        if undo:
            subprocess.run(undo, check=True)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "Traceback" not in err and str(folder) in err
    assert [path.name for path in folder.iterdir()] == ([] if undo else ["nt"])


STRACED = [("fsync", "error=EIO"), ("fsync", "error=ENOSPC"), ("pwritev2", "error=ENOSPC"), ("pwritev2", "error=EIO"),
           ("pwritev2", "retval=100"), ("pwrite64", "error=EIO"), ("fallocate", "error=ENOSPC"),
           ("renameat", "error=EIO"), ("openat", "signal=KILL"), ("pwritev2", "signal=KILL"), ("fsync", "signal=KILL"),
           ("renameat", "signal=KILL"), ("fsync", "signal=TERM"), ("pwritev2", "signal=INT")]
"""System call, and what is injected into it. `retval=100` is a write that lies: it writes nothing and says 100."""


@needs_strace
@pytest.mark.heavy
@pytest.mark.parametrize("call, fault", STRACED)
@pytest.mark.parametrize("when", [3, 17])
def test_faults_injected_into_system_calls(tmp_path, call, fault, when):
    case = Case(tmp_path)
    case.clear()
    where = ["-P", str(case.destination.with_name("nt.partial"))] if call == "openat" else []
    command = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}",
               *where, sys.executable, "-m", "stream_reshard", str(case.source), str(case.destination), *case.flags]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if fault == "retval=100":  # Only a comparison finds it: the digest was made of what should have been written.
        verdict = main(["verify", str(case.source), str(case.destination), "--quiet"]) if run.returncode == 0 else 6
        assert verdict in (5, 6)
        return
    assert "Traceback" not in run.stderr
    assert run.returncode in {"KILL": (-9, 0), "TERM": (143, 0), "INT": (130, 0)}.get(fault[7:], (0, 6))
    assert after_fault(case) is None


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    for path in make_source(tmp_path / "hf").iterdir():
        path.chmod(0o666)  # Else the modes of the source count too (test_private.py).
    before = os.umask(umask)
    try:
        assert main([str(tmp_path / "hf"), str(tmp_path / "nt"), *FLAGS]) == 0
    finally:
        os.umask(before)
    for path in [tmp_path / "nt", *(tmp_path / "nt").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


@needs_root
def test_a_folder_with_a_group_of_its_own_keeps_it(tmp_path):
    make_source(tmp_path / "hf")
    (tmp_path / "shared").mkdir()
    os.chown(tmp_path / "shared", -1, 12345)
    (tmp_path / "shared").chmod(0o2775)
    assert main([str(tmp_path / "hf"), str(tmp_path / "shared" / "nt"), *FLAGS]) == 0
    assert {path.stat().st_gid for path in (tmp_path / "shared").rglob("*")} == {12345}


def planted(case, path):
    """A link in what an interrupted run left, to a file that must stay as it is."""
    case.clear()
    case.run(at_call(200, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    victim, place = case.root / "victim", case.destination.with_name("nt.partial") / path
    victim.mkdir(exist_ok=True)
    (victim / "kept").write_text("kept")
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(victim if place.suffix == "" else victim / "kept")
    before = sorted((path.name, path.read_bytes()) for path in victim.iterdir())
    code, err = case.run()
    if sorted((path.name, path.read_bytes()) for path in victim.iterdir()) != before:
        return "written through a link"
    wrong = clean_error(code, err, (4,)) or (None if "link" in err else err)
    if path in (".", "stream_reshard.journal"):
        case.clear()
    else:
        place.unlink()
    return wrong or clean_error(*case.run(flags=("--restart",)), (0,)) or after_fault(case)


def test_nothing_is_written_through_a_link(quick_path, figures):
    paths = [".", "model", "model/model/decoder", "stream_reshard.journal", "tokenizer.json", "model_config.json",
             "model/model/decoder/0/pp_block/input_layernorm/model_weight.safetensors", "config.yaml"]
    figures("planted links", *campaign(quick_path, Case, planted, paths))


def test_a_destination_that_is_a_link_is_resolved_once_and_said(tmp_path, capsys):
    make_source(tmp_path / "hf")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert main([str(tmp_path / "hf"), str(tmp_path / "link"), "--max-memory", "4GiB"]) == 0
    assert f"link' is a link; '{tmp_path / 'real'}' is written" in capsys.readouterr().out
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model_config.json").exists()


def test_folders_that_cannot_be_synced_are_tolerated(tmp_path):
    """Some network file systems answer EINVAL to an fsync of a folder."""
    case = Case(tmp_path)
    case.clear()
    folders = set()

    def act(count, name, call):
        done = None if name == "fsync" and folders else call()
        return done

    def prepare():
        real = os.fsync

        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "Invalid argument")
            real(descriptor)
        os.fsync = fsync

    assert case.run(act, prepare)[0] == 0 and case.tree() == case.wanted


def test_where_names_cannot_be_swapped_two_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "exchange", lambda one, other: False)
    case = Case(tmp_path, (*FLAGS, "--overwrite"),
                before=lambda case: main([str(case.source), str(case.destination), "--quiet"]))
    assert case.tree() == case.wanted and case.run(plain)[0] == 0 and case.beside() == []


@needs_root
@needs_strace
@pytest.mark.heavy
def test_where_blocks_cannot_be_reserved_nothing_is_written_for_them(tmp_path):
    """ext2 knows no fallocate; the C library's own way around that writes a byte into every block."""
    image, mounted, source = tmp_path / "image", tmp_path / "mnt", tmp_path / "hf"
    with open(image, "wb") as stream:
        stream.truncate(64 * 2**20)
    make_source(source, config={"vocab_size": 1000})
    mounted.mkdir()
    for command in (["mkfs.ext2", "-q", "-F", image], ["mount", "-o", "loop", image, mounted]):
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no ext2 on a loop device here")
    try:
        trace = tmp_path / "trace"
        command = ["strace", "-f", "-o", trace, "-e", "trace=fallocate,ftruncate,pwrite64,pwritev,pwritev2",
                   sys.executable, "-m", "stream_reshard", source, mounted / "nt", "--tp", "2", "--quiet"]
        subprocess.run(command, cwd=ROOT, check=True)
        lines = trace.read_text().splitlines()
        assert any("fallocate(" in line and "EOPNOTSUPP" in line for line in lines)
        assert any("ftruncate(" in line for line in lines)
        assert not [line for line in lines if "write" in line and line.endswith(" = 1")], "one-byte writes"
        assert main(["verify", str(source), str(mounted / "nt"), "--quiet"]) == 0
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


@needs_root
@pytest.mark.parametrize("flags, code", [(("--overwrite",), 4), (("--restart",), 4), ((), 4), ("elsewhere", 0)], ids=str)
def test_a_lower_layer_of_overlayfs(tmp_path, mounted, capsys, flags, code):
    """Its folders cannot be renamed: one line with the cure, before anything is converted."""
    disk, source = mounted("size=20m"), make_source(tmp_path / "hf")
    for name in ("lower", "upper", "work", "merged"):
        (disk / name).mkdir()
    assert main([str(source), str(disk / "lower" / "nt"), *FLAGS]) == 0
    shutil.copytree(disk / "lower" / "nt", disk / "lower" / "half.partial")
    (disk / "lower" / "half.partial" / "stream_reshard.journal").write_text('{"plan_sha256": ""}\n')
    layers = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    if subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, disk / "merged"],
                      capture_output=True).returncode:
        pytest.skip("no overlayfs here")
    try:
        destination = disk / "merged" / {"--overwrite": "nt", "--restart": "half"}.get((*flags, "")[0], "new")
        words = flags if code else ()
        if not flags:
            destination = disk / "merged" / "nt"
        assert main([str(source), str(destination), *FLAGS, "--tp", "1", *words]) == code
        err = capsys.readouterr().err
        if flags and code:
            assert "on overlayfs it is a folder of a lower layer" in err and err.count("\n") == 1, err
        assert code or main(["verify", str(source), str(destination), "--quiet"]) == 0
        assert not list(disk.glob("upper/nt.partial/model"))
    finally:
        subprocess.run(["umount", "-l", disk / "merged"], check=True)
