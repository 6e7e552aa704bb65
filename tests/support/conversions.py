"""Conversions by the command, what they made, and ways to damage a Nanotron checkpoint; each of these returns a part of
the message that must follow."""
import json
import re
import shutil

import numpy as np
from sources import bfloat16

from stream_reshard.cli import main


def convert(*arguments):
    assert main([*map(str, arguments), "--quiet"]) == 0


def tensors(root):
    """The tensors of a Hugging Face folder, by key alone."""
    return {name.partition(":")[2]: array for name, array in bfloat16(root).items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, array in want.items():
        assert np.array_equal(got[key], array), key


def tree(root):
    """(header, data) of every weight file. The spaces that pad a header follow the source, so they are left out."""
    found = {}
    for path in sorted((root / "model").rglob("*.safetensors")):
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        found[path.relative_to(root).as_posix()] = raw[8:begin].rstrip(b" "), raw[begin:]
    return found


def damage_stale(root):
    path = next((root / "model").rglob("*tp-rank-1-of-2*"))
    shutil.copy(path, path.with_name(re.sub("tp-rank-1-of-2", "tp-rank-1-of-4", path.name)))
    return "files of several topologies"


def damage_missing(root):
    path = next((root / "model").rglob("*tp-rank-1-of-2*"))
    path.unlink()
    return f"{path.name}' is missing"


def damage_extra(root):
    path = next((root / "model").rglob("*input_layernorm/*"))
    other = path.parent.with_name("q_norm") / path.name
    other.parent.mkdir()
    shutil.copy(path, other)
    return "holds a parameter that the model does not have"


def damage_exchanged(root):
    one, two = sorted((root / "model").rglob("*0/pp_block/attn/o_proj/*"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    return "is cut in another way than Nanotron cuts it for its rank"


def damage_shape(root):
    path = root / "model_config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 20', '"intermediate_size": 24'))
    return "but model_config.json asks for"


def damage_version(root):
    path = next((root / "model").rglob("*gate_up_proj/*"))
    path.write_bytes(path.read_bytes().replace(b'"1.5"', b'"1.4"'))
    return "files of several format versions"


def damage_limit(root):
    path = root / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window_size": 32}))
    return "sliding_window_size is '32'"


def damage_config(root):
    (root / "model_config.json").unlink()
    return "it is not a committed checkpoint"
