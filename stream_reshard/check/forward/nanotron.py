"""A Nanotron checkpoint run forward as its ranks do, in float32 on a CPU.

Written from Nanotron's modules: models/llama.py, models/qwen.py, nn/moe.py, nn/rotary.py, nn/layer_norm.py, and
parallel/tensor_parallel/nn.py. A list holds one entry per tensor-parallel rank; its sum is their all-reduce, its
concatenation their all-gather. The planner, the layouts and the table of names are not used, so that a mistake in them
shows as a difference.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from stream_reshard.check.forward import steps
from stream_reshard.check.forward.nanotron_config import ExpertsConfig, NanotronConfig
from stream_reshard.check.forward.nanotron_tensors import EMBEDDING, FINAL_NORM, HEAD, NanotronTensors
from stream_reshard.check.forward.steps import Step, Work
from stream_reshard.check.forward.weights import Weights

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
"""Activations by the names of nanotron/nn/activations.py."""


class NanotronModel:
    """All ranks of a checkpoint, computed module by module."""

    def __init__(self, config: NanotronConfig, tensors: NanotronTensors, weights: Weights):
        self._config, self._tensors, self._weights = config, tensors, weights
        self._num_tp = tensors.num_tp

    def steps(self, tokens: Sequence[int]) -> Iterator[Step]:
        """See `steps.Model`. Stages need no step of their own: their layers are in order (`NanotronTensors.find`)."""
        hidden = self._embedded(tokens)
        yield Step(None, steps.EMBEDDING, hidden, EMBEDDING)
        for layer in range(self._config.num_layers):
            hidden = yield from self._layer(layer, hidden)
        yield Step(None, steps.FINAL_NORM, self._norm(FINAL_NORM, hidden), FINAL_NORM, self._norm_settings)

    def logits(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """See `steps.Model`. Each rank holds one part of the vocabulary."""
        name = EMBEDDING if self._config.is_tied else HEAD
        num_rows = self._config.vocab_size // self._num_tp
        parts = []
        for tp, weight in enumerate(self._tensors[name]):
            begin, end = max(first, tp * num_rows), min(last, (tp + 1) * num_rows)
            if begin < end:
                parts.append(self._weights.linear(hidden, weight, None, begin - tp * num_rows, end - tp * num_rows))
        return torch.cat(parts, -1)

    def _embedded(self, tokens: Sequence[int]) -> Tensor:
        """TensorParallelEmbedding: a rank looks up the tokens of its part of the vocabulary; its other rows are 0."""
        num_rows = self._config.vocab_size // self._num_tp
        total = torch.zeros(len(tokens), self._config.hidden_size)
        for tp, weight in enumerate(self._tensors[EMBEDDING]):
            positions = [position for position, token in enumerate(tokens) if token // num_rows == tp]
            total[positions] += self._weights.picked(weight, [tokens[position] % num_rows for position in positions])
        return total

    def _layer(self, layer: int, hidden: Tensor) -> Work:
        """A decoder layer; returns its output."""
        name = f"decoder.{layer}.pp_block."
        normed = self._norm(f"{name}input_layernorm.weight", hidden)
        yield Step(layer, "input_layernorm", normed, f"{name}input_layernorm.weight", self._norm_settings)
        hidden = hidden + (yield from self._attention(layer, normed))
        normed = self._norm(f"{name}post_attention_layernorm.weight", hidden)
        yield Step(layer, "post_attention_layernorm", normed, f"{name}post_attention_layernorm.weight",
                   self._norm_settings)
        experts = self._config.experts
        made = yield from (self._experts(layer, experts, normed) if experts and layer in experts.layers else
                           self._mlp(layer, "mlp", f"{name}mlp", normed))
        hidden = hidden + made
        yield Step(layer, steps.HIDDEN, hidden)
        return hidden

    def _attention(self, layer: int, x: Tensor) -> Work:
        config, name = self._config, f"decoder.{layer}.pp_block.attn."
        num_q, num_kv = config.num_heads // self._num_tp, config.num_kv_heads // self._num_tp
        sizes = [num * config.head_dim for num in (num_q, num_kv, num_kv)]
        q, k, v = map(list, zip(*(part.split(sizes, -1) for part in self._column(f"{name}qkv_proj", x))))
        order = steps.INTERLEAVED if config.rope_interleaved else steps.HALVES
        yield self._shown(layer, "self_attn.q_proj", [self._in_halves(part) for part in q], f"{name}qkv_proj", order)
        yield self._shown(layer, "self_attn.k_proj", [self._in_halves(part) for part in k], f"{name}qkv_proj", order)
        yield self._shown(layer, "self_attn.v_proj", v, f"{name}qkv_proj", order)
        turns = self._has_rope(layer)
        window = config.window if turns else None
        if turns:
            q, k = [self._turned(part) for part in q], [self._turned(part) for part in k]
        scaling = "unscaled" if config.rope_interpolation == 1 else f"positions / {config.rope_interpolation:g}"
        options = f"rope_theta {config.rope_theta:g}, {scaling}, {order}" if turns else "no rotary embedding"
        yield self._shown(layer, "self_attn.q_turned", [self._in_halves(part) for part in q], "", options)
        yield self._shown(layer, "self_attn.k_turned", [self._in_halves(part) for part in k], "", options)
        out = [self._attended(*parts, window) for parts in zip(q, k, v)]
        del q, k, v
        yield self._shown(layer, "self_attn.attention", out, "", f"window {window}")
        summed = self._row(f"{name}o_proj", out)
        yield Step(layer, "self_attn.o_proj", summed, f"{name}o_proj")
        return summed

    def _has_rope(self, layer: int) -> bool:
        interval = self._config.no_rope_layer
        return interval is None or (layer + 1) % interval != 0

    def _turned(self, x: Tensor) -> Tensor:
        """Rotary embedding of the heads of one rank, as in flash-attn's RotaryEmbedding."""
        config = self._config
        heads = x.unflatten(-1, (-1, config.head_dim))
        inverse = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(len(x)).float() / config.rope_interpolation, inverse)[:, None]
        cos, sin = angles.cos(), angles.sin()
        if config.rope_interleaved:
            even, odd = heads[..., 0::2], heads[..., 1::2]
            return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(1)
        low, high = heads.chunk(2, -1)
        return torch.cat((low * cos - high * sin, low * sin + high * cos), -1).flatten(1)

    def _in_halves(self, x: Tensor) -> Tensor:
        """Heads with their elements in Hugging Face's order."""
        if not self._config.rope_interleaved:
            return x
        return x.unflatten(-1, (-1, self._config.head_dim // 2, 2)).transpose(-1, -2).flatten(1)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Causal attention of the heads of one rank, scaled with the square root of head_dim."""
        q, k, v = (part.unflatten(-1, (-1, self._config.head_dim)).transpose(0, 1) for part in (q, k, v))
        num_queries = len(q) // len(k)
        k, v = k.repeat_interleave(num_queries, 0), v.repeat_interleave(num_queries, 0)
        mask = None
        if window is not None:
            mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril().triu(1 - window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return out.transpose(0, 1).flatten(1)

    def _mlp(self, layer: int, title: str, name: str, x: Tensor) -> Work:
        """Qwen2MLP, and Llama's MLP: a rank's features are those of gate, then those of up."""
        gate, up = zip(*(part.chunk(2, -1) for part in self._column(f"{name}.gate_up_proj", x)))
        yield self._shown(layer, f"{title}.gate_proj", gate, f"{name}.gate_up_proj")
        yield self._shown(layer, f"{title}.up_proj", up, f"{name}.gate_up_proj")
        made = [ACTIVATIONS[self._config.activation](a) * b for a, b in zip(gate, up)]
        del gate, up
        down = self._row(f"{name}.down_proj", made)
        yield Step(layer, f"{title}.down_proj", down, f"{name}.down_proj", f"hidden_act {self._config.activation}")
        return down

    def _experts(self, layer: int, config: ExpertsConfig, x: Tensor) -> Work:
        """Qwen2MoELayer: the weights of the chosen experts come from a softmax over all; every rank has all experts."""
        name = f"decoder.{layer}.pp_block.mlp."
        probabilities = F.softmax(self._weights.linear(x, self._tensors[f"{name}router.weight"][0]), -1)
        yield Step(layer, "mlp.gate", probabilities, f"{name}router.weight")
        weights, chosen = probabilities.topk(config.top_k, -1)
        gate_up, down = (self._tensors[f"{name}experts.merged_{which}_proj"][0] for which in ("gate_up", "down"))
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, choices = (chosen == expert).nonzero(as_tuple=True)
            gate, up = self._weights.stacked(x[tokens], gate_up, expert).chunk(2, -1)
            made = self._weights.stacked(ACTIVATIONS[self._config.activation](gate) * up, down, expert)
            out.index_add_(0, tokens, made * weights[tokens, choices, None])
        yield Step(layer, "mlp.experts", out, f"{name}experts", f"{config.top_k} chosen")
        if config.shared_intermediate_size is not None:
            shared = yield from self._mlp(layer, "mlp.shared_expert", f"{name}shared_expert", x)
            gate = self._weights.linear(x, self._tensors[f"{name}shared_expert_gate.weight"][0]).sigmoid()
            yield Step(layer, "mlp.shared_expert_gate", gate, f"{name}shared_expert_gate.weight")
            out = out + gate * shared
        return out

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """TritonRMSNorm."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self._config.norm_eps)
        return x * scale * self._weights.vector(self._tensors[name][0])

    @property
    def _norm_settings(self) -> str:
        return f"rms_norm_eps {self._config.norm_eps:g}"

    def _column(self, name: str, x: Tensor) -> list[Tensor]:
        """TensorParallelColumnLinear: each rank computes its own features."""
        weights, biases = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias")
        return [self._weights.linear(x, weight, biases[tp] if biases else None) for tp, weight in enumerate(weights)]

    def _row(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """TensorParallelRowLinear: each rank computes a part of the sum that makes up every feature."""
        products = (self._weights.linear(x, weight) for x, weight in zip(parts, self._tensors[f"{name}.weight"]))
        total = next(products)
        for product in products:
            total += product
        return total

    def _shown(self, layer: int, name: str, parts: Sequence[Tensor], weight: str, settings: str = "") -> Step:
        return Step(layer, name, torch.cat(tuple(parts), -1), weight, settings, len(parts))
