"""Weights that are quantised, or that a wrapper has renamed, are told in one line: what they are, and what to do."""
import json

import numpy as np
import pytest
from refusals import told
from sources import INDEX, ONE, TWO, edit_config, make_source, read, renamed, tensor_bytes

SINGLE = "model.safetensors"


def packed(ends, dtype=np.int32):
    """Gives every projection the tensors of a quantiser instead of its weight."""
    def change(root):
        tensors = {}
        for key, array in read(root / SINGLE).items():
            base = key.removesuffix(".weight")
            tensors |= {f"{base}.{end}": np.ones(2, dtype) for end in ends} if "_proj" in key else {key: array}
        (root / SINGLE).write_bytes(tensor_bytes(tensors))
    return change


def configured(change, **config):
    return lambda root: (change(root), edit_config(root, config))


QUANTISED = [
    ("GPTQ", configured(packed(["qweight", "qzeros", "scales", "g_idx"]), quantization_config={"quant_method": "gptq"}),
     ["'gptq'", ".g_idx'", "I32"]),
    ("GPTQ by names", packed(["qweight", "qzeros", "scales", "g_idx"]), ["'GPTQ'"]),
    ("AWQ by names", packed(["qweight", "qzeros", "scales"]), ["'AWQ or GPTQ'"]),
    ("compressed-tensors", packed(["weight_packed", "weight_scale", "weight_shape"]), ["'compressed-tensors'"]),
    ("bitsandbytes, 4 bit", packed(["weight", "weight.absmax", "weight.quant_map",
                                    "weight.quant_state.bitsandbytes__nf4"], np.uint8), ["'bitsandbytes, 4 bit'"]),
    ("bitsandbytes, 8 bit", packed(["weight", "SCB", "weight_format"], np.int8), ["'bitsandbytes, 8 bit'"]),
    ("FP8", packed(["weight", "weight_scale_inv"], np.int8), ["'FP8'"]),
    ("HQQ", packed(["W_q", "meta"], np.uint8), ["'HQQ'"]), ("AQLM", packed(["codes", "codebooks", "scales"]), ["'AQLM'"]),
    ("quanto", packed(["weight._data", "weight._scale"], np.int8), ["'quanto'"]),
    ("EETQ", packed(["weight", "weight_scales"], np.int8), ["'EETQ'"]),
    ("MLX", configured(packed(["weight", "scales", "biases"], np.int32), quantization={"group_size": 64, "bits": 4}),
     ["'4 bits'"]),
    ("a new method", configured(packed(["bits_of_it"]), quantization_config={"quant_method": "nova\x1b[2J"}),
     [r"'nova\x1b[2J'", "bits_of_it"]),
    ("bare int8", packed(["weight"], np.int8), ["'I8'"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in QUANTISED])
def test_quantised(tmp_path, capsys, change, words):
    root = make_source(tmp_path / "hf", config={"num_hidden_layers": 5})
    change(root)
    line = told(capsys, "plan", root)
    assert all(word in line for word in ["the weights are quantised", "dequantise", *words]), line


WRAPPED = [
    ("torch.compile", lambda key: f"_orig_mod.{key}", "begin with '_orig_mod.'"),
    ("PEFT", lambda key: f"base_model.model.{key}", "begin with 'base_model.model.'"),
    ("a larger model", lambda key: f"language_model.{key}", "begin with 'language_model.'"),
    ("DDP", lambda key: f"module.{key}", "begin with 'module.'"),
    ("two wrappers", lambda key: f"module._orig_mod.{key}", "begin with 'module._orig_mod.'"),
    ("any other", lambda key: f"student.net.{key}", "begin with 'student.net.'"),
    ("but for the head", lambda key: f"llm.{key}" if key.startswith("model.") else key, "begin with 'llm.'"),
    ("in place of model.", lambda key: key.replace("model.", "transformer."), "begin with 'transformer.'"),
    ("twice too much", lambda key: f"model.model.{key}", "'model.model."),
    ("in every layer", lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn").replace(
        ".mlp", "._fsdp_wrapped_module.mlp"), "hold '_fsdp_wrapped_module.'"),
    ("behind model.", lambda key: key.replace("model.", "model._orig_mod."), "hold '_orig_mod.'"),
    ("Meta's names", lambda key: {"model.embed_tokens.weight": "tok_embeddings.weight"}.get(
        key, key.replace("self_attn.q_proj", "attention.wq")), "original format"),
    ("LoRA", lambda key: key.replace("q_proj", "q_proj.base_layer").replace("k_proj.weight", "k_proj.lora_A.weight"),
     "merge_and_unload")]


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("change, word", [pytest.param(*row[1:], id=row[0]) for row in WRAPPED])
def test_names_of_a_wrapper(tmp_path, capsys, change, word, num_shards):
    root = make_source(tmp_path / "hf", config={"num_hidden_layers": 4, "vocab_size": 7}, num_shards=num_shards)
    for name in [SINGLE] if num_shards == 1 else [ONE, TWO]:
        renamed(root, change, name)
    if num_shards == 2:
        index = json.loads((root / INDEX).read_text())
        index["weight_map"] = {change(key): name for key, name in index["weight_map"].items()}
        (root / INDEX).write_text(json.dumps(index))
    assert word in told(capsys, "plan", root)
    assert word in told(capsys, "inspect", root)
    assert word in told(capsys, "verify", root, root)
