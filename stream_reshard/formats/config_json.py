"""Settings of the model in a Hugging Face config.json, whether transformers 4 or 5 wrote it."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_reshard.errors import Cause, SourceError, quoted
from stream_reshard.formats.config_reader import ConfigReader
from stream_reshard.model.architectures import BY_MODEL_TYPE, FAMILIES, UNSUPPORTED, Family, model_type_of
from stream_reshard.model.parameters import ModelConfig
from stream_reshard.storage.small_files import MAX_JSON_NBYTES, read_json_with_notes
from stream_reshard.storage.stand_ins import answer

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"

UNDERSTOOD = frozenset("""
    architectures model_type transformers_version torch_dtype dtype hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim vocab_size tie_word_embeddings max_position_embeddings rms_norm_eps
    rope_theta rope_scaling rope_parameters partial_rotary_factor initializer_range hidden_act bos_token_id eos_token_id
    pad_token_id attention_bias mlp_bias sliding_window use_sliding_window max_window_layers layer_types
    attention_dropout quantization_config compression_config quantization num_local_experts num_experts qk_norm
    use_qk_norm qk_layernorm no_rope_layers no_rope_layer_interval num_experts_per_tok moe_intermediate_size
    shared_expert_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers router_aux_loss_coef
    output_router_logits qkv_bias whole_num_hidden_layers""".split())
"""Keys that are read here, for some family."""


_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json for quantised weights: of transformers, of old compressed-tensors, of MLX."""


@dataclass(frozen=True)
class SourceConfig:
    """A config.json, and the settings in it."""

    raw: Mapping[str, Any]
    """The keys of the file."""
    family: Family
    model: ModelConfig
    rope: Mapping[str, Any]
    """`rope_parameters` of transformers 5 and `rope_scaling` of transformers 4 in one; empty where both are absent."""
    notes: tuple[str, ...]
    """Remarks for the user on doubtful settings."""
    name: str = CONFIG_NAME
    """Name of the file, for messages."""


def read_config(root: Path, max_nbytes: int = MAX_JSON_NBYTES) -> SourceConfig:
    """Read config.json, of at most `max_nbytes`. Raises SourceError, or Refused with all its problems."""
    raw, doubts = read_json_with_notes(root, CONFIG_NAME, max_nbytes, UNDERSTOOD)
    if message := answer(raw, "hidden_size"):
        raise Cause(f"{quoted(CONFIG_NAME)} in {quoted(root)} {message}")
    return parse_config(raw, CONFIG_NAME, doubts)


def parse_config(raw: Mapping[str, Any], name: str, notes: Iterable[str] = ()) -> SourceConfig:
    """The settings in the keys of a config.json. `name`: of the file, for messages. Raises SourceError, or Refused with
    all problems."""
    family, remarks = family_of(raw)
    reader = ConfigReader(raw, name, family.defaults)
    config = reader.model_config(family)
    reader.problems.raise_if_any()
    return SourceConfig(raw, family, config, reader.rope, (*remarks, *notes), name)


def class_name_of(raw: Mapping[str, Any]) -> str | None:
    """The first class in `architectures`; None without one. A string in place of the list is taken for its one name."""
    names = raw.get("architectures")
    first = names[0] if isinstance(names, list) and names else names
    return first if isinstance(first, str) else None


def family_of(raw: Mapping[str, Any]) -> tuple[Family, list[str]]:
    """The family of a model, and remarks on the choice. Raises SourceError for a family that cannot be converted.

    As in transformers (AutoConfig.from_pretrained, models/auto/configuration_auto.py), `model_type` decides; without
    one, the class in `architectures` does.
    """
    name, model_type = class_name_of(raw), raw.get("model_type")
    if model_type is None and name is None:
        raise SourceError(f"config.json names no model_type and no class in architectures; known are {_known()}")
    chosen = model_type_of(name or "") if model_type is None else model_type
    family = BY_MODEL_TYPE.get(chosen) if isinstance(chosen, str) else None
    if family is None:
        subject = f"{quoted(name)}" if model_type is None else f"model_type {quoted(model_type)}"
        reason = UNSUPPORTED.get(str(chosen), f"known are {_known()}")
        if isinstance(raw.get("text_config"), dict):
            reason = "it is more than a language model; save that part (text_config) alone, with its own config.json"
        raise SourceError(f"config.json: {subject} cannot be converted: {reason}")
    if model_type is None or name is None or model_type_of(name) == model_type:
        return family, []
    return family, [f"config.json: model_type is {quoted(model_type)}, architectures names {quoted(name)}; model_type "
                    f"decides, as in transformers"]


def quantization_of(raw: Mapping[str, Any]) -> str | None:
    """The quantisation method that a config.json gives; None where it gives none."""
    for key in _QUANTIZATION_KEYS:
        if value := raw.get(key):
            settings = value if isinstance(value, dict) else {}
            bits = f"{settings['bits']} bits" if "bits" in settings else key
            return str(settings.get("quant_method") or settings.get("format") or bits)
    return None


def _known() -> str:
    return ", ".join(f"{family.model_type} ({name})" for name, family in FAMILIES.items())
