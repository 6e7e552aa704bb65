"""Folders, files and tensors of any name are converted or refused, and told of in printable words."""
import os
import resource
import shlex
import subprocess
import sys

import numpy as np
import pytest
from running import ROOT, call, said
from sources import make_source

from stream_reshard.cli import main

FOLDERS = {
    "newline": b"a\nerror: b", "escape": b"\x1b[2J\x1b]0;x\x07", "no UTF-8": b"\xff\xfe\x80",
    "right to left": "\u202egnp".encode(), "tilde": b"~", "space": b"a b  c", "percent": b"100%s%(x)s{0}{x}",
    "quotes": b"a'b\"c`id`$(id);&|<>*?", "backslash": b"a\\b\\n", "dash": b"-rf", "flag": b"--json", "command": b"plan",
    "carriage return": b"a\rb", "longest DST": b"n" * 232, "yaml": b": #-[]{}!"}


@pytest.mark.parametrize("name", [os.fsdecode(name) for name in FOLDERS.values()], ids=list(FOLDERS))
def test_folder_names(tmp_path, capsys, monkeypatch, name):
    """Folders of any name can be converted; what is said of them is printable, and a shell can run the last line."""
    source, destination = make_source(tmp_path / "in" / name), tmp_path / "out" / name
    assert call("plan", source / "absent") == 3 and said(capsys)[1].count("\n") == 1
    assert call(source, destination) == 0 and (destination / "model_config.json").is_file()
    out = said(capsys)[0]
    last = out.splitlines()[-1]
    assert name not in out if not name.isprintable() else str(destination / "config.yaml") in shlex.split(last), last
    assert call("verify", source, destination) == 0 and call("inspect", source) == 0 and said(capsys)
    assert call(source, destination, "--tp", "2") == 4 and said(capsys)[1].count("\n") == 1
    monkeypatch.chdir(source.parent)
    assert main(["plan", "--quiet", "--max-memory", "8GiB", "--", name]) == 0


@pytest.mark.parametrize("name", [os.fsdecode(name) for name in FOLDERS.values()], ids=list(FOLDERS))
def test_names_in_a_source(tmp_path, capsys, name):
    """A tensor and a stray file of any name are told of, escaped."""
    root = make_source(tmp_path / "hf", extra={name.encode("utf-8", "replace").decode(): np.ones(2, np.uint16)})
    (root / f"{name}.safetensors").touch()
    assert call("plan", root) == 3 and "unexpected tensor" in said(capsys)[1]
    os.replace(make_source(tmp_path / "good") / "model.safetensors", root / "model.safetensors")
    assert call("plan", root) == 0 and "no index names" in said(capsys)[0]


@pytest.mark.parametrize("name", ["n" * 233, "n" * 256, "a/" * 2100, "/"], ids=["233", "256", "a long path", "root"])
def test_folders_that_cannot_be(tmp_path, capsys, name):
    """Too long for a name, or no folder to write to: a line or two, and the exit code of the side that it is on."""
    root = make_source(tmp_path / ("s" * 255))
    assert call(root, tmp_path / name, "--quiet") == 4 and said(capsys)[1].count("\n") <= 2
    assert call("plan", tmp_path / name) == 3 and said(capsys)[1].count("\n") <= 2


@pytest.mark.parametrize("num_shards, size, code", [(12, 20_000, 6), (1, 20_000, 6), (1, 29_000, 0)])
def test_a_limit_on_file_sizes(tmp_path, num_shards, size, code):
    """`ulimit -f` is for what is written, not for the shards that are read; what to do next is printable."""
    sizes = {"intermediate_size": 400, "num_hidden_layers": 1}
    root = make_source(tmp_path / "hf", config=sizes, num_shards=num_shards)
    words = [root, os.fsencode(tmp_path) + b"/\x1b[31m\n\xff", "--quiet"]
    run = subprocess.run([sys.executable, "-m", "stream_reshard", *words], cwd=ROOT, capture_output=True,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    assert run.returncode == code and all(line.isprintable() for line in run.stderr.decode().split("\n")), run
