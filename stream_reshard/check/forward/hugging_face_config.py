"""Settings of the computation of a Hugging Face checkpoint: its config.json, as transformers 4 or 5 writes it.

Written from transformers' configuration classes and their defaults (LlamaConfig, MistralConfig, Qwen2Config,
Qwen2MoeConfig, SmolLM3Config) and from its modeling_rope_utils.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_reshard.check.forward.settings import Settings
from stream_reshard.errors import Problems, quoted
from stream_reshard.model.architectures import model_type_of
from stream_reshard.model.truncation import WHOLE
from stream_reshard.storage.small_files import read_json

CONFIG_NAME = "config.json"

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen2_moe": {"num_key_value_heads": 16, "sliding_window": 4096, "num_experts": 60,
                  "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2000000.0,
                "tie_word_embeddings": True}}
"""Defaults by family that differ from those of Llama's config class."""

_MAX_EXPERTS = 4096
"""Limit on the experts of a layer; no known model has more."""

_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Llama3Scaling:
    """Settings of the rope_type `llama3` beside its factor."""

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class RopeScaling:
    """Change of the frequencies of rotary embedding."""

    factor: float
    llama3: Llama3Scaling | None = None
    """None: all frequencies are divided by the factor (`linear`)."""

    def __str__(self) -> str:
        return f"linear, factor {self.factor:g}" if self.llama3 is None else f"factor {self.factor:g}, {self.llama3}"


@dataclass(frozen=True)
class HuggingFaceConfig:
    """Settings in a config.json, defaults included."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_num_tokens: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    layers_with_rope: tuple[bool, ...]
    windows: tuple[int | None, ...]
    """Per layer: number of tokens that a token attends to, itself included; None: all up to itself."""
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    is_tied: bool
    """True if the head shares the weights of the embedding."""
    activation: str
    layers_with_experts: tuple[bool, ...]
    num_experts: int
    """0 without experts; the three sizes below are 0 then too."""
    top_k: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    is_top_k_normalised: bool
    """True if the weights of the chosen experts are scaled to a sum of 1."""
    whole_num_layers: int | None = None
    """Number of layers of the whole model, if these are its first ones only and the config says so."""

    @property
    def num_features(self) -> int:
        """Largest number of values held at once for one token in a layer."""
        ffn = max(self.intermediate_size, self.num_experts, 2 * self.expert_intermediate_size,
                  self.shared_intermediate_size)
        return 4 * self.hidden_size + max(4 * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, 5 * ffn)

    @property
    def num_scores(self) -> int:
        """Largest number of attention scores held at once for a pair of tokens."""
        return 4 * max(1, self.num_heads // self.num_kv_heads)


def read_hugging_face_config(root: Path, problems: Problems, max_nbytes: int) -> HuggingFaceConfig:
    """Read config.json. Values that are invalid, or not computed here, go to `problems`. Raises SourceError for a
    missing file."""
    raw = read_json(root, CONFIG_NAME, max_nbytes, matters=())  # `verify` refuses doubtful values.
    family = _family(raw)
    settings = Settings(raw, CONFIG_NAME, problems, _DEFAULTS.get(family, {}))
    if family not in _DEFAULTS:
        settings.complain(f"a forward pass of {quoted(family)} is not computed here; {', '.join(_DEFAULTS)} are")
    num_heads, hidden_size = settings.size("num_attention_heads"), settings.size("hidden_size")
    num_layers = settings.num_layers()
    has_bias = family in ("llama", "smollm3") and settings.flag("attention_bias", False)
    config = HuggingFaceConfig(
        hidden_size, settings.size("intermediate_size"), num_layers, num_heads,
        settings.size("num_key_value_heads", num_heads), settings.size("head_dim", max(1, hidden_size // num_heads)),
        settings.size("vocab_size"), settings.size("max_position_embeddings", 2048),
        settings.number("rms_norm_eps", 1e-6), *_rope(settings),
        layers_with_rope=tuple(_layers_with_rope(settings, family, num_layers)),
        windows=tuple(_windows(settings, family, num_layers)),
        has_qkv_bias=has_bias or family == "qwen2" or (family == "qwen2_moe" and settings.flag("qkv_bias", True)),
        has_o_bias=has_bias, has_mlp_bias=family in ("llama", "smollm3") and settings.flag("mlp_bias", False),
        is_tied=settings.flag("tie_word_embeddings", False), activation=settings.activation(),
        whole_num_layers=settings.size(WHOLE) if raw.get(WHOLE) is not None else None,
        **_experts(settings, family, num_layers))
    if num_heads % config.num_kv_heads or config.head_dim % 2:
        settings.complain(f"num_attention_heads {num_heads}, num_key_value_heads {config.num_kv_heads} and head_dim "
                          f"{config.head_dim} do not make heads of pairs")
    return config


def _family(raw: Mapping[str, Any]) -> str:
    """The `model_type`, as in transformers; without one, that of the class in `architectures`."""
    model_type, names = raw.get("model_type"), raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    return str(model_type_of(str(name)) or name) if model_type is None else str(model_type)


def _rope(settings: Settings) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling): `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of transformers 4."""
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        if settings.raw.get(key) is not None:
            rope |= settings.inner(key).raw
    inner = Settings({"rope_theta": settings.raw.get("rope_theta")} | rope, settings.name, settings.problems,
                     settings.defaults)
    theta, kind = inner.number("rope_theta", 10000.0), rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1:
        inner.complain(f"rotary embedding of rope_type {quoted(kind)}, partial_rotary_factor "
                       f"{quoted(rope.get('partial_rotary_factor', 1))} is not computed here; "
                       f"{', '.join(_ROPE_TYPES)} of whole heads are")
    if kind == "linear":
        return theta, RopeScaling(inner.number("factor"))
    if kind == "llama3":
        return theta, RopeScaling(inner.number("factor"), Llama3Scaling(
            inner.number("low_freq_factor"), inner.number("high_freq_factor"),
            inner.size("original_max_position_embeddings")))
    return theta, None


