"""A Hugging Face checkpoint run forward, in float32 on a CPU, as transformers does with eager attention.

Written from transformers' modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen2_moe and modeling_smollm3.
No arithmetic is shared with the Nanotron side, so that a mistake in one of them shows as a difference.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stream_reshard.check.forward import steps
from stream_reshard.check.forward.hugging_face_config import HuggingFaceConfig
from stream_reshard.check.forward.hugging_face_tensors import EMBEDDING, FINAL_NORM, HEAD, HuggingFaceTensors
from stream_reshard.check.forward.steps import Step, Work
from stream_reshard.check.forward.weights import Weights


class HuggingFaceModel:
    """A checkpoint, computed module by module."""

    def __init__(self, config: HuggingFaceConfig, tensors: HuggingFaceTensors, weights: Weights):
        self._config, self._tensors, self._weights = config, tensors, weights

    def steps(self, tokens: Sequence[int]) -> Iterator[Step]:
        """See `steps.Model`."""
        hidden = self._weights.picked(self._tensors[EMBEDDING], tokens)
        yield Step(None, steps.EMBEDDING, hidden, EMBEDDING)
        for layer in range(self._config.num_layers):
            hidden = yield from self._layer(layer, hidden)
        yield Step(None, steps.FINAL_NORM, self._norm(FINAL_NORM, hidden), FINAL_NORM, self._norm_settings)

    def logits(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """See `steps.Model`."""
        return self._weights.linear(hidden, self._tensors[EMBEDDING if self._config.is_tied else HEAD], None, first,
                                    last)

    def _layer(self, layer: int, hidden: Tensor) -> Work:
        """A decoder layer; returns its output."""
        name = f"model.layers.{layer}."
        for norm, inner in (("input_layernorm", self._attention), ("post_attention_layernorm", self._feed_forward)):
            normed = self._norm(f"{name}{norm}.weight", hidden)
            yield Step(layer, norm, normed, f"{name}{norm}.weight", self._norm_settings)
            hidden = hidden + (yield from inner(layer, normed))
        yield Step(layer, steps.HIDDEN, hidden)
        return hidden

    def _attention(self, layer: int, x: Tensor) -> Work:
        config, name = self._config, f"model.layers.{layer}.self_attn."
        made = {}
        for part in "qkv":
            made[part] = self._linear(f"{name}{part}_proj", x)
            yield Step(layer, f"self_attn.{part}_proj", made[part], f"{name}{part}_proj.weight", steps.HALVES)
        turns = config.layers_with_rope[layer]
        options = f"rope_theta {config.rope_theta:g}, {config.rope_scaling or 'unscaled'}, {steps.HALVES}"
        for part in "qk":
            made[part] = self._turned(made[part]) if turns else made[part]
            yield Step(layer, f"self_attn.{part}_turned", made[part], "", options if turns else "no rotary embedding")
        q, k, v = (made.pop(part).view(len(x), -1, config.head_dim).transpose(0, 1) for part in "qkv")
        out = self._attended(q, k, v, config.windows[layer])
        del q, k, v
        yield Step(layer, "self_attn.attention", out, "", f"window {config.windows[layer]}")
        out = self._linear(f"{name}o_proj", out)
        yield Step(layer, "self_attn.o_proj", out, f"{name}o_proj.weight")
        return out

    def _turned(self, x: Tensor) -> Tensor:
        """apply_rotary_pos_emb."""
        config = self._config
        angles = torch.outer(torch.arange(len(x), dtype=torch.float32), self._frequencies())
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        heads = x.view(len(x), -1, config.head_dim)
        one, two = heads[..., :config.head_dim // 2], heads[..., config.head_dim // 2:]
        turned = heads * angles.cos() + torch.cat((-two, one), dim=-1) * angles.sin()
        return turned.reshape(x.shape)

    def _frequencies(self) -> Tensor:
        """Frequencies of rotary embedding, in radians per token (modeling_rope_utils: default, linear, llama3)."""
        config, scaling = self._config, self._config.rope_scaling
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        plain = 1.0 / (config.rope_theta ** exponents)
        if scaling is None:
            return plain
        if scaling.llama3 is None:
            return plain / scaling.factor
        low, high = scaling.llama3.low_freq_factor, scaling.llama3.high_freq_factor
        length = scaling.llama3.original_max_position_embeddings
        wavelengths = 2 * math.pi / plain
        smooth = (length / wavelengths - low) / (high - low)
        between = (1 - smooth) * plain / scaling.factor + smooth * plain
        return torch.where(wavelengths > length / low, plain / scaling.factor,
                           torch.where(wavelengths < length / high, plain, between))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """eager_attention_forward, one head of k and v with its queries at a time."""
        num_tokens, num_queries = q.shape[1], len(q) // len(k)
        hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(-window)
        out = torch.empty(num_tokens, len(q), q.shape[2])
        for head in range(len(k)):
            queries = slice(head * num_queries, (head + 1) * num_queries)
            scores = q[queries] @ k[head].T * q.shape[2] ** -0.5
            out[:, queries] = (scores.masked_fill_(hidden, -math.inf).softmax(-1) @ v[head]).transpose(0, 1)
        return out.flatten(1)

    def _feed_forward(self, layer: int, x: Tensor) -> Work:
        if self._config.layers_with_experts[layer]:
            return (yield from self._experts(layer, x))
        return (yield from self._mlp(layer, "mlp", x))

    def _mlp(self, layer: int, title: str, x: Tensor) -> Work:
        name = f"model.layers.{layer}.{title}."
        gate = self._linear(f"{name}gate_proj", x)
        yield Step(layer, f"{title}.gate_proj", gate, f"{name}gate_proj.weight")
        up = self._linear(f"{name}up_proj", x)
        yield Step(layer, f"{title}.up_proj", up, f"{name}up_proj.weight")
        made = self._activated(gate) * up
        del gate, up
        down = self._linear(f"{name}down_proj", made)
        yield Step(layer, f"{title}.down_proj", down, f"{name}down_proj.weight",
                   f"hidden_act {self._config.activation}")
        return down

    def _experts(self, layer: int, x: Tensor) -> Work:
        """Qwen2MoeSparseMoeBlock. The router is not rounded to the dtype of a cast: Nanotron keeps it in float32."""
        config, name = self._config, f"model.layers.{layer}.mlp."
        probabilities = self._weights.as_stored().linear(x, self._tensors[f"{name}gate.weight"]).softmax(dim=-1)
        yield Step(layer, "mlp.gate", probabilities, f"{name}gate.weight")
        weights, chosen = torch.topk(probabilities, config.top_k, dim=-1)
        if config.is_top_k_normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(config.num_experts):
            mask = chosen == expert
            tokens = mask.any(dim=-1)
            if tokens.any():
                part, expert_name = x[tokens], f"{name}experts.{expert}."
                made = self._activated(self._linear(f"{expert_name}gate_proj", part))
                made = self._linear(f"{expert_name}down_proj", made * self._linear(f"{expert_name}up_proj", part))
                out[tokens] += made * (weights * mask).sum(dim=-1)[tokens, None]
        yield Step(layer, "mlp.experts", out, f"{name}experts",
                   f"{config.top_k} chosen{', normalised' if config.is_top_k_normalised else ''}")
        shared = yield from self._mlp(layer, "mlp.shared_expert", x)
        gate = torch.sigmoid(self._linear(f"{name}shared_expert_gate", x))
        yield Step(layer, "mlp.shared_expert_gate", gate, f"{name}shared_expert_gate.weight")
        return out + gate * shared

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self._weights.linear(x, self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"))

    def _activated(self, x: Tensor) -> Tensor:
        name = self._config.activation
        if name in ("silu", "swish"):
            return x * torch.sigmoid(x)
        if name == "relu":
            return x.clamp(min=0)
        return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")

    def _norm(self, name: str, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self._weights.vector(self._tensors[name]) * (x * torch.rsqrt(variance + self._config.norm_eps))

    @property
    def _norm_settings(self) -> str:
        return f"rms_norm_eps {self._config.norm_eps:g}"
