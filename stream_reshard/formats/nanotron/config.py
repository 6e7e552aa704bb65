"""Settings of the model in the `model_config.json` of a Nanotron checkpoint, in the spelling all formats share."""
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
"""By Nanotron's config class, whether it has attention biases, layers without rotary embedding, and experts."""

DEFAULT_IDS = {"bos_token_id": 1, "eos_token_id": 2}
"""Token ids of a config that says none, in both classes (nanotron/config/models_config.py)."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "rope_scaling": (None,), "rope_seq_len_interpolation_factor": (None, 1, 1.0), "sliding_window_size": (None,),
    "moe_config": (None,), "_use_qkv_packed": (True,), "flex_attention_mask": (None,),
    "_attn_implementation": ("flash_attention_2", "sdpa", "ring_flash_triton", "ring", "llama3_ring_attention")}
"""Settings that change what the weights mean, and the values at which they do not (the first is Nanotron's own). Of the
attention functions flex_attention alone sees what comes later, or nothing beyond a document (nanotron/nn/attention.py);
one that is unknown ends the training."""


def ids_written(config: ModelConfig) -> dict[str, int | None]:
    """The token ids of Nanotron's configs: one of each, for their fields are plain ints, and never one for padding.

    `pad_token_id` becomes `padding_idx` of the embedding of every tensor-parallel rank (nanotron/models/llama.py,
    qwen.py): the row of that number would never train on any rank, and a rank with fewer rows would not start.
    """
    ids = {key: first_id(getattr(config, key)) for key in DEFAULT_IDS}
    return {key: DEFAULT_IDS[key] if id is None else id for key, id in ids.items()} | {"pad_token_id": None}


def with_known_ids(config: ModelConfig, family: Family, said: Mapping[str, Any] | None) -> ModelConfig | None:
    """The config of a checkpoint with the token ids that were `said` of its model (in JSON), of which its own file
    holds but the first; None where nothing was said, or its own file says others now."""
    if said is None:
        return None
    bos, eos, pad = (parse_token_id(said.get(key, family.defaults.get(key))) for key in TOKEN_IDS)
    known = replace(config, bos_token_id=bos, eos_token_id=eos, pad_token_id=pad,
                    unsaid_ids=frozenset(TOKEN_IDS) - said.keys())
    return known if ids_written(known) == ids_written(config) else None


@dataclass(frozen=True)
class NanotronModelConfig:
    """A model_config.json: what it means."""

    config_class: str
    """Nanotron's name of it."""
    family: Family
    model: ModelConfig
    """`vocab_size` is the padded one here: Nanotron keeps no other."""
    rope_interleaved: bool | None
    """True where a head is kept as (pair, half); None where it is not said."""
    extras: Mapping[str, Unsupported]
    """Settings beyond the common ones that change the forward pass, by name."""
    says_rope_theta: bool = True
    """The config gives the base of the rotary embedding. The config of release 0.4 has no such field."""
    is_whole: bool = False
    """Every field is there, as where Nanotron itself saves the config."""


def interleaves_by_default(config: NanotronModelConfig, versions: Collection[str | None]) -> bool:
    """True where a config that gives no rotary order means the interleaved one. Trees before September 2024 have no
    such field and interleave always (release 0.4 even where it is given), later ones do not. `versions`: of the format,
    as the weight files say them."""
    return "1.2" in versions or (config.rope_interleaved is None and bool({"1.3", "1.4"} & set(versions)))


def read_model_config(root: Path, max_nbytes: int = MAX_JSON_NBYTES) -> NanotronModelConfig:
    """Read model_config.json, of at most `max_nbytes`. Raises SourceError or Refused with everything in it that makes
    no sense."""
    return parse_model_config(read_json(root, MODEL_CONFIG_NAME, max_nbytes), MODEL_CONFIG_NAME)


def parse_model_config(raw: Mapping[str, Any], name: str) -> NanotronModelConfig:
    """The meaning of a model config of Nanotron's, which stands in the file of this name. Raises as the above."""
    reader = ConfigReader(raw, name, DEFAULT_IDS, is_nanotron=True)
    config_class, family = _family(raw, name)
    config = reader.model_config(family)
    if config.pad_token_id is None:  # It says nothing of the model: any other value would break the training.
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
    # Experts in a family that has none are told as a setting that cannot be converted.
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
        said, every = raw["moe_config"], list(range(config.num_hidden_layers))
        # Nanotron itself saves the layers one by one (Qwen2Config.__post_init__, nanotron/config/models_config.py).
        if said.get("layers", [-1]) not in ([-1], every) or said.get("enable_shared_expert") is not True:
            yield Unsupported("moe_config", f"moe_config has layers {quoted(said.get('layers'))}, enable_shared_expert "
                                            f"{quoted(said.get('enable_shared_expert'))}; only models whose layers all "
                                            f"have experts and a shared one are converted", said)
    for key, neutral in neutrals.items():
        value = raw.get(key, neutral[0])
        if value not in neutral:
            yield Unsupported(key, f"{key} is {quoted(value)}", value)