def _layers_with_rope(settings: Settings, family: str, num_layers: int) -> list[bool]:
    if family != "smollm3":
        return [True] * num_layers
    flags = settings.raw.get("no_rope_layers")  # Despite its name, 1 is a layer with rotary embedding.
    if flags is None:
        interval = settings.size("no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(flags, list) or len(flags) != num_layers:
        settings.complain(f"no_rope_layers is {quoted(flags)}, not a list of {num_layers} entries")
        return [True] * num_layers
    return [bool(flag) for flag in flags]


def _windows(settings: Settings, family: str, num_layers: int) -> list[int | None]:
    """The window of each layer. Llama has none, Mistral always has one, the others only with `use_sliding_window`."""
    window = settings.raw.get("sliding_window", settings.defaults.get("sliding_window"))
    if family == "llama" or window is None or (family != "mistral" and not settings.flag("use_sliding_window", False)):
        return [None] * num_layers
    size, kinds = settings.size("sliding_window"), settings.raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return [size if kind == "sliding_attention" else None for kind in kinds]
    first = 0 if family == "mistral" else settings.raw.get("max_window_layers", 28)
    return [size if type(first) is int and layer >= first else None for layer in range(num_layers)]


def _experts(settings: Settings, family: str, num_layers: int) -> dict[str, Any]:
    """Settings of Qwen2MoeDecoderLayer: every n-th layer has experts, unless mlp_only_layers lists it."""
    if family != "qwen2_moe":
        return {"layers_with_experts": (False,) * num_layers, "num_experts": 0, "top_k": 0,
                "expert_intermediate_size": 0, "shared_intermediate_size": 0, "is_top_k_normalised": False}
    interval, plain = settings.size("decoder_sparse_step", 1), settings.raw.get("mlp_only_layers") or []
    if not isinstance(plain, list):
        settings.complain(f"mlp_only_layers is {quoted(plain)}, not a list")
        plain = []
    num_experts, top_k = settings.size("num_experts"), settings.size("num_experts_per_tok")
    if num_experts > _MAX_EXPERTS:
        settings.complain(f"num_experts is {num_experts}, at most {_MAX_EXPERTS} are computed here")
        num_experts = 1
    elif top_k > num_experts:
        settings.complain(f"num_experts_per_tok is {top_k} of {num_experts} experts")
    has_experts = (layer not in plain and (layer + 1) % interval == 0 for layer in range(num_layers))
    return {"layers_with_experts": tuple(has_experts), "num_experts": num_experts, "top_k": top_k,
            "expert_intermediate_size": settings.size("moe_intermediate_size"),
            "shared_intermediate_size": settings.size("shared_expert_intermediate_size"),
            "is_top_k_normalised": settings.flag("norm_topk_prob", False)}
