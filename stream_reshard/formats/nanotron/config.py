"""Settings of the model in `model_config.json` of a Nanotron checkpoint, under the names that all formats share."""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stream_reshard.errors import SourceError, quoted
from stream_reshard.formats.config_reader import ConfigReader
from stream_reshard.formats.nanotron.rules import MARKERS
from stream_reshard.formats.unsupported import Unsupported
from stream_reshard.model.architectures import FAMILIES, Family
from stream_reshard.model.parameters import TOKEN_IDS, ModelConfig, first_id, parse_token_id
from stream_reshard.storage.small_files import MAX_JSON_NBYTES, read_json

MODEL_CONFIG_NAME = "model_config.json"
METADATA_NAME = "checkpoint_metadata.json"

_FAMILY_OF = {("LlamaConfig", False, False, False): "LlamaForCausalLM",
              ("Qwen2Config", False, False, False): "LlamaForCausalLM",
              ("Qwen2Config", True, False, False): "Qwen2ForCausalLM",
              ("Qwen2Config", False, True, False): "SmolLM3ForCausalLM",
              ("Qwen2Config", True, False, True): "Qwen2MoeForCausalLM"}
"""The family by (Nanotron's config class, has attention biases, has layers without rotary embedding, has experts)."""

DEFAULT_IDS = {"bos_token_id": 1, "eos_token_id": 2}
"""Default token ids of both config classes (nanotron/config/models_config.py)."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "rope_scaling": (None,), "rope_seq_len_interpolation_factor": (None, 1, 1.0), "sliding_window_size": (None,),
    "moe_config": (None,), "_use_qkv_packed": (True,), "flex_attention_mask": (None,),
    "_attn_implementation": ("flash_attention_2", "sdpa", "ring_flash_triton", "ring", "llama3_ring_attention")}
"""Settings that change the forward pass, with the values that do not change it; the first value is Nanotron's default.
Of the attention functions only flex_attention can see later tokens, or be limited to a document
(nanotron/nn/attention.py); an unknown function ends the training."""


def ids_written(config: ModelConfig) -> dict[str, int | None]:
    """The token ids in Nanotron's configs: one per purpose, because the fields are plain ints, and none for padding.

    Nanotron uses `pad_token_id` as `padding_idx` of the embedding of every tensor-parallel rank
    (nanotron/models/llama.py, qwen.py): this row of every rank would never train, and a rank with fewer rows would not
    start.
    """
    ids = {key: first_id(getattr(config, key)) for key in DEFAULT_IDS}
    return {key: DEFAULT_IDS[key] if id is None else id for key, id in ids.items()} | {"pad_token_id": None}


def with_known_ids(config: ModelConfig, family: Family, recorded: Mapping[str, Any] | None) -> ModelConfig | None:
    """The config of a checkpoint with all token ids of its model, as `recorded` in the manifest; model_config.json has
    only the first per purpose. None without a record, or where model_config.json was changed to other ids."""
    if recorded is None:
        return None
    bos, eos, pad = (parse_token_id(recorded.get(key, family.defaults.get(key))) for key in TOKEN_IDS)
    known = replace(config, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad,
                    unsaid_ids=frozenset(TOKEN_IDS) - recorded.keys())
    return known if ids_written(known) == ids_written(config) else None


@dataclass(frozen=True)
class NanotronModelConfig:
    """The settings in a model_config.json."""

    config_class: str
    """Name of Nanotron's config class."""
    family: Family
    model: ModelConfig
    """`vocab_size` includes padding: Nanotron keeps no other size."""
    rope_interleaved: bool | None
    """True where heads are stored as (pair, half); None where the config does not give the order."""
    extras: Mapping[str, Unsupported]
    """Settings outside of `model` that change the forward pass, by name."""
    says_rope_theta: bool = True
    """The config gives rope_theta. The config of release 0.4 has no such field."""
    is_whole: bool = False
    """The config has every field, as when Nanotron itself saved it."""


def interleaves_by_default(config: NanotronModelConfig, versions: Collection[str | None]) -> bool:
    """True where a config without a rotary order means the interleaved one. `versions`: format versions of the weight
    files. Source trees before September 2024 have no field for the order and always interleave; release 0.4 does so
    even where the field is given. Later trees do not interleave by default."""
    return "1.2" in versions or (config.rope_interleaved is None and bool({"1.3", "1.4"} & set(versions)))


def read_model_config(root: Path, max_nbytes: int = MAX_JSON_NBYTES) -> NanotronModelConfig:
    """Read model_config.json, of at most `max_nbytes`. Raises SourceError, or Refused with all its problems."""
    return parse_model_config(read_json(root, MODEL_CONFIG_NAME, max_nbytes), MODEL_CONFIG_NAME)


def parse_model_config(raw: Mapping[str, Any], name: str) -> NanotronModelConfig:
    """The settings of a model config with the keys `raw`. `name`: of the file, for messages. Raises SourceError, or
    Refused with all problems."""
    reader = ConfigReader(raw, name, DEFAULT_IDS, is_nanotron=True)
    config_class, family = _family(raw, name)
    config = reader.model_config(family)
    if config.pad_token_id is None:  # Any other value would break the training, so null is not the model's choice.
        config = replace(config, unsaid_ids=config.unsaid_ids | {"pad_token_id"})
    interleaved = reader.flag("rope_interleaved", False) if "rope_interleaved" in raw else None
    reader.problems.raise_if_any()
    extras = {setting.name: setting for setting in _extras(raw, config)}
    return NanotronModelConfig(config_class, family, config, interleaved, extras, "rope_theta" in raw,
                               "_attn_implementation" in raw)


def _family(raw: Mapping[str, Any], name: str) -> tuple[str, Family]:
    """(config class, family)."""
    markers = [key for key in raw if key.startswith("is_") and key.endswith("_config")]
    has_bias, skips_rope = bool(raw.get("attention_bias", False)), raw.get("no_rope_layer") is not None
    classes = {marker: config_class for config_class, marker in MARKERS.items()}
    config_class = classes.get(markers[0], "") if len(markers) == 1 and raw[markers[0]] is True else ""
    kind = config_class, has_bias, skips_rope
    # In a family without experts, moe_config is reported as an unsupported setting.
    family = _FAMILY_OF.get((*kind, raw.get("moe_config") is not None)) or _FAMILY_OF.get((*kind, False))
    if family is None:
        raise SourceError(f"{name}: a config with {quoted(markers)}, attention_bias {has_bias} and "
                          f"no_rope_layer {quoted(raw.get('no_rope_layer'))} is not of a kind known here (LlamaConfig, "
                          f"Qwen2Config)")
    return config_class, FAMILIES[family]


def _extras(raw: Mapping[str, Any], config: ModelConfig) -> Iterator[Unsupported]:
    neutrals = dict(NEUTRAL)
    if config.experts is not None:
        neutrals.pop("moe_config")
        moe, every_layer = raw["moe_config"], list(range(config.num_hidden_layers))
        # [-1] is every layer; Nanotron itself saves a list of all (Qwen2Config.__post_init__, models_config.py).
        if moe.get("layers", [-1]) not in ([-1], every_layer) or moe.get("enable_shared_expert") is not True:
            yield Unsupported("moe_config", f"moe_config has layers {quoted(moe.get('layers'))}, enable_shared_expert "
                                            f"{quoted(moe.get('enable_shared_expert'))}; only models with experts and "
                                            f"a shared expert in every layer can be converted", moe)
    for key, neutral in neutrals.items():
        value = raw.get(key, neutral[0])
        if value not in neutral:
            yield Unsupported(key, f"{key} is {quoted(value)}", value)
