"""What Nanotron would get wrong is refused by name, before a byte is written; each row with its text and exit code."""
import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stream_reshard.cli import main
from stream_reshard.layouts.hf_config import read_config
from stream_reshard.architectures import FAMILIES, build_model

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 11, "tie_word_embeddings": False,
          "torch_dtype": "float16", "rope_theta": 10000.0}


def make_source(root, config=None, edit=None):
    """A tiny float16 source; `edit` changes its tensors before they are saved."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(CONFIG))
    parsed = read_config(root)
    parameters = build_model(FAMILIES["LlamaForCausalLM"], parsed.model).stored()
    tensors = {p.hugging_face: np.arange(i, i + p.num_elements, dtype=np.float16).reshape(p.matrix_shape)
               for i, p in enumerate(parameters)}
    if edit:
        edit(tensors)
    save_file(tensors, root / "model.safetensors")
    (root / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    return root


def refused(tmp_path, capsys, code, *texts, flags=()):
    """The command ends with `code`, says all `texts`, and leaves nothing behind."""
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main([str(tmp_path / "hf"), str(tmp_path / "nt"), *flags]) == code
    out = capsys.readouterr()
    for text in texts:
        assert text in out.err, out.err
    assert "Traceback" not in out.err and all(line.startswith("error: ") for line in out.err.splitlines())
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("config, text", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),  # transformers 4, old key
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "--allow rope_scaling"),  # transformers 4, new key
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}}, "rope_type is 'llama3'"),  # transformers 5
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is '10000.0', but '5.0' in rope_parameters"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is '0.5'"),
    ({"head_dim": 8}, "head_dim is '8'"),
    ({"mlp_bias": True}, "mlp_bias is true"),
    ({"attention_bias": True}, "attention_bias is true"),
    ({"use_qk_norm": True}, "no norms on q and k"),
    ({"sliding_window": 4096}, "sliding_window is '4096'"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "attend to everything"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"quantization_config": {"bits": 4}}, "dequantise them first"),
    ({"num_local_experts": 8}, "mixture of experts"),
    ({"architectures": ["Qwen3ForCausalLM"]}, "q_norm and k_norm"),
    ({"architectures": ["MixtralForCausalLM"]}, "mixture of experts"),
    ({"architectures": ["BertModel"]}, "known are LlamaForCausalLM"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"hidden_size": 18}, "hidden_size 18 is not a multiple of num_attention_heads 4"),
    ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two', not a positive int"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"vocab_size": 12}, "model.embed_tokens.weight has the shape (11, 16), but config.json asks for (12, 16)"),
    ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
    ({"num_hidden_layers": 1}, "unexpected tensor 'model.layers.1."),
    ({"tie_word_embeddings": True}, "differs from model.embed_tokens.weight"),
    ({"tie_word_embeddings": "yes"}, "not true or false"),
])
def test_configs(tmp_path, capsys, config, text):
    make_source(tmp_path / "hf", config)
    refused(tmp_path, capsys, 3, text)


@pytest.mark.parametrize("flags, code, text", [
    (["--tp", "4"], 2, "--tp 4 cannot split the 2 kv_heads of layers.0.attention.k; --tp can be 1, 2"),
    (["--tp", "0"], 2, "--tp 0"),
    (["--pp", "9"], 2, "--pp 9 leaves stage"),
    (["--allow", "nonsense"], 2, "the names are rope_scaling"),
    (["--max-memory", "lots"], 2, "is not a size"),
    (["--max-memory", "16MiB"], 6, "cannot be kept"),
    (["--workers", "0"], 2, "--workers 0"),
    (["--vocab-multiple", "0"], 2, "--vocab-multiple 0"),
    (["--checkpoint-version", "1.2", "--rope", "neox"], 2, "always interleaves"),
    (["--checkpoint-version", "1.2", "--nanotron-config", "Qwen2Config"], 2, "has no Qwen2Config"),
])
def test_flags(tmp_path, capsys, flags, code, text):
    make_source(tmp_path / "hf")
    refused(tmp_path, capsys, code, text, flags=flags)


def test_release_04_knows_one_theta(tmp_path, capsys):
    make_source(tmp_path / "hf", {"rope_theta": 500000.0})
    refused(tmp_path, capsys, 3, "release 0.4", "--allow rope_theta", flags=["--checkpoint-version", "1.2"])


def test_all_problems_at_once_worst_first(tmp_path, capsys):
    make_source(tmp_path / "hf", {"mlp_bias": True, "sliding_window": 7})
    (tmp_path / "nt").mkdir()
    (tmp_path / "nt" / "old").touch()
    assert main([str(tmp_path / "hf"), str(tmp_path / "nt"), "--tp", "4", "--pp", "9"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and "config.json" in lines[0] and "is not empty" in lines[-1]


@pytest.mark.parametrize("edit, text", [
    (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    (lambda t: t.pop("lm_head.weight"), "config.json must say so"),
    (lambda t: t.update({"x\n\x1b[31m": np.zeros(1, np.float16)}), r"unexpected tensor 'x\n\x1b[31m'"),
    (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.zeros(4, np.float16)}), "q_norm"),
    (lambda t: t.update({"model.norm.weight": np.zeros(16, np.int8)}), "it is quantised"),
])
def test_tensors(tmp_path, capsys, edit, text):
    make_source(tmp_path / "hf", edit=edit)
    refused(tmp_path, capsys, 3, text)


@pytest.mark.parametrize("weight_map, text", [
    ({"a": "../evil.safetensors"}, "not a safetensors file in the folder"),
    ({"a": "/etc/x.safetensors"}, "not a safetensors file in the folder"),
    ({"a": "a/b.safetensors"}, "not a safetensors file in the folder"),
    ({"a": "pytorch_model.bin"}, "not a safetensors file in the folder"),
    ({"a": 7}, "not a safetensors file in the folder"),
    ({"a": "gone.safetensors"}, "which is missing"),
    ({"a": "one.safetensors"}, "'a' is in no shard"),
    ({}, "has no weight_map"),
])
def test_indexes(tmp_path, capsys, weight_map, text):
    source = make_source(tmp_path / "hf")
    (source / "model.safetensors").rename(source / "one.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, capsys, 3, text)


def test_sources_that_are_no_checkpoint(tmp_path, capsys):
    refused(tmp_path, capsys, 3, "is not a folder")
    source = make_source(tmp_path / "hf")
    (source / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, capsys, 3, "holds both")
    (source / "model.safetensors.index.json").unlink()
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    refused(tmp_path, capsys, 3, "but no model.safetensors.index.json")
    (source / "model-00001-of-00002.safetensors").rename(source / "pytorch_model.bin")
    refused(tmp_path, capsys, 3, "never opened", "save_pretrained")


@pytest.mark.parametrize("change", [-1, +1, -1000])
def test_files_of_the_wrong_size(tmp_path, capsys, change):
    source = make_source(tmp_path / "hf")
    size = (source / "model.safetensors").stat().st_size
    os.truncate(source / "model.safetensors", size + change)
    refused(tmp_path, capsys, 3, f"the header describes {size} bytes, the file has {size + change}")


@pytest.mark.parametrize("destination", ["hf", "hf/inside", ".", "link", "file", "file/inside"])
def test_destinations(tmp_path, capsys, destination):
    make_source(tmp_path / "hf")
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "hf"), str(tmp_path / destination)]) == 4
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "hf", "link"]


def test_allowed_limits_and_ignored_tensors_are_said(tmp_path, capsys):
    def tie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)

    config = {"rope_scaling": {"rope_type": "llama3"}, "tie_word_embeddings": True, "spice": 1}
    make_source(tmp_path / "hf", config, tie)
    assert main([str(tmp_path / "hf"), str(tmp_path / "nt"), "--allow", "rope_scaling"]) == 0
    out = capsys.readouterr().out
    for text in ("accepted: rope_type is 'llama3'", "ignored tensor lm_head.weight: tied", "inv_freq", "'spice'"):
        assert text in out
    assert not (tmp_path / "nt" / "model" / "model" / "lm_head").exists()


def test_transformers_4_and_5_say_the_same(tmp_path):
    five = {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "torch_dtype": None,
            "dtype": "float16"}
    make_source(tmp_path / "four")
    make_source(tmp_path / "five", five)
    for name in ("four", "five"):
        assert main([str(tmp_path / name), str(tmp_path / f"{name}_nt"), "--tp", "2", "--quiet"]) == 0
    for path in (tmp_path / "four_nt").rglob("*"):
        if path.is_file() and path.name not in ("config.yaml", "stream_reshard.json"):
            assert path.read_bytes() == (tmp_path / "five_nt" / path.relative_to(tmp_path / "four_nt")).read_bytes()
    embedding = load_file(next((tmp_path / "five_nt").rglob("token_embedding/*tp-rank-0*")))["data"]
    assert embedding.shape == (6, 16)
