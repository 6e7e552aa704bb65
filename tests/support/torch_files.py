"""Files of torch.save: made by torch itself, taken apart and put together again, and compared with what is read."""
import io
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from trees import GOLDEN

from stream_reshard.storage.torch_file import read_torch_file
from stream_reshard.storage.torch_values import TensorReference
from stream_reshard.storage.torch_writer import folder_of, plan_records, plan_torch_file, stream
from stream_reshard.storage.zip_file import read_members

GOLDEN_TRAINING = GOLDEN.parent / "golden_training"
"""Training states that Nanotron itself saved with torch 2.13."""

TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64", "I64": "int64", "I32": "int32",
               "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64", "U16": "uint16",
               "U32": "uint32", "U64": "uint64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
               "F8_E8M0": "float8_e8m0fnu"}
"""Every dtype that is read, under its safetensors name, and torch's name of it."""


def saved(value, folder, name="state.pt", **how):
    """Path of a file that torch wrote."""
    path = Path(folder) / name
    torch.save(value, path, **how)
    return path


def read(path, **how):
    """The file at a path as it is read."""
    return read_torch_file(path.parent, path.name, **how)


def written_again(path):
    """The bytes that we write of what we read."""
    file, content = read(path), path.read_bytes()
    new = plan_torch_file(file.contents, folder_of(str(path)))
    written = b"".join(stream(new, lambda storage: pieces(content, file.records[storage])))
    assert new.nbytes == len(written)
    return written


def pieces(content, member, nbytes=1000):
    """The bytes of a member, a few at a time."""
    for begin in range(0, member.nbytes, nbytes):
        yield content[member.begin + begin:member.begin + min(begin + nbytes, member.nbytes)]


def without_id(content):
    """The bytes of a file but for its serialization_id and the two places of that one's CRC, which are no record's."""
    parts, content = members_of(content), bytearray(content)
    name, member = next((name, member) for name, member in parts.items() if name.endswith(".data/serialization_id"))
    end = member.begin + member.nbytes
    entry = content.rindex(b"PK\1\2")
    assert content[entry + 46:].startswith(name.encode()) and content[end:end + 4] == b"PK\7\10"
    for begin, stop in ((member.begin, end), (end + 4, end + 8), (entry + 16, entry + 20)):
        content[begin:stop] = b"?" * (stop - begin)
    return bytes(content)


def members_of(content):
    return read_members(lambda offset, nbytes: content[offset:offset + nbytes], len(content), 10**9)


def records_of(content):
    """{name: bytes} of a zip, as Python's zipfile reads it, which checks the CRCs."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def changed(content, name, text):
    """A file with another text in a small record, or one more, as Python's zipfile writes it."""
    records = records_of(content)
    records[f"{next(iter(records)).partition('/')[0]}/{name}"] = text
    with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
        for key, record in records.items():
            archive.writestr(zipfile.ZipInfo(key), record)
    return made.getvalue()


def with_pickle(path, pickled):
    """A whole file like that at a path, its CRCs and all, with another pickle."""
    file, content = read(path), path.read_bytes()
    new = plan_records(pickled, list(file.records), "state")
    return b"".join(stream(new, lambda storage: pieces(content, file.records[storage])))


def assert_same(value, theirs, file, content):
    """What was read is what torch has: types, order, numbers, and the bytes of every tensor."""
    if isinstance(value, TensorReference):
        assert isinstance(theirs, torch.nn.Parameter) == value.is_parameter
        assert (value.shape, value.strides) == (tuple(theirs.shape), theirs.stride())
        assert TORCH_NAMES[value.dtype] == str(theirs.dtype).removeprefix("torch.")
        assert (value.offset, value.requires_grad) == (theirs.storage_offset(), theirs.requires_grad)
        assert value.is_contiguous == theirs.is_contiguous()
        assert bits(tensor_in(value, file, content)) == bits(theirs)
        return
    assert type(value) is type(theirs)
    if isinstance(value, dict):
        assert list(value) == list(theirs) and list(map(type, value)) == list(map(type, theirs))
        for key in value:
            assert_same(value[key], theirs[key], file, content)
        if isinstance(value, OrderedDict):
            assert_same(vars(value), vars(theirs), file, content)
    elif isinstance(value, (list, tuple)):
        assert len(value) == len(theirs)
        for ours, other in zip(value, theirs):
            assert_same(ours, other, file, content)
    else:
        assert value == theirs or value != value


def tensor_in(tensor, file, content):
    """The tensor, made of the bytes at the place that was found for it."""
    dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    begin = file.begin_of(tensor)
    count = (tensor.end - tensor.offset)
    if not count:
        return torch.empty(tensor.shape, dtype=dtype)
    raw = torch.frombuffer(bytearray(content[begin:begin + count * tensor.itemsize]), dtype=torch.uint8)
    return raw.view(dtype).as_strided(tensor.shape, tensor.strides)


def bits(tensor):
    """The bytes of a tensor's elements in C order."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes()
