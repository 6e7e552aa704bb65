"""No path, link or mount makes a conversion write into its own source."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from running import call, said
from sources import make_source


def bind(folder):
    """DST is the source under another name, by a mount, which the test lets go again."""
    (folder / "bound").mkdir()
    if os.geteuid() or subprocess.run(["mount", "--bind", folder / "hf", folder / "bound"],
                                      capture_output=True).returncode:
        pytest.skip("only root can mount a folder a second time, and not everywhere")


def move(name):
    """The source stands somewhere else."""
    def moved(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "hf").rename(folder / name)
    return moved


REPLACED = ".nt.0123456789ab.replaced"
PATHS_TO = [
    ("same", "hf", "hf", None), ("slash", "hf", "hf/", None), ("dots", "hf", "hf/../hf", None),
    ("dot", "hf", "./hf/.", None), ("inside", "hf", "hf/a/b", None),
    ("around", "hf", ".", None), ("above", "hf", "..", None),
    ("link", "hf", "link", lambda f: (f / "link").symlink_to("hf")),
    ("through a link", "hf", "link/nt", lambda f: (f / "link").symlink_to("hf")),
    ("a link", "link", "hf/nt", lambda f: (f / "link").symlink_to("hf")),
    ("dangling", "hf", "link", lambda f: (f / "link").symlink_to("hf/nt")), ("bound", "hf", "bound", bind),
    ("below bound", "hf", "bound/nt", bind),
    ("source bound", "bound", "hf", bind), ("around bound", "bound", "hf/..", bind),
    ("staging", "nt.partial", "nt", move("nt.partial")),
    ("around, a checkpoint", "nt/hf", "nt",
     lambda f: (move("nt/hf")(f), shutil.copy(f / "nt/hf/config.json", f / "nt"))),
    ("in staging", "nt.partial/hf", "nt", move("nt.partial/hf")),
    ("staging linked", "hf", "nt", lambda f: (f / "nt.partial").symlink_to("hf")),
    ("replaced", REPLACED, "nt", move(REPLACED)), ("in replaced", f"{REPLACED}/hf", "nt", move(f"{REPLACED}/hf"))]
"""(remark, SRC, DST, what is done before): a conversion there would write into its own source, or remove it."""


@pytest.mark.parametrize("flags", [[], ["--overwrite", "--restart"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize("source, destination, prepare", [pytest.param(*row[1:], id=row[0]) for row in PATHS_TO])
def test_a_source_is_never_written_to(tmp_path, capsys, monkeypatch, source, destination, prepare, flags):
    root = make_source(tmp_path / "hf")
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    monkeypatch.chdir(tmp_path)
    try:
        prepare and prepare(tmp_path)
        assert call(source, destination, "--quiet", *flags) == 4 and said(capsys)[1]
        assert {path.name: path.read_bytes() for path in Path(source).iterdir()} == before
    finally:
        (tmp_path / "bound").exists() and subprocess.run(["umount", tmp_path / "bound"], capture_output=True)


def test_hard_links(tmp_path):
    """DST holds the very files of the source: they are replaced there, and stay as they are here."""
    root, other = make_source(tmp_path / "hf"), tmp_path / "nt"
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    other.mkdir()
    for name in before:
        os.link(root / name, other / name)
    assert call(root, other, "--quiet") == 4 and call(root, other, "--quiet", "--overwrite") == 4
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--restart"]], ids=str)
@pytest.mark.parametrize("folder", ["nt", "nt.partial", ".nt.0123456789ab.replaced"])
def test_a_source_of_links_into_what_a_run_may_remove(tmp_path, folder, flags):
    """A view of shards that stand in DST, or beside it in a folder of a run: they would go with it."""
    root, view = make_source(tmp_path / folder), tmp_path / "view"
    view.mkdir()
    for path in root.iterdir():
        (view / path.name).symlink_to(path)
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    assert call(view, tmp_path / "nt", "--quiet", *flags) == 4
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before
