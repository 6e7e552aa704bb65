"""Folders in Meta's format, made of a Hugging Face one with torch: rows of q and k put back in pairs, and split."""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from sources import make_source

SIZES = {"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 8, "num_key_value_heads": 4,
         "vocab_size": 12, "max_position_embeddings": 4096}
"""A config of a Llama 2 that splits into four parts."""

_IN_LAYER = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm"}
_OUTSIDE = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
            "lm_head.weight": "output.weight"}

Q, NORM, EMBEDDING, HEAD = "layers.0.attention.wq.weight", "norm.weight", "tok_embeddings.weight", "output.weight"


def params_of(config):
    """A params.json for a config.json."""
    return {"dim": config["hidden_size"], "n_layers": config["num_hidden_layers"],
            "n_heads": config["num_attention_heads"], "n_kv_heads": config["num_key_value_heads"], "multiple_of": 4,
            "norm_eps": config["rms_norm_eps"], "vocab_size": -1}


def pair(folder, num_parts=1, embedding_dim=1, change=lambda parts: None, params=None, **how):
    """(Hugging Face folder, the same model in Meta's format). `change` edits the tensors of the parts by name."""
    source = make_source(Path(folder) / "hf", **how | {"config": SIZES | how.get("config", {})})
    config = json.loads((source / "config.json").read_text())
    root = Path(folder) / "meta"
    root.mkdir()
    (root / "params.json").write_text(json.dumps(params_of(config) | (params or {})))
    parts = [{} for _ in range(num_parts)]
    for key, tensor in load_file(source / "model.safetensors").items():
        name, tensor = _as_meta(key, tensor, config)
        for part, piece in zip(parts, _pieces(name, tensor, num_parts, embedding_dim)):
            part[name] = piece
    for part in parts:
        part["rope.freqs"] = torch.arange(2.0)
    change(parts)
    for number, part in enumerate(parts):
        torch.save(part, root / f"consolidated.{number:02}.pth")
    return source, root


def _as_meta(key, tensor, config):
    if key in _OUTSIDE:
        return _OUTSIDE[key], tensor
    _, _, layer, *rest = key.removesuffix(".weight").split(".")
    name = _IN_LAYER[".".join(rest)]
    if name in ("attention.wq", "attention.wk"):
        heads = config["num_attention_heads" if name == "attention.wq" else "num_key_value_heads"]
        rows, columns = tensor.shape
        tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
    return f"layers.{layer}.{name}.weight", tensor


def _pieces(name, tensor, num_parts, embedding_dim):
    if "norm" in name:
        return [tensor] * num_parts
    dim = embedding_dim if name == EMBEDDING else 1 if name.endswith(("wo.weight", "w2.weight")) else 0
    return [piece.clone() for piece in tensor.chunk(num_parts, dim)]
