"""Pickled shards that are refused: by name, in one line, and nothing in them is ever run."""
import json
import os
import shutil

import pytest
from pickles import BIN, BIN_INDEX, NORM, ONE, TWO, Q, pair, pickle_shards
from refusals import told
from running import call
from sources import make_source
from torch_files import changed, saved


torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file


TENSORS = [
    ("missing", lambda tensors: tensors.pop(NORM, None), [f"{NORM} is missing"]),
    ("unexpected", lambda tensors: tensors.update(more=torch.zeros(2)), ["unexpected tensor 'more' in pytorch_model"]),
    ("of another shape", lambda tensors: tensors.update({NORM: torch.zeros(3)}), [NORM, "shape (3,)"]),
    ("quantised", lambda tensors: tensors.update({Q: torch.zeros(16, 16, dtype=torch.int8)}), ["quantised", "I8"]),
    ("no tensor", lambda tensors: tensors.update(epoch=3), ["'epoch' is a int", "names and tensors"]),
    ("of a wrapper", lambda tensors: [tensors.update({f"module.{key}": tensors.pop(key)}) for key in list(tensors)],
     ["'module.'", "DistributedDataParallel"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in TENSORS])
def test_other_tensors(tmp_path, capsys, change, words):
    _, pickled = pair(tmp_path, change)
    for command in (["plan", pickled], ["inspect", pickled], ["verify", pickled, tmp_path / "hf"]):
        line = told(capsys, *command)
        assert all(word in line for word in words), line


INDEXES = [
    ("missing shard", lambda root, index: (root / TWO).unlink(), [BIN_INDEX, f"'{TWO}'", "missing"]),
    ("wrong shard", lambda root, index: index.update({NORM: ONE}), [NORM, BIN_INDEX, f"names '{ONE}'"]),
    ("safetensors", lambda root, index: index.update({NORM: "a.safetensors"}), ["not a .bin file in the folder"]),
    ("upwards", lambda root, index: index.update({NORM: "../a.bin"}), ["'../a.bin'", "not a .bin file"]),
    ("no index", lambda root, index: (root / BIN_INDEX).rename(root / "x.json"), ["2 shards", f"no {BIN_INDEX}"]),
    ("both", lambda root, index: saved({"a": torch.zeros(1)}, root, BIN), ["both", BIN, BIN_INDEX, "stale"]),
    ("in both", lambda root, index: shutil.copy(root / ONE, root / TWO), ["in both", ONE, TWO]),
    ("not whole", lambda root, index: (root / f"{ONE}.aria2").touch(), ["not downloaded whole"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in INDEXES])
def test_indexes(tmp_path, capsys, change, words):
    _, root = pair(tmp_path, num_shards=2)
    told_before = json.loads((root / BIN_INDEX).read_text())
    change(root, told_before["weight_map"])
    if (root / BIN_INDEX).exists():
        (root / BIN_INDEX).write_text(json.dumps(told_before))
    assert call("plan", root) == 3
    err = capsys.readouterr().err
    assert all(word in err for word in words), err


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


HOSTILE = [
    ("zip", {}, ["system", "which is no tensor", "where you trust it", "best as safetensors"]),
    ("before 1.6", {"_use_new_zipfile_serialization": False}, ["before 1.6", "save it again, best as safetensors"])]


@pytest.mark.parametrize("how, words", [pytest.param(*row[1:], id=row[0]) for row in HOSTILE])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_pickle_is_never_run(tmp_path, capsys, how, words, num_shards):
    canary = tmp_path / "canary"
    root = pickle_shards(make_source(tmp_path / "bin", num_shards=num_shards),
                         lambda tensors: tensors.update(trap=Trap(canary)), **how)
    for command in (["plan", root], [root, tmp_path / "nt"], ["inspect", root], ["verify", root, root]):
        assert call(*command) == 3
        line, *more = capsys.readouterr().err.splitlines()
        assert all(word in line for word in ["pytorch_model", *words]) and len(more) < num_shards, line
    assert not canary.exists() and not (tmp_path / "nt").exists()
    torch.load(next(root.glob("*.bin")), weights_only=False)
    assert canary.exists(), "the canary cannot sing"


BROKEN = [
    ("old format", lambda path: torch.save(torch.load(path), path, _use_new_zipfile_serialization=False),
     ["before 1.6", "best as safetensors"]),
    ("cut off", lambda path: os.truncate(path, 4000), ["cut off", "download or save it again"]),
    ("another pickle", lambda path: torch.save(torch.nn.Linear(2, 2), path), ["torch.nn.modules.linear.Linear"]),
    ("big endian", lambda path: path.write_bytes(changed(path.read_bytes(), "byteorder", b"big")), ["'big' endian"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in BROKEN])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_files_that_cannot_be_read(tmp_path, capsys, change, words, num_shards):
    _, root = pair(tmp_path, num_shards=num_shards)
    change(next(root.glob("*.bin")))
    line = told(capsys, "plan", root)
    assert all(word in line for word in ["pytorch_model", *words]), line


def test_a_long_pickle_needs_memory(tmp_path, capsys, monkeypatch):
    from stream_reshard.machine import memory
    _, root = pair(tmp_path)
    monkeypatch.setattr(memory, "parse_limit", lambda allowed, reserved: 1500)
    assert "raise --max-memory" in told(capsys, "plan", root, code=6)
