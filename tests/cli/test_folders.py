"""Links that lead nowhere, folders without end or without rights: one line where they matter, nothing where they do not."""
import os
import subprocess

import pytest
from shells import as_nobody, code_of
from sources import make_source

from stream_reshard.cli import main


def loops(root):
    os.symlink("loop", root / "loop")
    return root / "loop"


def test_links_that_lead_back_to_themselves(tmp_path, capsys):
    """As a folder, and as a file that is given by name."""
    source, loop = make_source(tmp_path / "hf"), loops(tmp_path)
    for words, code in (([loop, tmp_path / "nt"], 3), ([source, loop], 4), ([source, loop / "nt"], 4), (["inspect", loop], 3),
                        (["plan", loop], 3), (["verify", loop, source], 3), (["verify", source, loop], 5), (["diff", loop, source], 3),
                        ([source, tmp_path / "nt", "--tokenizer", loop], 2), ([source, tmp_path / "nt", "--template", loop], 3),
                        ([source, tmp_path / "nt", "--source-sha256", loop], 2)):
        assert code_of([*map(str, words)]) == code, words
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted(os.listdir(tmp_path)) == ["hf", "loop"]


@pytest.mark.parametrize("name, code", [("x", 0), ("tokenizer.json", 0), ("config.json", 3), ("model.safetensors", 3),
                                        ("model/x", 0), ("generation_config.json", 0)])
def test_a_link_in_a_source_that_leads_back_to_itself(tmp_path, capsys, name, code):
    path = make_source(tmp_path / "hf") / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.symlink(path.name, path)
    assert main([str(tmp_path / "hf"), str(tmp_path / "nt"), "--quiet", "--max-memory", "4GiB"]) == code
    assert capsys.readouterr().err.count("\n") == (code != 0)


def nested(root, number=1000):
    """So many folders within each other, made from the inside: no path is that long."""
    os.makedirs(root, exist_ok=True)
    for _ in range(number):
        inner = root.with_name("inner")
        root.rename(inner)
        root.mkdir()
        inner.rename(root / "d")


def test_folders_nested_without_end(tmp_path, capsys):
    source, copy = make_source(tmp_path / "hf"), tmp_path / "nt"
    assert main([str(source), str(copy), "--quiet"]) == 0
    nested(tmp_path / "deep")
    for place, runs in ((source / "other", [([source, tmp_path / "nt2"], 0)]),
                        (source / "model", [([source, tmp_path / "nt3"], 3)]),
                        (copy / "model" / "x", [([copy, tmp_path / "hf2", "--to", "hf"], 3), (["inspect", copy], 3),
                                                ([source, copy], 0)]),
                        (tmp_path / "nt4.partial", [([source, tmp_path / "nt4"], 4)])):
        (tmp_path / "deep").rename(place)
        for words, code in runs:
            assert code_of([*map(str, words), "--quiet"]) == code, words
            err = capsys.readouterr().err
            assert err.count("\n") == (code != 0) and len(err) < 1500, err
        place.rename(tmp_path / "deep")
    subprocess.run(["rm", "-rf", tmp_path / "deep"], check=True)


def test_a_folder_that_may_not_be_read_is_an_error(open_to_all):
    """And is not skipped: what is in it would be taken for not there."""
    source, copy = make_source(open_to_all / "hf"), open_to_all / "nt"
    assert as_nobody(source, copy) == (0, "")
    for closed, runs in ((copy / "model" / "closed", [([source, copy, "--overwrite"], 4), ([source, copy], 4), (["inspect", copy], 3),
                                                      ([copy, open_to_all / "hf2", "--to", "hf"], 3)]),
                         (source / "model", [([source, open_to_all / "nt2"], 3)]),
                         (source / "other", [([source, open_to_all / "nt3"], 0)])):
        closed.mkdir(mode=0)
        for words, code in runs:
            found, err = as_nobody(*words)
            assert found == code and err.count("\n") == (code != 0) and ("Permission denied" in err) == (code != 0), (words, err)
        closed.rmdir()
    for mode in (0, 0o444, 0o111):
        source.chmod(mode)
        for words in ([source, open_to_all / "nt4"], ["plan", source]):
            code, err = as_nobody(*words)
            assert code == 3 and "Permission denied" in err and err.count("\n") == 1, err
    source.chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
def test_a_mount_point_is_refused_before_the_work(tmp_path, capsys, flags):
    """No other folder can take its name: at the end of the run it would be too late to say so."""
    make_source(tmp_path / "hf")
    (tmp_path / "nt").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path / "nt"], check=True)
    try:
        assert main([str(tmp_path / "hf"), str(tmp_path / "nt"), "--quiet", *flags]) == 4
        assert "is a mount point" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", tmp_path / "nt"], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "nt"]
