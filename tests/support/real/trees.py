"""Compares the model/ folders of two Nanotron checkpoints file by file: names, headers, bytes."""
import hashlib
import json
import math
import re
from pathlib import Path

WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def differences(got, want, vocab_size):
    """One line for each file in which the folder `got` is not what `want` is; none when they agree.

    Two things may differ: the order of the header's keys, and integers written by numpy 2 as `np.int64(128)`. Rows past
    `vocab_size` are padding and are left out.
    """
    got, want = Path(got) / "model", Path(want) / "model"
    names = {root: {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} for root in (got, want)}
    lines = [f"missing: {name}" for name in sorted(names[want] - names[got])]
    lines += [f"not wanted: {name}" for name in sorted(names[got] - names[want])]
    for name in sorted(names[got] & names[want]):
        ours, theirs = read(got / name, vocab_size), read(want / name, vocab_size)
        lines += [f"{name}: {part} is {ours[part]!r:.200}, want {theirs[part]!r:.200}"
                  for part in ours if ours[part] != theirs[part]]
    return lines


def read(path, vocab_size):
    """A file's header and a digest of its tensor, in the form in which two files are compared."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    metadata = {key: re.sub(r"np\.int64\((\d+)\)", r"\1", text) for key, text in header.pop("__metadata__").items()}
    (key, tensor), = header.items()
    data = raw[begin:]
    rows = tensor["shape"][0]
    if "token_embedding" in str(path) or "lm_head" in str(path):
        rows = min(rows, vocab_size - first_row(metadata))
    row_nbytes = WIDTH[tensor["dtype"]] * math.prod(tensor["shape"][1:])
    return {"metadata": metadata, "key": key, "tensor": tensor, "data size": len(data),
            "digest of data": hashlib.sha256(data[:rows * row_nbytes]).hexdigest()}


def first_row(metadata):
    """Where in the whole vocabulary this rank's rows begin: the start of the only global slice."""
    _, global_slices = metadata["local_global_slices_pairs"].split("#")
    return int(global_slices.split(",")[0])
