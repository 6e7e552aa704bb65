"""Files of torch.save, read without torch: what torch saved is found, value by value and byte by byte, and written again it
is the same file."""
import subprocess
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_files import (GOLDEN_TRAINING, TORCH_NAMES, assert_same, changed, members_of, pieces, read, saved, with_pickle,
                         without_id, written_again)

from stream_reshard.errors import Cause, ResourceError, SourceError
from stream_reshard.storage import torch_file
from stream_reshard.storage.torch_file import read_torch_file
from stream_reshard.storage.torch_values import StorageReference, TensorReference
from stream_reshard.storage.torch_writer import folder_of, plan_records, stream
from stream_reshard.storage.value_tree import tensors_in

HERE = pytest.mark.skipif(not GOLDEN_TRAINING.is_dir(), reason="the golden checkpoints are not beside this checkout")
GOLDEN_FILES = sorted(GOLDEN_TRAINING.glob("*/*/*.pt")) if GOLDEN_TRAINING.is_dir() else []


def some(dtype, *shape):
    """A tensor of a dtype, every byte of it another."""
    count = torch.empty(shape).numel()
    dtype = getattr(torch, dtype)
    raw = torch.arange(count * dtype.itemsize, dtype=torch.int64).add(1).mul(37).to(torch.uint8)
    return (raw % 2).bool().view(shape) if dtype is torch.bool else raw.view(dtype).view(shape)


def shared():
    whole = some("float32", 6, 4)
    return {"whole": whole, "row": whole[2], "column": whole[:, 1], "rest": whole[1:], "flat": whole.view(-1)[5:9],
            "again": whole, "end": whole[6:], "block": whole[1:3, 1:3], "turned": whole.t()}


def tied():
    embedding = nn.Parameter(some("bfloat16", 5, 3))
    return {"embed": embedding, "head": embedding, "data": embedding.data, "frozen": nn.Parameter(some("float16", 2), False)}


def trained(model=None):
    """The states of an optimizer and a schedule after a step, as a trainer saves them."""
    model = model or nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    return {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "model": model.state_dict()}


def repeated():
    betas, name, row = (0.9, 0.95), "".join(["model.", "weight"]), [1]
    return {"groups": [{"betas": betas, "name": name, "row": row} for _ in range(4)], "names": {0: name}, "row": row}


SIZES = (0, 1, 2, 3, 4, 999, 1000, 1001, 1999, 2000, 2001)
INTEGERS = sorted({sign * (1 << bits) + more for bits in (0, 7, 8, 15, 16, 31, 32, 39, 40, 47, 62, 63)
                   for sign in (1, -1) for more in (-1, 0, 1)} - {-(1 << 63) - 1})

CASES = {
    "every dtype": lambda: {name: some(theirs, 3, 2) for name, theirs in TORCH_NAMES.items()},
    "one dtype twice": lambda: [some("float8_e4m3fn", 3), some("float8_e4m3fn", 4), some("uint16", 2)],
    "one tensor": lambda: some("float32", 7), "scalar": lambda: torch.tensor(4.0), "empty": lambda: torch.empty(0, 3),
    "several empty": lambda: [torch.empty(0), some("int8", 3), torch.empty(2, 0, dtype=torch.bfloat16), torch.empty(0)],
    "strides": lambda: [some("int16", 4, 6).t(), some("int16", 4, 6)[::2, 1::3], some("float64", 2, 3, 4).permute(2, 0, 1),
                        some("int32", 3).expand(4, 3), some("int32", 1, 3).as_strided((1, 3), (99, 1)), some("int8", 9)[4]],
    "eight dims": lambda: some("int8", 2, 1, 3, 1, 2, 1, 1, 2),
    "shared storage": shared, "tied parameters": tied, "typed views": lambda: some("float32", 8).requires_grad_(),
    "no value": dict, "plain": lambda: {"a": [None, True, False, (), [], {}, "", "\u00e9\U0001f600", 1.5, -0.0,
                                                    float("inf"), float("nan")], 7: {"b": (1,)}, -3: ((1, 2), (1, 2, 3),
                                                                                                  (1, 2, 3, 4))},
    "integers": lambda: INTEGERS, "lists": lambda: [list(range(n)) for n in SIZES],
    "dicts": lambda: [{i: None for i in range(n)} for n in SIZES],
    "ordered dicts": lambda: [OrderedDict((i, None) for i in range(n)) for n in SIZES],
    "tuples": lambda: [tuple(range(n)) for n in (0, 1, 2, 3, 4, 5, 1001)],
    "repeated": repeated, "torch's own words": lambda: {"storage": "cpu", "cpu": [some("int8", 2), "storage"]},
    "state of a module": lambda: trained()["model"], "training": trained,
    "module with buffers": lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Embedding(5, 2)).state_dict(),
    "many": lambda: {f"layer.{i}": some("bfloat16", i % 5, 3) for i in range(400)}}


