"""What each family asks of Nanotron: settings that it cannot say, layers without rotary embedding, experts."""
import json

import numpy as np
import pytest
from conversions import assert_same, convert, tensors
from sources import make_source

from stream_reshard.cli import main
from stream_reshard.cli.demo import CONFIG, write_random_source

CHOSEN = [
    ("llama", {"architectures": ["LLaMAForCausalLM"]}, "llama", None),
    ("llama", {"architectures": ["FSDPLlamaForCausalLM"]}, "llama", None),
    ("llama", {"architectures": ["LlamaModel"]}, "llama", None),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "llama", None),
    ("llama", {"architectures": "LlamaForCausalLM"}, "llama", None), ("llama", {"architectures": []}, "llama", None),
    ("llama", {"architectures": None}, "llama", None), ("llama", {"architectures": ...}, "llama", None),
    ("llama", {"architectures": ["YiForCausalLM"]}, "llama", "architectures names 'YiForCausalLM'; model_type decides"),
    ("llama", {"architectures": ["MistralForCausalLM"]}, "llama", "architectures names 'MistralForCausalLM'"),
    ("llama", {"architectures": ["Qwen3ForCausalLM"]}, "llama", "architectures names 'Qwen3ForCausalLM'"),
    ("mistral", {"architectures": ["LlamaForCausalLM"]}, "mistral", "architectures names 'LlamaForCausalLM'"),
    ("qwen2", {"architectures": ["LlamaForCausalLM"]}, "qwen2", "architectures names 'LlamaForCausalLM'"),
    ("llama", {"model_type": ...}, "llama", None), ("llama", {"model_type": None}, "llama", None),
    ("llama", {"model_type": ..., "architectures": ["LLaMAForCausalLM"]}, "llama", None),
    ("llama", {"model_type": ..., "architectures": "llamaforcausallm"}, "llama", None),
    ("qwen2_moe", {"model_type": ..., "architectures": ["FSDPQwen2MoeForCausalLM"]}, "qwen2_moe", None),
    ("smollm3", {"model_type": ...}, "smollm3", None)]


