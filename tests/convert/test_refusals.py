"""Refusals for what a config says and what is asked for, and what is accepted but said.

A row is a remark, what is done, and the words the message must hold: the object, the numbers, what to do about it.
"""
import numpy as np
import pytest
from refusals import code_of, refuse
from sources import bfloat16, edit_config, make_source

Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


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
