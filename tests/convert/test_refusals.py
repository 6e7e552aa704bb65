"""Every refusal of a conversion: its exit code, what it says, and that it leaves nothing behind.

A row is a remark, what is done, and the words the message must hold: the object, the numbers, what to do about it.
"""
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from sources import INDEX, ONE, TWO, bfloat16, edit_config, edit_text, make_source, raw_file

from stream_reshard.cli import main

Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"
ENTRY = '"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}'


def code_of(arguments):
    """What the command ends with; argparse raises SystemExit. A test process holds much."""
    words = list(map(str, arguments))
    try:
        return main(words if "--max-memory" in words else [*words, "--max-memory", "4GiB"])
    except SystemExit as stop:
        return stop.code


def listing(root):
    """Everything below a folder, with the bytes of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def refuse(capsys, tmp_path, code, words, flags=(), source="hf", destination="nt"):
    """The conversion is refused with this code and these words; whatever was there before is still all there is."""
    before = listing(tmp_path)
    assert code_of([tmp_path / source, tmp_path / destination, *flags]) == code
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    for word in words:
        assert word in err, err
    assert listing(tmp_path) == before
    return [line.removeprefix("error: ") for line in err.splitlines()]


CONFIGS = [
    ("llama3 rope, transformers 4", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["is 'llama3'"]),
    ("linear rope, old transformers 4", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type", "'linear'"]),
    ("llama3 rope, transformers 5", {"rope_theta": ..., "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, ["rope_type", "'llama3'", "--allow rope_scaling"]),
    ("linear rope, transformers 5", {"rope_theta": ..., "rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, ["'linear'", "--allow rope_scaling"]),
    ("scaling beside harmless parameters", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                                            "rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'"]),
    ("two thetas", {"rope_parameters": {"rope_theta": 5e5}}, ["rope_theta", "10000", "500000"]),
    ("head_dim", {"head_dim": 8}, ["head_dim", "8", "hidden_size / num_attention_heads = 4"]),
    ("mlp_bias", {"mlp_bias": True}, ["mlp_bias"]),
    ("attention_bias", {"attention_bias": True}, ["attention_bias", "o_proj"]),
    ("sliding_window", {"sliding_window": 32}, ["sliding_window", "32", "--allow sliding_window"]),
    ("layer_types", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "--allow"]),
    ("hidden_act", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "--allow hidden_act"]),
    ("local experts", {"num_local_experts": 8}, ["num_local_experts", "8", "mixture of experts"]),
    ("experts", {"num_experts": 4}, ["num_experts", "4", "mixture of experts"]),
    ("q and k norms", {"use_qk_norm": True}, ["use_qk_norm", "norms on q and k"]),
    ("part of a head turned", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    ("Qwen3", {"model_type": "qwen3"}, ["model_type 'qwen3'", "q_norm"]),
    ("Qwen3 by its class", {"architectures": ["Qwen3ForCausalLM"], "model_type": ...}, ["'Qwen3ForCausalLM'", "q_norm"]),
    ("Mixtral", {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, ["'mixtral'", "mixture of experts"]),
    ("a class of nobody", {"architectures": ["Nobody"], "model_type": ...}, ["'Nobody'", "llama (LlamaForCausalLM), qwen2"]),
    ("a type of nobody", {"model_type": "bert"}, ["model_type 'bert'", "llama (LlamaForCausalLM), qwen2"]),
    ("a type in other letters", {"model_type": "Llama"}, ["model_type 'Llama'", "known are llama"]),
    ("a model of more than text", {"model_type": "llava", "text_config": {}}, ["'llava'", "save that part (text_config)"]),
    ("an empty type", {"model_type": ""}, ["model_type ''"]),
    ("a type that is a list", {"model_type": ["llama"]}, ["model_type", "llama"]),
    ("neither class nor type", {"architectures": ..., "model_type": ...}, ["names no model_type and no class"]),
    ("a class of a number", {"architectures": [5], "model_type": ...}, ["names no model_type and no class"]),
    ("kv heads do not divide heads", {"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
    ("a size that is text", {"vocab_size": "many"}, ["vocab_size", "'many'"]),
    ("layer_types that is a number", {"layer_types": 5}, ["layer_types"]),
    ("layers with a window", {"use_sliding_window": True, "max_window_layers": "x"}, ["max_window_layers"]),
    ("a base past all floats", {"rope_theta": 10**400}, ["rope_theta"]),
    ("a size that is missing", {"intermediate_size": ...}, ["intermediate_size", "missing"]),
]


@pytest.mark.parametrize("config, words", [pytest.param(*row[1:], id=row[0]) for row in CONFIGS])
def test_config(tmp_path, capsys, config, words):
    make_source(tmp_path / "hf")
    edit_config(tmp_path / "hf", config)
    refuse(capsys, tmp_path, 3, ["error: config.json", *words])


FLAGS = [
    ("kv heads and tp", "llama", {}, 2, ["--tp", "4"], ["--tp 4", "2 kv_heads", "1, 2"]),
    ("heads and tp", "llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, 2, ["--tp", "4"], ["2 heads"]),
    ("ffn and tp", "llama", {"intermediate_size": 21}, 2, ["--tp", "2"], ["--tp 2", "21 ffn"]),
    ("empty stage", "llama", {}, 2, ["--pp", "9"], ["--pp 9", "stage", "2 layers", "--pp can be"]),
    ("no ranks", "llama", {}, 2, ["--tp", "0"], ["--tp 0"]),
    ("no name of a limit", "llama", {}, 2, ["--allow", "nonsense"], ["--allow 'nonsense'", "rope_scaling"]),
    ("limit that cannot be allowed", "llama", {"mlp_bias": True}, 3, ["--allow", "mlp_bias"], ["--allow 'mlp_bias'"]),
    ("memory", "llama", {}, 6, ["--max-memory", "16MiB"], ["--max-memory 16.0 MiB", "the run would reach"]),
    ("endless memory", "llama", {}, 2, ["--max-memory", "9" * 400], ["is not a size"]),
    ("no size", "llama", {}, 2, ["--max-memory", "much"], ["'much'", "512MiB"]),
    ("version", "llama", {}, 2, ["--checkpoint-version", "1.3"], ["--checkpoint-version", "'1.3'"]),
    ("no such flag", "llama", {}, 2, ["--tpp", "2"], ["--tpp"]),
    ("1.2 and theta", "llama", {"rope_theta": 5e5}, 3, ["--checkpoint-version", "1.2"], ["500000", "1.5", "--allow"]),
    ("1.2 and neox", "llama", {}, 2, ["--checkpoint-version", "1.2", "--rope", "neox"], ["--rope neox", "1.2"]),
    ("1.2 and Qwen2Config", "llama", {}, 2, ["--checkpoint-version", "1.2", "--nanotron-config", "Qwen2Config"],
     ["Qwen2Config", "1.2"]),
    ("1.2 and Qwen2", "qwen2", {}, 2, ["--checkpoint-version", "1.2"], ["Qwen2Config", "1.2", "use 1.5"]),
    ("Qwen2 as Llama", "qwen2", {}, 2, ["--nanotron-config", "LlamaConfig"], ["--nanotron-config LlamaConfig", "bias"]),
]


@pytest.mark.parametrize("family, config, code, flags, words", [pytest.param(*row[1:], id=row[0]) for row in FLAGS])
def test_flags(tmp_path, capsys, family, config, code, flags, words):
    make_source(tmp_path / "hf", family=family, config=config)
    refuse(capsys, tmp_path, code, words, flags)


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


DESTINATIONS = [
    ("the source", "hf", "hf' and the source"), ("in the source", "hf/nt", "hf/nt' and the source"),
    ("around the source", ".", "one is inside the other"), ("a link to the source", "link", "link' and the source"),
    ("through a link", "link/nt", "link/nt' and the source"), ("up and back", "nt/../hf", "hf' and the source"),
    ("not empty", "full", "full' is not empty"), ("a file", "file", "file' exists and is not a folder"),
    ("in a file", "file/nt", "file' is not a folder"), ("link into a file", "dangling", "file' is not a folder"),
]


@pytest.mark.parametrize("destination, word", [pytest.param(*row[1:], id=row[0]) for row in DESTINATIONS])
def test_destination(tmp_path, capsys, destination, word):
    make_source(tmp_path / "hf")
    (tmp_path / "link").symlink_to("hf")
    (tmp_path / "dangling").symlink_to("file/nowhere")
    (tmp_path / "full" / "old").mkdir(parents=True)
    (tmp_path / "file").write_text("kept")
    refuse(capsys, tmp_path, 4, [word], destination=destination)


def test_all_problems_at_once_worst_first(tmp_path, capsys):
    """Config, tensors, flags, destination: one line each, in the order of exit codes; the code is that of the worst."""
    make_source(tmp_path / "hf", config={"mlp_bias": True}, drop=[Q])
    (tmp_path / "nt").mkdir()
    (tmp_path / "nt" / "old").touch()
    lines = refuse(capsys, tmp_path, 3, ["mlp_bias", f"{Q} is missing", "--tp 4", "not empty"], ["--tp", "4"])
    assert len(lines) == 4
    assert {"mlp_bias" in line or Q in line for line in lines[:2]} == {True}
    assert "--tp 4" in lines[2] and "not empty" in lines[3]


def test_every_problem_of_one_kind(tmp_path, capsys):
    make_source(tmp_path / "hf", num_shards=2, drop=[NORM, Q], extra={"x": np.ones(1, np.uint16)})
    lines = refuse(capsys, tmp_path, 3, [f"{NORM} is missing", f"{Q} is missing", "unexpected tensor 'x'"])
    assert len(lines) == 3


ACCEPTED = [
    ("rope scaling", {"config": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}}, ["--allow", "rope_scaling"],
     ["accepted: rope_type is 'llama3'"]),
    ("theta of 1.2", {"config": {"rope_theta": 5e5}}, ["--checkpoint-version", "1.2", "--allow", "rope_theta"],
     ["accepted: rope_theta is 500000"]),
    ("window", {"config": {"sliding_window": 9}}, ["--allow", "sliding_window"], ["accepted: sliding_window is '9'"]),
    ("inv_freq", {"extra": {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}}, [],
     ["ignored tensor model.layers.0.self_attn.rotary_emb.inv_freq"]),
    ("unknown key", {"config": {"spice": 1}}, [], ["not understood", "'spice'"]),
]


@pytest.mark.parametrize("change, flags, words", [pytest.param(*row[1:], id=row[0]) for row in ACCEPTED])
def test_accepted_but_said(tmp_path, capsys, change, flags, words):
    """What is accepted is told, and writes the same weights as a source that does not hold it."""
    version = flags[:2] if "--checkpoint-version" in flags else []
    for name, made, given in (("hf", change, flags), ("plain", {}, version)):
        make_source(tmp_path / name, **made)
        assert code_of([tmp_path / name, tmp_path / f"{name}_nt", "--max-memory", "2GiB", *given]) == 0
        out = capsys.readouterr().out
        assert all((word in out) == (name == "hf") for word in words), out
    written, plain = bfloat16(tmp_path / "hf_nt"), bfloat16(tmp_path / "plain_nt")
    assert written.keys() == plain.keys() and len(written) == 15
    assert all(np.array_equal(written[key], plain[key]) for key in plain)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_equal_head_of_a_tied_source(tmp_path, capsys, num_shards):
    embedding = bfloat16(make_source(tmp_path / "model", tied=True))["model.safetensors:model.embed_tokens.weight"]
    make_source(tmp_path / "hf", num_shards=num_shards, tied=True, extra={"lm_head.weight": embedding})
    assert code_of([tmp_path / "hf", tmp_path / "nt", "--max-memory", "2GiB"]) == 0
    assert "ignored tensor lm_head.weight: tied to model.embed_tokens.weight" in capsys.readouterr().out
    assert not [key for key in bfloat16(tmp_path / "nt") if "lm_head" in key]
