"""Refusals for what stands in the folder of a source: its tensors, shards, index, headers.

A row is a remark, what is done, and the words the message must hold: the object, the numbers, what to do about it.
"""
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from refusals import refuse
from sources import INDEX, ONE, TWO, edit_text, make_source, raw_file

Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"
ENTRY = '"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}'


def norm(dtype, size=16):
    return {NORM: np.ones(size, dtype)}


TENSORS = [
    ("missing", {"drop": [Q]}, [f"{Q} is missing"]),
    ("head missing", {"drop": ["lm_head.weight"]}, ["lm_head.weight is missing", "tied"]),
    ("extra norms on q", {"extra": {"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.uint16)}},
     ["unexpected tensor 'model.layers.0.self_attn.q_norm.weight'"]),
    ("extra bias", {"extra": {Q.replace("weight", "bias"): np.ones(16, np.uint16)}}, ["unexpected", "q_proj.bias"]),
    ("extra layer", {"extra": {Q.replace("1", "7"): np.ones((16, 16), np.uint16)}}, ["unexpected", "layers.7."]),
    ("extra, hostile name", {"extra": {"../\n\x1b[31m": np.ones(4, np.uint16)}}, [r"'../\n\x1b[31m'"]),
    ("misshapen", {"extra": norm(np.uint16, 15)}, [NORM, "(15,)", "(16,)"]),
    ("transposed", {"extra": {"model.layers.0.mlp.up_proj.weight": np.ones((16, 20), np.uint16)}},
     ["up_proj.weight", "(16, 20)", "(20, 16)"]),
    ("scalar", {"extra": {NORM: np.ones((), np.uint16)}}, [NORM, "()", "(16,)"]),
    ("int8", {"extra": norm(np.int8)}, [NORM, "I8", "dequantise"]),
    ("uint8", {"extra": norm(np.uint8)}, [NORM, "U8", "dequantise"]),
    ("int32", {"extra": norm(np.int32)}, [NORM, "I32", "dequantise"]),
    ("another head", {"tied": True, "extra": {"lm_head.weight": np.ones((11, 16), np.uint16)}},
     ["lm_head.weight differs from model.embed_tokens.weight", "tie_word_embeddings"]),
]


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in TENSORS])
def test_tensors(tmp_path, capsys, change, words, num_shards):
    make_source(tmp_path / "hf", num_shards=num_shards, **change)
    refuse(capsys, tmp_path, 3, words)


def edit_index(root, **weight_map):
    index = json.loads((root / INDEX).read_text())
    changed = index["weight_map"] | {key.replace("__", "."): value for key, value in weight_map.items()}
    index["weight_map"] = {key: value for key, value in changed.items() if value is not ...}
    (root / INDEX).write_text(json.dumps(index))


def to_bin(root):
    """Pickled weights that would leave a trace if anyone opened them."""
    (root / "model.safetensors").unlink()
    trap = type("Trap", (), {"__reduce__": lambda self: (os.mkdir, (str(root / "trap"),))})()
    (root / "pytorch_model.bin").write_bytes(pickle.dumps(trap))


