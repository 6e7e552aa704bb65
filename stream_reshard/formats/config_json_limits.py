"""Settings of a Hugging Face config that Nanotron cannot express, or would silently load wrong."""
from __future__ import annotations

from collections.abc import Iterator

from stream_reshard.errors import quoted
from stream_reshard.formats.config_json import UNDERSTOOD, SourceConfig, quantization_of
from stream_reshard.formats.unsupported import Unsupported

QUANTIZATION = "quantization"
"""Name of the setting that weights are quantised."""

_MAX_LISTED = 30
"""Unknown keys that are named in a note."""

_MISTRAL_WINDOW = 4096
"""MistralConfig's default of sliding_window; null is full attention."""

_WINDOW_KEYS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")

_WITHOUT_EFFECT = frozenset("""
    use_cache pretraining_tp _name_or_path name_or_path is_decoder return_dict output_attentions output_hidden_states
    auto_map unsloth_version unsloth_fixed rope_interleaved transformers.js_config _attn_implementation
    gradient_checkpointing is_llama_config bias task_specific_params id2label label2id""".split())
"""Keys that concern neither the weights nor the forward pass."""


def unsupported_settings(config: SourceConfig) -> Iterator[Unsupported]:
    """The settings of a config that Nanotron cannot express."""
    yield from _rope_limits(config)
    yield from _attention_limits(config)
    raw, hidden_act = config.raw, config.model.hidden_act
    if raw.get("mlp_bias"):
        yield Unsupported("mlp_bias", "mlp_bias is true; Nanotron's MLP has no biases", True)
    if hidden_act not in ("silu", "swish"):
        yield Unsupported("hidden_act", f"hidden_act is {quoted(hidden_act)}; Nanotron's Llama is known to agree with "
                                        f"silu only", hidden_act)
    if config.model.experts is not None:
        yield from _expert_limits(config)
        return
    for key in ("num_local_experts", "num_experts"):
        if raw.get(key):
            yield Unsupported("experts", f"{key} is {quoted(raw[key])}; a mixture of experts cannot be converted",
                              raw[key])


def quantization_settings(config: SourceConfig) -> Iterator[Unsupported]:
    """The setting that weights are quantised. Unquantised weights can be converted in spite of it, but transformers
    would quantise them when loading."""
    if method := quantization_of(config.raw):
        yield Unsupported(QUANTIZATION, f"config.json states that the weights are quantised ({quoted(method)})", method)


def _expert_limits(config: SourceConfig) -> Iterator[Unsupported]:
    raw = config.raw
    if raw.get("norm_topk_prob"):
        yield Unsupported("norm_topk_prob", "norm_topk_prob is true; Nanotron does not normalise the weights of the "
                                            "chosen experts", True)
    if raw.get("decoder_sparse_step", 1) != 1 or raw.get("mlp_only_layers"):
        yield Unsupported("mlp_only_layers", f"decoder_sparse_step is {quoted(raw.get('decoder_sparse_step', 1))}, "
                                             f"mlp_only_layers {quoted(raw.get('mlp_only_layers', []))}; layers "
                                             f"without experts are not converted", raw.get("mlp_only_layers"))
    if raw.get("qkv_bias", True) is not True:
        yield Unsupported("qkv_bias", "qkv_bias is false; the family has biases on q, k and v", False)


def _rope_limits(config: SourceConfig) -> Iterator[Unsupported]:
    rope, raw = config.rope, config.raw
    kind = rope.get("rope_type", "default")
    if kind != "default" or any(isinstance(value, dict) for value in rope.values()):
        yield Unsupported("rope_scaling", f"rope_type is {quoted(kind)}; Nanotron stores rope_scaling and ignores it, "
                                          f"so q and k would be turned with unscaled frequencies",
                          {key: value for key, value in rope.items() if key not in ("type", "rope_theta")})
    factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if factor not in (None, 1, 1.0):
        yield Unsupported("partial_rotary_factor", f"partial_rotary_factor is {quoted(factor)}; Nanotron turns whole "
                          "heads", factor)


def _attention_limits(config: SourceConfig) -> Iterator[Unsupported]:
    raw, model = config.raw, config.model
    head_dim = raw.get("head_dim")
    if head_dim not in (None, model.head_dim):
        yield Unsupported("head_dim", f"head_dim is {quoted(head_dim)}; Nanotron only knows hidden_size / "
                                      f"num_attention_heads = {model.head_dim}", head_dim)
    if raw.get("attention_bias") and not config.family.has_attention_bias:
        yield Unsupported("attention_bias", "attention_bias is true; that adds a bias to o_proj, which Nanotron does "
                                            "not have (and LlamaConfig has no biases at all)", True)
    for key in ("qk_norm", "use_qk_norm", "qk_layernorm"):
        if raw.get(key):
            yield Unsupported("qk_norm", f"{key} is {quoted(raw[key])}; Nanotron has no norms on q and k", raw[key])
    if _has_sliding_window(config):
        settings = ", ".join(f"{key} is {quoted(raw[key])}" for key in _WINDOW_KEYS if key in raw)
        settings = settings or f"sliding_window is absent, which means {_MISTRAL_WINDOW}"
        yield Unsupported("sliding_window", f"{settings}; Nanotron would attend to everything",
                          {key: raw.get(key) for key in _WINDOW_KEYS})


def _has_sliding_window(config: SourceConfig) -> bool:
    """True where a layer attends to a window only, by the rules of transformers' configs. The first layers of a model
    are judged as the whole model is."""
    raw, num_layers = config.raw, config.model.whole_num_hidden_layers or config.model.num_hidden_layers
    if kinds := raw.get("layer_types"):
        return not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    if "use_sliding_window" in raw:
        first = raw.get("max_window_layers")
        return bool(raw["use_sliding_window"]) and (type(first) is not int or first < num_layers)
    default = _MISTRAL_WINDOW if config.family.name == "mistral" else None
    return config.family.name not in ("qwen2", "qwen2_moe") and raw.get("sliding_window", default) is not None


def dropped(config: SourceConfig) -> list[str]:
    """Remarks on settings that a conversion drops: of no effect in Nanotron, or unknown."""
    notes = []
    if config.raw.get("attention_dropout"):
        notes.append(f"attention_dropout {quoted(config.raw['attention_dropout'])}: Nanotron trains without it")
    if unknown := sorted(set(config.raw) - UNDERSTOOD - _WITHOUT_EFFECT):
        more = f" and {len(unknown) - _MAX_LISTED} more" if len(unknown) > _MAX_LISTED else ""
        listed = ", ".join(map(quoted, unknown[:_MAX_LISTED]))
        notes.append(f"config.json keys not understood, ignored: {listed}{more}")
    return notes + list(config.notes)