@pytest.mark.parametrize("case", CASES)
def test_what_torch_saved_is_found_and_written_again(case, tmp_path):
    value = CASES[case]()
    path = saved(value, tmp_path)
    file, content = read(path), path.read_bytes()
    assert_same(file.contents, value, file, content)
    again = written_again(path)
    assert without_id(again) == without_id(content)
    (copy := tmp_path / "copy.pt").write_bytes(again)
    for mapped in (False, True):
        assert_same(file.contents, torch.load(copy, weights_only=True, mmap=mapped), file, content)


@pytest.mark.parametrize("name", ["a.b.c.pt", "plain", "gr\u00fc\u00df.bin", "with space.bin"])
def test_the_folder_has_torch_s_name(name, tmp_path):
    path = saved({"a": some("int8", 3)}, tmp_path, name)
    assert read(path).folder == folder_of(str(path))
    assert without_id(written_again(path)) == without_id(path.read_bytes())


def test_sharing_is_seen(tmp_path):
    contents = read(saved(shared(), tmp_path)).contents
    assert len({tensor.storage.key for _, tensor in tensors_in(contents)}) == 1
    assert all(tensor.storage is contents["whole"].storage for _, tensor in tensors_in(contents))
    assert contents["again"] is contents["whole"]
    other = read(saved(tied(), tmp_path)).contents
    assert other["embed"] is other["head"] and other["data"].storage is other["embed"].storage


def test_weights_are_tensors_of_a_file(tmp_path):
    """As a header of safetensors gives them: in the order of their bytes, each at its place."""
    path = saved(OrderedDict(b=some("float32", 4, 3), a=some("bfloat16", 5)), tmp_path, "pytorch_model.bin")
    file = read(path).weights()
    assert [(tensor.key, tensor.dtype, tensor.shape) for tensor in file.tensors] == [("b", "F32", (4, 3)), ("a", "BF16", (5,))]
    assert all(tensor.file == "pytorch_model.bin" and tensor.begin % 64 == 0 for tensor in file.tensors)


def test_strides_of_weights_are_told(tmp_path):
    """Of those that do not stand in C order; the size is that of the file, with what stands behind the tensors."""
    path = saved({"a": some("int8", 4, 6).t(), "b": some("int8", 3)}, tmp_path)
    file = read(path).weights()
    assert dict(file.strides) == {"a": (1, 6)} and file.nbytes == path.stat().st_size
    assert [tensor.shape for tensor in file.tensors] == [(6, 4), (3,)]


@pytest.mark.parametrize("value, words", [
    ([1], "holds a list"), ({}, "no tensor"),
    ({"a": 1}, "'a' is a int"), ({3: some("int8", 2)}, "'3' is a TensorReference")])
def test_what_is_no_dict_of_weights_is_named(value, words, tmp_path):
    with pytest.raises(SourceError) as error:
        read(saved(value, tmp_path)).weights()
    assert words in str(error.value) and "state.pt" in str(error.value)


def test_older_files_of_torch_are_read(tmp_path):
    """They have fewer small records, and checksums only where these were asked for."""
    value = {"a": some("float32", 9)}
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(value, tmp_path, _disable_byteorder_record=True)
    finally:
        torch.serialization.set_crc32_options(True)
    file = read(path)
    assert {member.crc for member in members_of(path.read_bytes()).values()} == {0}
    assert_same(file.contents, value, file, path.read_bytes())


