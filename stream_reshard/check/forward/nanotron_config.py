"""Settings of the computation of a Nanotron checkpoint: its model_config.json and the format version of its files.

Written from Nanotron's LlamaConfig, Qwen2Config and MoEConfig (nanotron/config/models_config.py), with their defaults,
and from the modules that read them.
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
    """A mixture of experts in place of an MLP."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int | None
    """None without a shared expert."""
    layers: tuple[int, ...]
    """Indices of the layers with experts."""


@dataclass(frozen=True)
class NanotronConfig:
    """Settings in a model_config.json, defaults included."""

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
    """True if rotary embedding turns neighbouring elements of a head, False for elements of its two halves."""
    rope_interpolation: float
    """Divisor of the positions of tokens."""
    no_rope_layer: int | None
    """Every n-th layer has no rotary embedding."""
    window: int | None
    """Number of tokens that a token attends to, itself included; None: all up to itself."""
    has_bias: bool
    """True if qkv_proj has a bias."""
    is_tied: bool
    """True if the head shares the weights of the embedding."""
    activation: str
    experts: ExpertsConfig | None

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.hidden_size // self.num_heads

    @property
    def num_features(self) -> int:
        """Largest number of values held at once for one token in a layer."""
        ffn = self.intermediate_size
        if self.experts:
            ffn = max(self.experts.num_experts, 2 * self.experts.intermediate_size,
                      self.experts.shared_intermediate_size or 0)
        return 4 * self.hidden_size + max(4 * (self.hidden_size + 2 * self.num_kv_heads * self.head_dim), 5 * ffn)

    @property
    def num_scores(self) -> int:
        """Largest number of attention scores held at once for a pair of tokens."""
        return 2 * self.num_heads

    @property
    def layer_cost(self) -> int:
        """Cost of a decoder layer in the balancing of stages (`get_block_compute_costs`)."""
        attention = 4 * self.num_heads * self.head_dim * self.hidden_size
        return attention + 3 * self.intermediate_size * self.hidden_size


def read_nanotron_config(root: Path, version: str, problems: Problems, max_nbytes: int) -> NanotronConfig:
    """Read model_config.json; `version`: format version of the weight files. Invalid values go to `problems`. Raises
    SourceError for a missing file."""
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
    """Nanotron of format 1.2 interleaves and has the base 10,000, whatever the config holds. Formats 1.3 and 1.4 were
    written both before and after rope_interleaved became a setting; Nanotron before it interleaves."""
    if version == "1.2":
        return {"rope_theta": 10000.0, "rope_interleaved": True}
    return {"rope_theta": settings.number("rope_theta"),
            "rope_interleaved": settings.flag("rope_interleaved", version in ("1.3", "1.4"))}


def _of_qwen2(settings: Settings, is_qwen2: bool) -> dict[str, Any]:
    """Settings that only Qwen2Config has."""
    def size(key: str) -> int | None:
        return settings.size(key) if is_qwen2 and settings.raw.get(key) is not None else None

    return {"rope_interpolation": settings.number("rope_seq_len_interpolation_factor", 1.0) if is_qwen2 else 1.0,
            "no_rope_layer": size("no_rope_layer"), "window": size("sliding_window_size")}


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
