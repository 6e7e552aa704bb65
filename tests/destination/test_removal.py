"""--restart, --overwrite and the clearing of what was replaced remove only what is ours; anything else is refused by name
before, with all of it still there."""
import os
import signal
import subprocess
from pathlib import Path

import pytest
from attempts import place
from faults import Case, campaign, clean_error, kill, tree_of

from stream_reshard.cli import main
from stream_reshard.destination import removal, staging
from stream_reshard.destination.contents import mounts_below
from stream_reshard.destination.staging import staging_of
from stream_reshard.formats.nanotron.names import NAMING

LAYER = "model/model/decoder/0/pp_block/input_layernorm"

OTHERS = ["notes.txt", "model/README.md", "model/model/README", f"{LAYER}/model_weight.safetensors.bak",
          "model/backup/model_weight.safetensors", "optimizer/my_notes.txt", "random/notes", "lr_scheduler/a.pt",
          ".nfs_my_backup.tar", "model/.nfs0123", "optimizer/optimizer.pt", "photos/2024/cat.jpg", ".hidden", "config.yml",
          "20/model_config.json", "optimizer/optimizer_config.json.orig"]
"""Paths of files that are a user's."""

OURS = ["optimizer/optimizer_config.json", "optimizer/optimizer_pp-0-of-2_tp-1-of-2_exp-0-of-1.pt",
        "optimizer/optimizer_pp-0-of-2_dp-0-of-2_tp-1-of-2_exp-0-of-1.pt", "random/tp-0-of-2_dp-0-of-2_pp-0-of-2.pt",
        "lr_scheduler/lr_scheduler_pp-0-of-1_dp-0-of-1_tp-0-of-1_exp-0-of-1.pt", "lr_scheduler/lr_scheduler.pt",
        ".nfs0000000000a1b2c30000001f"]
"""Those of a training that wrote into the folder, and of a removed file that is still open on another machine."""


def plant(root, path, text="mine"):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def without_manifest(root):
    """As Nanotron's trainer saves it."""
    for name in ("stream_reshard.json", "tokenizer.json"):
        (root / name).unlink()


CASES = {"--overwrite": ("whole", lambda case: case.destination, lambda root: None, ("--overwrite", "--tp", "1")),
         "--overwrite, Nanotron's own": ("whole", lambda case: case.destination, without_manifest, ("--overwrite",)),
         "--restart": ("half", lambda case: staging_of(case.destination), lambda root: None, ("--restart",)),
         "--restart, another plan": ("half", lambda case: staging_of(case.destination), lambda root: None,
                                     ("--restart", "--tp", "1")),
         "replaced": ("whole", lambda case: case.destination.with_name(".nt.0123456789ab.replaced"),
                      lambda root: None, ())}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_ours_is_refused_by_name_and_stays(shared, capsys, name):
    which, where, change, flags = CASES[name]
    change(root := place(shared, which, where(shared)))
    command = [str(shared.source), str(shared.destination), *shared.flags, *flags]
    for path in OTHERS:
        plant(root, path)
        before = tree_of(root)
        assert main(command) == 4, path
        err = capsys.readouterr().err
        assert f"'{path}'" in err and "move it away" in err and clean_error(4, err, (4,)) is None, err
        assert flags == () or flags[0] in err
        assert tree_of(root) == before, path
        (root / path).unlink()
    for path in OURS:
        plant(root, path)
    (root / "empty" / "folders").mkdir(parents=True)
    assert main(command) == 0, capsys.readouterr().err
    assert shared.beside() == [] and not (shared.destination / "optimizer").exists()


def test_a_weight_file_that_no_manifest_names_is_not_ours(shared, capsys):
    """With a manifest there is no need for rules; without one the weights of any topology are Nanotron's."""
    root, path = place(shared, "whole", shared.destination), f"{LAYER}/model_other.safetensors"
    plant(root, path)
    command = [str(shared.source), str(shared.destination), *shared.flags, "--overwrite"]
    assert main(command) == 4 and path in capsys.readouterr().err
    without_manifest(root)
    assert main(command) == 0