def test_reading_imports_no_torch(tmp_path):
    path = saved(trained(), tmp_path)
    code = ("import sys; from pathlib import Path; from stream_reshard.storage.torch_file import read_torch_file; "
            "from stream_reshard.storage.torch_writer import plan_torch_file; "
            f"plan_torch_file(read_torch_file(Path({str(tmp_path)!r}), {path.name!r}).contents, 'x'); "
            "assert not {'torch', 'numpy', 'pickle'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@HERE
def test_golden_files_are_written_again():
    """Optimizers and schedules that Nanotron saved: every byte but serialization_id."""
    files = [path for path in GOLDEN_FILES if path.parent.name != "random"]
    assert len(files) >= 80
    wrong = [path for path in files if without_id(written_again(path)) != without_id(path.read_bytes())]
    assert not wrong


@HERE
def test_golden_containers_are_written_again(monkeypatch):
    """Also those of random states, whose pickle is refused by the first name that is no tensor's: as they are."""
    files = [path for path in GOLDEN_FILES if path.parent.name == "random"]
    assert len(files) >= 40
    for path in files:
        with pytest.raises(SourceError, match=r"'nanotron\.random\.RandomStates', which is no tensor"):
            read(path)
        content = path.read_bytes()
        members = members_of(content)
        record = partial(pieces, content)
        bare = {name.partition("/")[2]: member for name, member in members.items()}
        data = {StorageReference("ByteStorage", name[5:], member.nbytes): member
                for name, member in bare.items() if name.startswith("data/")}
        new = plan_records(b"".join(record(bare["data.pkl"])), list(data), path.stem)
        assert without_id(b"".join(stream(new, lambda storage: record(data[storage])))) == without_id(content)


@HERE
def test_golden_masters_share_one_storage():
    """As the format says: all masters of a file are views of its last storage, back to back in the order of ids."""
    path = GOLDEN_TRAINING / "untied_tp1_pp1_dp1_zero0/optimizer/optimizer_pp-0-of-1_tp-0-of-1_exp-0-of-1.pt"
    masters = list(read(path).contents["gradient_accumulator"].values())
    assert {tensor.storage.key for tensor in masters} == {"63"} and all(tensor.requires_grad for tensor in masters)
    ends = [0, *(tensor.offset + tensor.num_elements for tensor in masters)]
    assert [tensor.offset for tensor in masters] == ends[:-1] and ends[-1] == masters[0].storage.num_elements


@pytest.mark.parametrize("content, words, kind", [
    ("legacy", "saved by a torch before 1.6", Cause), ("jit", "is compressed (method 8)", SourceError),
    ("module", "a program of TorchScript", SourceError), ("more", "a record 'notes.txt'", SourceError),
    ("big", "'big' endian", SourceError), ("cut", "cut off", Cause), ("pointer", "Git LFS pointer", Cause),
    ("page", "a page of HTML", Cause), ("empty", "is empty", Cause), ("noise", "no zip file", SourceError),
    ("absent", "No such file", SourceError), ("folder", "not a file", SourceError), ("link", "a link to", Cause),
    ("long", "version has 99 bytes, the limit is 64", SourceError), ("protocol 4", "protocol 2", SourceError), ("version", "its version is '11'", SourceError)])
def test_other_files_are_told_with_a_cure(content, words, kind, tmp_path):
    path = tmp_path / "state.pt"
    whole = saved({"a": some("int8", 3)}, tmp_path, "whole.pt").read_bytes()
    makers = {
        "legacy": lambda: torch.save({"a": some("int8", 3)}, path, _use_new_zipfile_serialization=False),
        "jit": lambda: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path),
        "module": lambda: path.write_bytes(changed(whole, "constants.pkl", b"")),
        "more": lambda: path.write_bytes(changed(whole, "notes.txt", b"")),
        "big": lambda: path.write_bytes(changed(whole, "byteorder", b"big")),
        "cut": lambda: path.write_bytes(whole[:-100]), "empty": lambda: path.write_bytes(b""),
        "pointer": lambda: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"),
        "page": lambda: path.write_text("<!DOCTYPE html><html></html>"), "noise": lambda: path.write_bytes(b"\x01\xfe" * 999),
        "absent": lambda: None, "folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "nowhere"),
        "protocol 4": lambda: torch.save([1], path, pickle_protocol=4),
        "long": lambda: path.write_bytes(changed(whole, "version", b"3" * 99)),
        "version": lambda: path.write_bytes(changed(whole, "version", b"11"))}
    makers[content]()
    with pytest.raises(kind) as error:
        read(path)
    assert words in str(error.value) and "\n" not in str(error.value) and "state.pt" in str(error.value)


def test_a_zip_of_another_writer_is_read(tmp_path):
    """Its local headers give sizes and there is no zip64 record."""
    path = saved({"a": some("int8", 3)}, tmp_path)
    path.write_bytes(changed(path.read_bytes(), "version", b"3"))
    assert isinstance(read(path).contents["a"], TensorReference)


def test_a_long_pickle_needs_memory(tmp_path):
    path = saved(CASES["many"](), tmp_path)
    with pytest.raises(ResourceError, match="--max-memory"):
        read_torch_file(tmp_path, path.name, 2000)


def test_a_damaged_pickle_is_told(tmp_path):
    path = saved({"name": [0.25]}, tmp_path)
    content = bytearray(path.read_bytes())
    at = content.index(b"name")
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match="damaged: its CRC-32"):
        read(path)


def test_a_file_that_shrinks_meanwhile_is_told(tmp_path, monkeypatch):
    path = saved({"a": some("int8", 3)}, tmp_path)
    whole = torch_file.os.pread
    monkeypatch.setattr(torch_file.os, "pread", lambda *place: whole(*place)[:-1])
    with pytest.raises(SourceError, match="did it change meanwhile"):
        read(path)


def test_nothing_but_the_pickle_is_read(tmp_path, monkeypatch):
    """Of a file with much data only the directory, the headers and small records are."""
    path = saved({"a": torch.zeros(10**6)}, tmp_path)
    num_read = []
    whole = torch_file.os.pread
    monkeypatch.setattr(torch_file.os, "pread", lambda *place: num_read.append(place[1]) or whole(*place))
    read(path)
    assert sum(num_read) < 5000


def test_the_pickle_may_be_exchanged(tmp_path):
    """What the hostile files of other tests are made with makes good ones too."""
    path = saved({"a": some("int8", 3)}, tmp_path)
    pickled = b"".join(pieces(path.read_bytes(), members_of(path.read_bytes())["state/data.pkl"]))
    assert without_id(with_pickle(path, pickled)) == without_id(path.read_bytes())
