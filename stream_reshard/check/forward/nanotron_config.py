"""The computation of a Nanotron checkpoint, by its model_config.json and the format version of its files.

Written from Nanotron's LlamaConfig, Qwen2Config and MoEConfig (nanotron/config/models_config.py), their defaults
included, and from what the modules make of them.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_reshard.check.forward.settings import Settings
from stream_reshard.errors import Problems, quoted
from stream_reshard.storage.small_files import read_json

CONFIG_NAME = "model_config.json"

_DEFAULTS = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
             "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
             "num_experts": 8, "top_k": 2, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixture of experts that takes the place of an MLP."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int | None
    """None without a shared expert."""
    layers: tuple[int, ...]
    """Indices of the layers that have it."""


@dataclass(frozen=True)
class NanotronConfig:
    """A model config, and values that follow from it."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    """Rows of embedding and head, padding included."""
    max_num_tokens: int
    norm_eps: float
    rope_theta: float
    rope_interleaved: bool
    """True where rotary embedding turns neighbouring elements of a head, False where those of its two halves."""
    rope_interpolation: float
    """Divisor of positions."""
    no_rope_layer: int | None
    """Every n-th layer has no rotary embedding."""
    window: int | None
    """Tokens that one attends to, itself included; None: all before it."""
    has_bias: bool
    """True where qkv_proj has a bias."""
    is_tied: bool
    """True where the head is the embedding."""
    activation: str
    experts: ExpertsConfig | None

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.hidden_size // self.num_heads

    @property
    def num_features(self) -> int:
        """Values of one token that are alive at once in a layer, at most."""
        ffn = self.intermediate_size
        if self.experts:
            ffn = max(self.experts.num_experts, 2 * self.experts.intermediate_size,
                      self.experts.shared_intermediate_size or 0)
        return 4 * self.hidden_size + max(4 * (self.hidden_size + 2 * self.num_kv_heads * self.head_dim), 5 * ffn)

    @property
    def num_scores(self) -> int:
        """Attention scores of a pair of tokens that are alive at once, at most."""
        return 2 * self.num_heads

    @property
    def layer_cost(self) -> int:
        """Cost of a decoder layer in the balancing of stages (`get_block_compute_costs`)."""
        attention = 4 * self.num_heads * self.head_dim * self.hidden_size
        return attention + 3 * self.intermediate_size * self.hidden_size


def read_nanotron_config(root: Path, version: str, problems: Problems, max_nbytes: int) -> NanotronConfig:
    """Read model_config.json. `version` is that of the files. What makes no sense goes to `problems`; raises
    SourceError where there is no such file."""
    raw = read_json(root, CONFIG_NAME, max_nbytes)
    settings = Settings(raw, CONFIG_NAME, problems, _DEFAULTS)
    is_qwen2 = raw.get("is_qwen2_config") is True
    if is_qwen2 == (raw.get("is_llama_config") is True):
        settings.complain("it must hold one of is_llama_config and is_qwen2_config, which choose the model class")
    num_heads, num_layers = settings.size("num_attention_heads"), settings.num_layers()
    config = NanotronConfig(
        hidden_size=settings.size("hidden_size"), intermediate_size=settings.size("intermediate_size"),
        num_layers=num_layers, num_heads=num_heads, num_kv_heads=settings.size("num_key_value_heads", num_heads),
        vocab_size=settings.size("vocab_size"), max_num_tokens=settings.size("max_position_embeddings"),
        norm_eps=settings.number("rms_norm_eps"), is_tied=settings.flag("tie_word_embeddings", False),
        activation=settings.activation(), has_bias=is_qwen2 and settings.flag("attention_bias", False),
        experts=_experts(settings, num_layers) if is_qwen2 and raw.get("moe_config") is not None else None,
        **_rope(settings, version), **_of_qwen2(settings, is_qwen2))
    if config.hidden_size % (2 * num_heads) or num_heads % config.num_kv_heads:
        settings.complain(f"hidden_size {config.hidden_size}, num_attention_heads {num_heads} and num_key_value_heads "
                          f"{config.num_kv_heads} do not make heads")
    return config


def _rope(settings: Settings, version: str) -> dict[str, Any]:
    """Trees of format 1.2 turn neighbours around a base of 10,000, whatever a config says; those of 1.3 and 1.4 were
    written by trees with and without the setting, and the older ones turn neighbours."""
    if version == "1.2":
        return {"rope_theta": 10000.0, "rope_interleaved": True}
    return {"rope_theta": settings.number("rope_theta"),
            "rope_interleaved": settings.flag("rope_interleaved", version in ("1.3", "1.4"))}


def _of_qwen2(settings: Settings, is_qwen2: bool) -> dict[str, Any]:
    """Settings that Qwen2Config alone has."""
    def told(key: str) -> bool:
        return is_qwen2 and settings.raw.get(key) is not None

    factor, skipped, window = "rope_seq_len_interpolation_factor", "no_rope_layer", "sliding_window_size"
    return {"rope_interpolation": settings.number(factor) if told(factor) else 1.0,
            skipped: settings.size(skipped) if told(skipped) else None,
            "window": settings.size(window) if told(window) else None}


def _experts(settings: Settings, num_layers: int) -> ExpertsConfig:
    inner = settings.inner("moe_config")
    layers = inner.raw.get("layers", [-1])
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        inner.complain(f"moe_config: layers is {quoted(layers)}, not a list of layers")
        layers = [-1]
    num_experts, top_k = inner.size("num_experts"), inner.size("top_k")
    if top_k > num_experts:
        inner.complain(f"moe_config: top_k is {top_k} of {num_experts} experts")
    return ExpertsConfig(
        num_experts, top_k, inner.size("moe_intermediate_size"),
        inner.size("shared_expert_intermediate_size") if inner.flag("enable_shared_expert", False) else None,
        tuple(range(num_layers)) if layers == [-1] else tuple(layers))