def test_the_error_of_a_stranger_offers_no_cure_that_is_none(shared, capsys):
    root = place(shared, "half", staging_of(shared.destination))
    plant(root, "notes.txt")
    command = [str(shared.source), str(shared.destination), *shared.flags]
    assert main(command) == 4 and "--restart" not in capsys.readouterr().err
    (root / "notes.txt").unlink()
    assert main(command) == 0


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "pipe", "link in place of a known file"])
def test_links_are_neither_followed_nor_taken_for_files(shared, tmp_path, capsys, kind):
    root = place(shared, "whole", shared.destination)
    (tmp_path / "other").mkdir()
    plant(tmp_path / "other", "model_weight.safetensors")
    path = root / "optimizer" / "optimizer_config.json"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link in place of a known file":
        path = root / "config.yaml"
        path.unlink()
        path.symlink_to(tmp_path / "other" / "model_weight.safetensors")
    else:
        path.symlink_to(tmp_path / "other" / ("model_weight.safetensors" if "file" in kind else ""))
    assert main([str(shared.source), str(root), *shared.flags, "--tp", "1", "--overwrite"]) == 4
    assert f"'{path.relative_to(root)}'" in capsys.readouterr().err
    assert (tmp_path / "other" / "model_weight.safetensors").read_text() == "mine" and os.path.lexists(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("how", ["tmpfs", "bind", "file"])
@pytest.mark.parametrize("name", ["--overwrite", "--overwrite, Nanotron's own", "--restart", "replaced"])
def test_nothing_crosses_a_mount_point(shared, tmp_path, capsys, name, how):
    """Nor where the same disk is mounted there a second time, or a file; the names are ours, the files are not."""
    which, where, change, flags = CASES[name]
    change(root := place(shared, which, where(shared)))
    (tmp_path / "other").mkdir()
    plant(tmp_path / "other", "optimizer_config.json")
    point = root / "optimizer"
    point.mkdir()
    source = tmp_path / "other"
    if how == "file":
        source, point = source / "optimizer_config.json", point / "optimizer_config.json"
        point.touch()
    command = ["mount", "-t", "tmpfs", "tmpfs", point] if how == "tmpfs" else ["mount", "--bind", source, point]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        if how == "tmpfs":
            plant(point, "optimizer_config.json")
        assert main([str(shared.source), str(shared.destination), *shared.flags, *flags]) == 4
        err = capsys.readouterr().err
        assert "is a mount point" in err and f"{point}'" in err and "unmount it" in err, err
        removal.clear(root, NAMING)
        kept = point if how == "file" else point / "optimizer_config.json"
        assert kept.read_text() == "mine", "what appears after the check is not entered either"
    finally:
        subprocess.run(["umount", "-l", point], check=True)
    assert how == "tmpfs" or (tmp_path / "other" / "optimizer_config.json").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_mount_points_are_found_whatever_their_name(tmp_path):
    names = ["plain", "données", "with space", "back\\slash", "tab\tand\nline", "\udcff"]
    try:
        for name in names:
            (tmp_path / name).mkdir()
            if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / name], capture_output=True).returncode:
                pytest.skip("nothing can be mounted here")
        assert mounts_below(tmp_path) == set(names)
        assert mounts_below(tmp_path / "plain") == set() and "plain" in mounts_below(Path(f"{tmp_path}/plain/.."))
    finally:
        for name in names:
            subprocess.run(["umount", "-l", tmp_path / name], capture_output=True)


def test_what_appears_after_the_check_stays_and_is_reported(shared, monkeypatch, capsys):
    place(shared, "whole", shared.destination)
    real = staging.clear

    def clear(folder, names=()):
        plant(folder, "notes.txt")
        plant(folder, f"{LAYER}/README")
        real(folder, names)

    monkeypatch.setattr(staging, "clear", clear)
    flags = [flag for flag in shared.flags if flag != "--quiet"]
    assert main([str(shared.source), str(shared.destination), *flags, "--tp", "1", "--overwrite"]) == 0
    left = next(path for path in shared.destination.parent.iterdir() if path.name.endswith(".replaced"))
    assert str(left) in capsys.readouterr().out
    assert tree_of(left).keys() == {"notes.txt", f"{LAYER}/README"}


def test_a_thousand_nested_folders_are_no_traceback(shared, capsys):
    root = place(shared, "whole", shared.destination)
    path = root / "model"
    try:
        for _ in range(1000):
            path = path / "d"
            path.mkdir()
        (path / "notes.txt").touch()
        code = main([str(shared.source), str(root), *shared.flags, "--tp", "1", "--overwrite"])
        assert clean_error(code, capsys.readouterr().err, (4,)) is None
    finally:
        subprocess.run(["rm", "-rf", root, staging_of(root)], check=True)


def restarted(case, point):
    """Whatever a killed run has left, --restart of another plan can throw it away."""
    case.clear()
    code, err = case.run(kill(*point))
    if code != -signal.SIGKILL:
        return f"not killed: {code} {err}"
    finished = case.destination.exists()
    code, err = case.run(flags=("--restart", "--tp", "1", *(["--overwrite"] * finished)))
    return err if code else (f"left {case.beside()}" if case.beside() else None)


@pytest.mark.parametrize("step", [150, pytest.param(5, marks=pytest.mark.heavy)])
def test_a_run_killed_anywhere_can_be_thrown_away(quick_path, figures, step):
    """Also between the journal's end and the last rename."""
    names = Case(quick_path / "count").operations
    named = max(at for at, name in enumerate(names, 1) if name == "rename")
    points = [(at, False) for at in range(named - 7, named + 1)]
    points += [(at, after) for at in range(1, len(names) + 1, step) for after in (False, True)]
    figures("--restart after SIGKILL", *campaign(quick_path, Case, restarted, points))