FOLDERS = [
    ("path upwards", 2, lambda root: edit_index(root, model__norm__weight="../x.safetensors"), ["'../x.safetensors'"]),
    ("absolute path", 2, lambda root: edit_index(root, model__norm__weight="/abs"), [INDEX, "'/abs'"]),
    ("absolute shard", 2, lambda root: edit_index(root, model__norm__weight="/abs/x.safetensors"), ["'/abs/x"]),
    ("a NUL", 2, lambda root: edit_index(root, model__norm__weight="a\0.safetensors"), [r"'a\x00.safetensors'"]),
    ("pickled shard", 2, lambda root: edit_index(root, model__norm__weight="model.bin"), [INDEX, "l.bin'"]),
    ("no name", 2, lambda root: edit_index(root, model__norm__weight=None), [INDEX, "None"]),
    ("list for a name", 2, lambda root: edit_index(root, model__norm__weight=["a"]), [INDEX]),
    ("missing shard", 2, lambda root: (root / TWO).unlink(), [INDEX, TWO, "missing"]),
    ("wrong shard", 2, lambda root: edit_index(root, model__norm__weight=ONE), [NORM, ONE, TWO]),
    ("not in the index", 2, lambda root: edit_index(root, model__norm__weight=...), [NORM, TWO, "does not name it"]),
    ("in no shard", 2, lambda root: edit_index(root, phantom=ONE), ["'phantom'", "no shard", ONE]),
    ("in two shards", 2, lambda root: shutil.copy(root / ONE, root / TWO), ["in both", ONE, TWO]),
    ("index is a list", 2, lambda root: (root / INDEX).write_text("[]"), [INDEX, "list"]),
    ("index is no JSON", 2, lambda root: (root / INDEX).write_text("{"), [INDEX, "JSON"]),
    ("index too deep", 2, lambda root: (root / INDEX).write_text("[" * 100000), [INDEX, "JSON"]),
    ("index too large", 2, lambda root: (root / INDEX).write_text(" " * 11 * 2**20), [INDEX, "10485760"]),
    ("config twice a key", 1, lambda root: edit_text(root / "config.json", '"vocab_size"', '"hidden_size": 8,\n"vocab_size"'),
     ["config.json: 'hidden_size' in lines 2 and 7 occurs twice with different values"]),
    ("config with Infinity", 1, lambda root: edit_text(root / "config.json", "1e-05", "Infinity"),
     ["config.json: 'rms_norm_eps' in line 9 is inf"]),
    ("config with NaN below a key", 1, lambda root: edit_text(root / "config.json", '"rope_scaling": null',
                                                              '"rope_scaling": {"factor": NaN}'),
     ["config.json: 'rope_scaling.factor' in line 15 is nan"]),
    ("config cut off", 1, lambda root: os.truncate(root / "config.json", 60), ["JSON", "string starting in line 4", "after the key", "cut off"]),
    ("config with a comma", 1, lambda root: edit_text(root / "config.json", "1e-05,", "1e-05,,"),
     ["config.json is not valid JSON", "line 9, column 24, after the key 'rms_norm_eps'"]),
    ("config not UTF-8", 1, lambda root: (root / "config.json").write_bytes(b'{"a":"\xff"}'), ["config.json", "JSON"]),
    ("single file and index", 1, lambda root: (root / INDEX).write_text("{}"), ["both", INDEX, "stale"]),
    ("infinite base", 1, lambda root: edit_text(root / "config.json", "10000.0", "1e999"), ["rope_theta"]),
    ("infinite epsilon", 1, lambda root: edit_text(root / "config.json", "1e-05", "1e999"), ["rms_norm_eps"]),
    ("name too long", 2, lambda root: edit_index(root, model__norm__weight="a" * 300 + ".safetensors"), [INDEX, "aaa"]),
    ("no index", 2, lambda root: (root / INDEX).unlink(), ["2 shards", "no " + INDEX]),
    ("no weights", 1, lambda root: (root / "model.safetensors").unlink(), ["not a Hugging Face checkpoint"]),
    ("no config", 1, lambda root: (root / "config.json").unlink(), ["config.json", "not a Hugging Face checkpoint"]),
    ("no folder", 1, lambda root: shutil.rmtree(root), ["is not a folder"]),
    ("pickled source", 1, to_bin, ["pytorch_model.bin", "never opened", "save_pretrained"]),
]


@pytest.mark.parametrize("num_shards, change, words", [pytest.param(*row[1:], id=row[0]) for row in FOLDERS])
def test_folder(tmp_path, capsys, num_shards, change, words):
    change(make_source(tmp_path / "hf", num_shards=num_shards))
    refuse(capsys, tmp_path, 3, words, ["--max-memory", "4GiB"])


@pytest.mark.parametrize("change", [-1, 1, -1000, 300 - 10**6, 7 - 10**6, -10**7], ids=[
    "one byte short", "one byte long", "cut in the data", "cut in the header", "too short", "empty"])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_size_of_each_shard(tmp_path, capsys, change, num_shards):
    for name in ["model.safetensors"] if num_shards == 1 else [ONE, TWO]:
        root = make_source(tmp_path / "hf", num_shards=num_shards)
        size = (root / name).stat().st_size
        wanted = max(change + 10**6 if -10**6 <= change < -2000 else change + size, 0)
        os.truncate(root / name, wanted)
        refuse(capsys, tmp_path, 3, [name, str(wanted), str(size) if wanted > 1000 else "bytes"])
        shutil.rmtree(root)


HEADERS = [
    ("key twice", raw_file(f"{{{ENTRY},{ENTRY}}}", b"0000"), "twice"),
    ("overlap", raw_file(f'{{{ENTRY},"b":{{"dtype":"BF16","shape":[2],"data_offsets":[2,6]}}}}', b"0" * 6), "'b'"),
    ("hole", raw_file(f'{{{ENTRY},"b":{{"dtype":"BF16","shape":[2],"data_offsets":[6,10]}}}}', b"0" * 10), "'b'"),
    ("NaN", raw_file('{"a":{"dtype":"BF16","shape":[NaN],"data_offsets":[0,4]}}', b"0000"), "NaN"),
    ("unknown field", raw_file(f"{{{ENTRY[:-1]},\"x\":1}}}}", b"0000"), "nothing else"),
    ("huge claim", raw_file(f"{{{ENTRY}}}", b"0000", 2**63), str(2**63)),
    ("claim past the end", raw_file(f"{{{ENTRY}}}", b"0000", 10**6), str(10**6 + 8)),
    ("no tensor", raw_file("{}"), "no tensor"),
]


@pytest.mark.parametrize("content, word", [pytest.param(*row[1:], id=row[0]) for row in HEADERS])
def test_hostile_header(tmp_path, capsys, content, word):
    root = make_source(tmp_path / "hf", num_shards=2)
    (root / TWO).write_bytes(content)
    lines = refuse(capsys, tmp_path, 3, [TWO, word])
    assert len(lines) == 1
