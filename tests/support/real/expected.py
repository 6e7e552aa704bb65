"""What every Nanotron parameter must hold, told from the Hugging Face weights through Nanotron's own slice metadata."""
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

FUSED = {"attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "attn.o_proj": ("self_attn.o_proj",),
         "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
OUTSIDE_LAYERS = {"token_position_embeddings.pp_block.token_embedding.weight": "model.embed_tokens.weight",
                  "final_layer_norm.pp_block.weight": "model.norm.weight",
                  "lm_head.pp_block.weight": "lm_head.weight"}
COPIED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")


class HuggingFace:
    """A Hugging Face model folder, opened one tensor at a time."""

    def __init__(self, folder):
        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.file_of = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self.file_of.update(dict.fromkeys(file.keys(), path))

    def tensor(self, name):
        if name == "lm_head.weight" and name not in self.file_of:
            name = "model.embed_tokens.weight"
        with safe_open(self.file_of[name], "pt") as file:
            return file.get_tensor(name)

    @property
    def rope_theta(self):
        return (self.config.get("rope_parameters") or self.config).get("rope_theta", 10000.0)

    @property
    def dtype(self):
        return getattr(torch, self.config.get("dtype") or self.config.get("torch_dtype"))


def model_fields(hf, vocab_multiple):
    """The fields of Nanotron's model config that the weights' meaning rests on, with the padded vocabulary."""
    padded = -(-hf.config["vocab_size"] // vocab_multiple) * vocab_multiple
    fields = {name: hf.config[name] for name in COPIED}
    bias = hf.config["model_type"] == "qwen2" or hf.config.get("attention_bias", False)
    return fields | {"vocab_size": padded, "rope_theta": hf.rope_theta, "attention_bias": bias}


def interleaved(rows, num_heads):
    """Each head's rows (or bias entries) in the order 0, d/2, 1, d/2 + 1, ... of its d rows."""
    head_dim = rows.shape[0] // num_heads
    order = torch.arange(head_dim).reshape(2, head_dim // 2).T.flatten()
    return rows.unflatten(0, (num_heads, head_dim))[:, order].flatten(0, 1)


def whole(name, hf, rope_interleaved):
    """The uncut tensor of the Nanotron parameter `name`."""
    name = name.removeprefix("model.")
    if name in OUTSIDE_LAYERS:
        return hf.tensor(OUTSIDE_LAYERS[name])
    layer, module, kind = re.fullmatch(r"decoder\.(\d+)\.pp_block\.(.+)\.(weight|bias)", name).groups()
    parts = [hf.tensor(f"model.layers.{layer}.{part}.{kind}") for part in FUSED.get(module, (module,))]
    if module == "attn.qkv_proj" and rope_interleaved:
        parts[0] = interleaved(parts[0], hf.config["num_attention_heads"])
        parts[1] = interleaved(parts[1], hf.config["num_key_value_heads"])
    return torch.cat(parts)


def local(name, param, hf, rope_interleaved):
    """What this rank's part of the parameter must hold; NaN where it is vocabulary padding, which nothing defines."""
    full = whole(name, hf, rope_interleaved)
    if not param.is_sharded:
        return full
    sharding = param.get_sharded_info()
    padded = torch.full([int(length) for length in sharding.unsharded_shape], float("nan"), dtype=full.dtype)
    padded[:full.shape[0]] = full
    part = torch.empty(param.shape, dtype=full.dtype)
    for pair in sharding.local_global_slices_pairs:
        part[pair.local_slices] = padded[pair.global_slices]
    return part


def same_bits(got, want):
    """Whether the two agree in every bit, -0.0 and 0.0 being different; NaN in `want` leaves an element out."""
    known = ~torch.isnan(want)
    got, want = got.detach()[known], want.to(got.dtype)[known]
    return torch.equal(got.view(torch.uint8), want.view(torch.uint8))
