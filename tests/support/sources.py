"""Tiny Hugging Face checkpoints for tests, made without the package: own table of names and shapes, own header writer.

Every element of a checkpoint is another 16-bit pattern (read as bfloat16, but never computed with), so that an element
that ends in a wrong place, or twice, shows itself. `bfloat16` finds the patterns again.
"""
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
          "initializer_range": 0.02, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
          "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16"}
"""The config.json of a source where a test says nothing else, in the words of transformers 4."""

FAMILY = {"llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
          "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
          "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
          "qwen2_moe": {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 3,
                        "num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 10,
                        "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
                        "router_aux_loss_coef": 0.001, "use_sliding_window": False},
          "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layer_interval": 2,
                      "no_rope_layers": [1, 0]}}

DTYPES = {"uint16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8", "uint8": "U8",
          "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL"}
"""The safetensors dtype under which an array is saved: a uint16 is a bfloat16."""

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
"""Names of the index, and of the shards where there are two."""


def shapes_of(family: str, config: Mapping[str, Any], tied: bool) -> dict[str, tuple[int, ...]]:
    """The tensors that transformers saves for a model, by name, in the order of the forward pass."""
    hidden, ffn, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    rows = {"input_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn)}
    if family == "qwen2_moe":
        experts, expert_ffn, shared_ffn = 3, 6, 10
        rows = {name: shape for name, shape in rows.items() if not name.startswith("mlp.")}
        rows |= {"mlp.gate": (experts, hidden), "mlp.shared_expert_gate": (1, hidden)}
        for name, ffn in (*((f"experts.{expert}", expert_ffn) for expert in range(experts)),
                          ("shared_expert", shared_ffn)):
            rows |= {f"mlp.{name}.gate_proj": (ffn, hidden), f"mlp.{name}.up_proj": (ffn, hidden),
                     f"mlp.{name}.down_proj": (hidden, ffn)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in rows.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if family.startswith("qwen2") and name.endswith(("q_proj", "k_proj", "v_proj")):
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    return shapes if tied else shapes | {"lm_head.weight": (vocab, hidden)}


def make_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """An array per shape; no 16-bit pattern occurs twice in all of them, and neighbours differ in both bytes."""
    total = sum(map(math.prod, shapes.values()))
    assert total <= 2**16, f"{total} elements cannot all differ in 16 bits; make the model smaller"
    patterns = ((np.arange(total, dtype=np.uint32) * 40503 + 12345) & 0xFFFF).astype(np.uint16)
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    tensors = {key: part.reshape(shape) for (key, shape), part in zip(shapes.items(), np.split(patterns, ends[:-1]))}
    for key in tensors:
        if key.endswith("mlp.gate.weight"):  # A router is cast to float32 and back, so it holds numbers: 1, 1.0078 ...
            tensors[key] = (0x3F80 + np.arange(tensors[key].size, dtype=np.uint16)).reshape(tensors[key].shape)
    return tensors


def tensor_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file of these arrays, in this order, with a header as transformers writes it."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for key, array in tensors.items():
        table[key] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape),
                      "data_offsets": [begin, begin := begin + array.nbytes]}
    return raw_file(json.dumps(table)) + b"".join(array.tobytes() for array in tensors.values())


def raw_file(header: str | bytes, data: bytes = b"", claimed: int | None = None) -> bytes:
    """A file with any header at all; `claimed` is the length it says, in bytes, where that is a lie."""
    text = header if isinstance(header, bytes) else header.encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data


def edit_config(root: Path, config: Mapping[str, Any]) -> None:
    """Change keys of config.json but not the tensors; the value `...` takes a key out."""
    path = root / "config.json"
    changed = (json.loads(path.read_text()) if path.exists() else {}) | dict(config)
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}, indent=1))


def edit_text(path: Path, old: str, new: str) -> None:
    """Change a text file as no writer of JSON would."""
    path.write_text(path.read_text().replace(old, new))


def make_source(root: Path, *, family: str = "llama", num_shards: int = 1, tied: bool = False,
                config: Mapping[str, Any] = {}, drop: Collection[str] = (),
                extra: Mapping[str, np.ndarray] = {}) -> Path:
    """Write a checkpoint to the new folder `root`, and return it.

    `config` changes the config (`...` takes a key out), and with it the shapes of the tensors. `drop` leaves tensors
    out; `extra` adds them, or puts others in their place. One shard is model.safetensors, several have an index, and
    hold the tensors in turns of the forward pass.
    """
    root.mkdir(parents=True)
    whole = CONFIG | FAMILY[family] | {"tie_word_embeddings": tied} | dict(config)
    edit_config(root, whole)
    sizes = {key: whole[key] if isinstance(whole.get(key), int) else value for key, value in CONFIG.items()}
    tensors = make_tensors(shapes_of(family, sizes, tied)) | dict(extra)
    keys = [key for key in tensors if key not in drop]
    names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    if num_shards == 1:
        names = ["model.safetensors"]
    for name, part in zip(names, np.array_split(keys, num_shards)):
        (root / name).write_bytes(tensor_bytes({str(key): tensors[key] for key in part}))
    if num_shards > 1:
        parts = zip(names, np.array_split(keys, num_shards))
        index = {"metadata": {"total_size": sum(tensors[key].nbytes for key in keys)},
                 "weight_map": {str(key): name for name, part in parts for key in part}}
        (root / INDEX).write_text(json.dumps(index, indent=1))
    return root


def first_layers(source: Path, root: Path, layers: int) -> Path:
    """Write a checkpoint of only the first layers of a source in one shard, with the same weights; returns its folder."""
    root.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": layers}
    config |= {key: config[key][:layers] for key in ("no_rope_layers", "layer_types") if key in config}
    (root / "config.json").write_text(json.dumps(config, indent=1))
    kept = {key: array for key, array in read(source / "model.safetensors").items()
            if not key.startswith("model.layers.") or int(key.split(".")[2]) < layers}
    (root / "model.safetensors").write_bytes(tensor_bytes(kept))
    return root


def bfloat16(root: Path) -> dict[str, np.ndarray]:
    """The tensors of all safetensors files below a folder, as patterns of 16 bits (32 in float32), by "file:key"."""
    found = {}
    for path in sorted(root.rglob("*.safetensors")):
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        for key, entry in json.loads(raw[8:begin]).items():
            if key != "__metadata__":
                first, last = (begin + offset for offset in entry["data_offsets"])
                kind = f"u{(last - first) // math.prod(entry['shape'])}"
                array = np.frombuffer(raw[first:last], kind).reshape(entry["shape"])
                found[f"{path.relative_to(root).as_posix()}:{key}"] = array
    return found


def read(path):
    """The tensors of a shard."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    header.pop("__metadata__", None)
    return {key: np.frombuffer(raw[begin:][slice(*entry["data_offsets"])], np.uint16).reshape(entry["shape"])
            for key, entry in header.items()}


def renamed(root, change, name="model.safetensors"):
    """The same tensors under other names; where `change` gives None, without one."""
    tensors = read(root / name)
    (root / name).write_bytes(tensor_bytes({change(key): array for key, array in tensors.items() if change(key)}))
