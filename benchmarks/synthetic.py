"""Make a Hugging Face folder of a known shape with random bits, in shards: input for measurements.

    python benchmarks/synthetic.py llama-7b OUT

The bits are one random megabyte repeated from other starting points, so that it is made at the speed of the disk and no
file system can compress or deduplicate whole blocks away.
"""
from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from stream_reshard.formats.config_json import CONFIG_NAME, INDEX_NAME, read_config
from stream_reshard.model.architectures import FAMILIES, build_model
from stream_reshard.model.parameters import Parameter
from stream_reshard.storage.dtypes import ITEMSIZE, SAFETENSORS_DTYPES
from stream_reshard.storage.header import pack_header

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
          "rope_theta": 10000.0, "tie_word_embeddings": False, "max_position_embeddings": 4096, "bos_token_id": 1,
          "eos_token_id": 2, "torch_dtype": "bfloat16"}


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    return _LLAMA | {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
                     "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab}


def _moe(hidden: int, layers: int) -> dict:
    """A Qwen2-MoE with the experts of Qwen1.5-MoE-A2.7B, in its proportions."""
    return _llama(hidden, hidden * 11 // 4, layers, 16, 16, 32000) | {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": hidden * 11 // 16,
        "shared_expert_intermediate_size": hidden * 11 // 4, "norm_topk_prob": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "use_sliding_window": False}


SHAPES = {
    "llama-0.3b": _llama(1024, 2752, 16, 16, 16, 32000),
    "llama-1.3b": _llama(2048, 5504, 24, 16, 16, 32000),
    "llama-2.7b": _llama(2560, 6912, 32, 32, 32, 32000),
    "llama-7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "one-embedding-4gb": _llama(4096, 256, 1, 32, 32, 512000),
    "qwen2-moe-0.3b": _moe(512, 9),
    "qwen2-moe-1.3b": _moe(1024, 9),
    "qwen2-moe-2.7b": _moe(1024, 18),
    "qwen2-moe-7b": _moe(2048, 12),
}
SHAPES |= {f"{name}-float32": config | {"torch_dtype": "float32"} for name, config in SHAPES.items()}


def write_source(root: Path, config: dict, max_shard_nbytes: int = 5 * 10**9) -> None:
    """Shards of at most `max_shard_nbytes` where a tensor does not exceed it, the index, and config.json."""
    root.mkdir(parents=True)
    (root / CONFIG_NAME).write_text(json.dumps(config, indent=2))
    parsed, dtype = read_config(root), SAFETENSORS_DTYPES[config["torch_dtype"]]
    shards: list[list[Parameter]] = [[]]
    size = 0
    for parameter in build_model(FAMILIES[parsed.family.hugging_face_class], parsed.model).stored():
        nbytes = parameter.num_elements * ITEMSIZE[dtype]
        if size + nbytes > max_shard_nbytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size += nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, parameters in zip(names, shards):
        _write_shard(root / name, parameters, dtype)
    weight_map = {p.hugging_face: name for name, parameters in zip(names, shards) for p in parameters}
    (root / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_shard(path: Path, parameters: list[Parameter], dtype: str) -> None:
    noise, begin = os.urandom(2**20) * 17, 0
    with open(path, "wb") as stream:
        stream.write(pack_header([(p.hugging_face, dtype, p.matrix_shape) for p in parameters], {"format": "pt"}))
        for parameter in parameters:
            left = parameter.num_elements * ITEMSIZE[dtype]
            while left:
                piece = noise[begin:begin + min(left, 16 * 2**20)]
                stream.write(piece)
                left, begin = left - len(piece), (begin + 4099) % 2**20
        stream.flush()
        os.fsync(stream.fileno())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write_source(arguments.out, SHAPES[arguments.shape])