@pytest.mark.parametrize("family, config, chosen, note", CHOSEN, ids=[f"{row[0]} {row[1]}"[:60] for row in CHOSEN])
def test_model_type_decides_and_then_the_class(tmp_path, capsys, family, config, chosen, note):
    """As transformers decides; what they contradict each other in is told."""
    source = make_source(tmp_path / "hf", family=family, config=config)
    assert main(["plan", str(source)]) == 0
    out = capsys.readouterr().out
    assert f" Hugging Face, {chosen}, " in out and (note or "") in out and ("model_type decides" in out) == bool(note), out
    assert main(["inspect", str(source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == chosen


@pytest.mark.parametrize("config, message", [
    ({"model_type": "mistral"}, "sliding_window is absent, which means 4096"),
    ({"model_type": "mistral", "sliding_window": 32}, "sliding_window is '32'"),
    ({"model_type": "qwen2"}, "q_proj.bias is missing"),
    ({"model_type": "gemma"}, "model_type 'gemma' cannot be converted"),
    ({"model_type": "gemma", "architectures": ...}, "model_type 'gemma' cannot be converted"),
    ({"model_type": "ministral"}, "model_type 'ministral' cannot be converted: known are llama (Llama")])
def test_the_rules_are_those_of_model_type(tmp_path, capsys, config, message):
    """A Llama's class does not keep Mistral's window, or another family, from being seen."""
    source = make_source(tmp_path / "hf", config=config)
    for command in (["plan", source], [source, tmp_path / "nt"]):
        assert main(list(map(str, command))) == 3
        assert message in capsys.readouterr().err
    convert(make_source(tmp_path / "good"), tmp_path / "good-nt")
    assert main(["verify", str(tmp_path / "good-nt"), str(source)]) == 5  # As a copy that says another family.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification", "LlamaForRewardModel"])
def test_a_head_is_not_invented(tmp_path, capsys, name, tied):
    source = make_source(tmp_path / "hf", tied=tied, config={"architectures": [name]}, drop=["lm_head.weight"])
    assert main(["plan", str(source)]) == (0 if tied else 3)
    lines = capsys.readouterr().err.splitlines()
    assert tied or (len(lines) == 1 and f"names '{name}', a class without a language-model head" in lines[0])


@pytest.mark.parametrize("family, config, code, message", [
    ("mistral", {"sliding_window": ...}, 3, "sliding_window is absent, which means 4096"),
    ("mistral", {"sliding_window": 32}, 3, "Nanotron would attend to everything"),
    ("mistral", {"sliding_window": 32, "head_dim": 8}, 3, "head_dim is '8'"),
    ("qwen2_moe", {"norm_topk_prob": True}, 3, "norm_topk_prob is true"),
    ("qwen2_moe", {"mlp_only_layers": [0]}, 3, "layers without experts are not converted"),
    ("qwen2_moe", {"decoder_sparse_step": 2}, 3, "decoder_sparse_step is '2'"),
    ("qwen2_moe", {"num_experts_per_tok": 4}, 3, "4 of 3 experts are chosen"),
    ("smollm3", {"no_rope_layers": [0, 1]}, 3, "not every n-th"),
    ("smollm3", {"no_rope_layers": [1, 2]}, 3, "not a list of 0 and 1"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 3}, 3, "is not a multiple of 3")])
def test_what_a_family_cannot_say_in_nanotron_is_refused(tmp_path, capsys, family, config, code, message):
    source = make_source(tmp_path / "hf", family=family, config=config)
    assert main([str(source), str(tmp_path / "nt")]) == code
    assert message in capsys.readouterr().err


def test_layers_without_rope_are_told_to_nanotron(tmp_path):
    for name, config in (("list", {}), ("interval", {"no_rope_layers": ...}), ("none", {"no_rope_layers": [1, 1]})):
        convert(make_source(tmp_path / name, family="smollm3", config=config), tmp_path / f"{name}-nt")
        told = json.loads((tmp_path / f"{name}-nt" / "model_config.json").read_text())
        assert told.get("no_rope_layer") == (None if name == "none" else 2) and "is_qwen2_config" in told


def test_keys_of_nanotron_mean_nothing_in_another_config(tmp_path):
    source = make_source(tmp_path / "hf", config={"no_rope_layer": 2})
    convert(source, tmp_path / "nt")
    assert "no_rope_layer" not in json.loads((tmp_path / "nt" / "model_config.json").read_text())


def experts(root, layer, name, shape):
    """(path, header, array) of Nanotron's experts of a layer."""
    path = root / f"model/model/decoder/{layer}/pp_block/mlp/experts/model_merged_{name}_proj.safetensors"
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return path, raw[:begin], np.frombuffer(raw[begin:], np.uint16).reshape(shape)


def test_experts_are_stacked_transposed_gate_before_up(tmp_path):
    source = make_source(tmp_path / "hf", family="qwen2_moe")
    convert(source, tmp_path / "nt", "--tp", 2)
    want = tensors(source)
    _, _, gate_up = experts(tmp_path / "nt", 1, "gate_up", (3, 16, 12))
    _, _, down = experts(tmp_path / "nt", 1, "down", (3, 6, 16))
    for expert in range(3):
        gate, up, out = (want[f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert np.array_equal(gate_up[expert], np.concatenate([gate.T, up.T], axis=1))
        assert np.array_equal(down[expert], out.T)
    told = json.loads((tmp_path / "nt" / "model_config.json").read_text())["moe_config"]
    assert (told["num_experts"], told["top_k"], told["enable_shared_expert"]) == (3, 2, True)


@pytest.mark.parametrize("layers, code", [([0, 1], 0), ([1], 3), ([0, 1, 2], 3)])
def test_layers_with_experts_as_a_trainer_saves_them(tmp_path, layers, code):
    """-1 is every layer; Nanotron's config class lists them when it is made, and so does the file that it saves."""
    convert(make_source(tmp_path / "hf", family="qwen2_moe"), tmp_path / "nt")
    path = tmp_path / "nt" / "model_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"moe_config": config["moe_config"] | {"layers": layers}}))
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), "--to", "hf", "--quiet"]) == code


@pytest.mark.parametrize("change", [lambda array: array[[1, 0, 2]], lambda array: np.roll(array, 6, axis=2),
                                    lambda array: array[:, ::-1]], ids=["experts", "gate and up", "columns"])
def test_exchanged_experts_are_found(tmp_path, capsys, change):
    source = make_source(tmp_path / "hf", family="qwen2_moe")
    convert(source, tmp_path / "nt")
    path, header, array = experts(tmp_path / "nt", 0, "gate_up", (3, 16, 12))
    path.write_bytes(header + np.ascontiguousarray(change(array)).tobytes())
    (tmp_path / "nt" / "stream_reshard.json").unlink()
    assert main(["verify", str(source), str(tmp_path / "nt")]) == 5
    assert "experts.0.gate_proj.weight [0, 0]" in capsys.readouterr().err


def test_an_expert_larger_than_a_buffer_comes_back(tmp_path):
    """Beside a row of gate stands one of up: a block of gate is read with what stands in between."""
    sizes = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8,
             "num_key_value_heads": 8, "vocab_size": 300, "architectures": ["Qwen2MoeForCausalLM"],
             "model_type": "qwen2_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 1408,
             "shared_expert_intermediate_size": 64}
    write_random_source(tmp_path / "hf", CONFIG | sizes)
    convert(tmp_path / "hf", tmp_path / "nt", "--tp", 2, "--max-memory", "8GiB")
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf", "--max-memory", "8GiB")
    assert_same(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))
    convert("verify", tmp_path / "hf", tmp_path / "nt")
