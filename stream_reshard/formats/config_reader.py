"""Values of a config of either format, and problems with them."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.model.architectures import Family
from stream_reshard.model.parameters import TOKEN_IDS, Experts, ModelConfig, TokenId, parse_token_id
from stream_reshard.model.truncation import WHOLE, recorded

MAX_LAYERS = 10**5
"""Limit on the number of layers; no model has so many."""

MAX_EXPERTS = 4096
"""Limit on the experts of a layer; no model has so many."""

MAX_NUMBER = 1 << 48
"""Numbers in a config must be smaller, as sizes in a header must; this also refuses infinity."""


class ConfigReader:
    """Reads values of a config, and collects problems with them."""

    def __init__(self, raw: Mapping[str, Any], name: str, defaults: Mapping[str, Any] = {}, is_nanotron: bool = False):
        """`name`: of the file, for messages. `defaults`: values of absent keys. `is_nanotron`: the keys are Nanotron's,
        some of which differ from those of transformers."""
        self.raw, self.name, self.defaults, self.is_nanotron = raw, name, defaults, is_nanotron
        self.problems = Problems()
        self.rope = self._rope()

    def complain(self, text: str) -> None:
        """Collect a problem."""
        self.problems.append(SourceError(f"{self.name}: {text}"))

    def number(self, key: str, kind: type[int] | type[float], default: Any = None) -> Any:
        """A positive int or float; `default` where the key is absent or null."""
        value = self.raw.get(key, self.defaults.get(key))
        if value is None:
            if default is None:
                self.complain(f"{key} is missing")
            return 1 if default is None else default
        return self.positive(key, value, kind)

    def positive(self, key: str, value: Any, kind: type[int] | type[float]) -> Any:
        """`value` as a number of this kind; 1 after a problem."""
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < MAX_NUMBER:
            self.complain(f"{key} is {quoted(value)}, not a positive {kind.__name__}")
            return 1
        return kind(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` where the key is absent."""
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.complain(f"{key} is {quoted(value)}, not true or false")
        return bool(value)

    def token_id(self, key: str) -> TokenId:
        """The ids of a special token; the default where the key is absent."""
        try:
            return parse_token_id(self.raw.get(key, self.defaults.get(key)))
        except ValueError as error:
            self.complain(f"{key}: {error}")
            return None

    def _rope(self) -> Mapping[str, Any]:
        """`rope_parameters` of transformers 5 and `rope_scaling` of transformers 4 in one; a key of rope_scaling
        overrides one of rope_parameters, as in transformers 5."""
        rope: dict[str, Any] = {}
        for key in ("rope_parameters", "rope_scaling"):
            part = self.raw.get(key) or {}
            if not isinstance(part, dict):
                self.complain(f"{key} is {quoted(part)}, not an object")
                continue
            rope |= {"rope_type": part["type"]} | part if "type" in part else part
        return rope

    def rope_theta(self) -> float:
        """`rope_theta` of transformers 4 or `rope_parameters.rope_theta` of transformers 5."""
        inner, outer = self.rope.get("rope_theta"), self.raw.get("rope_theta")
        if inner is not None and outer is not None and inner != outer:
            self.complain(f"rope_theta is {quoted(outer)}, but {quoted(inner)} in rope_parameters")
        value = outer if inner is None else inner
        if value is None:
            return float(self.defaults.get("rope_theta", 10000.0))
        return float(self.positive("rope_theta", value, float))

    def model_config(self, family: Family) -> ModelConfig:
        """The settings of a model of this family. Problems are collected in `problems`."""
        heads = self.number("num_attention_heads", int)
        config = ModelConfig(
            family=family.name,
            hidden_size=self.number("hidden_size", int),
            intermediate_size=self.number("intermediate_size", int),
            num_hidden_layers=self._num_layers(),
            num_attention_heads=heads,
            num_key_value_heads=self.number("num_key_value_heads", int, heads),
            vocab_size=self.number("vocab_size", int),
            tie_word_embeddings=self.flag("tie_word_embeddings", family.tie_by_default),
            max_position_embeddings=self.number("max_position_embeddings", int, 2048),
            rms_norm_eps=self.number("rms_norm_eps", float, 1e-6),
            rope_theta=self.rope_theta(),
            initializer_range=self._initializer_range(),
            hidden_act=str(self.raw.get("hidden_act", "silu")),
            bos_token_id=self.token_id("bos_token_id"),
            eos_token_id=self.token_id("eos_token_id"),
            pad_token_id=self.token_id("pad_token_id"),
            unsaid_ids=frozenset(TOKEN_IDS) - self.raw.keys(),
            no_rope_layer=self._no_rope_layer(family), experts=self._experts(family))
        config = recorded(config, {WHOLE: self.number(WHOLE, int)} if self.raw.get(WHOLE) is not None else {})
        if not self.problems:
            self._check_heads(config)
            self._check_rope_layers(config)
        return config

    def _num_layers(self) -> int:
        number = int(self.number("num_hidden_layers", int))
        if number > MAX_LAYERS:
            self.complain(f"num_hidden_layers is {number}, more than {MAX_LAYERS}")
        return min(number, MAX_LAYERS)

    def _initializer_range(self) -> float:
        """The width of random weights. A checkpoint has none, so this float, unlike others, may be 0."""
        value = self.raw.get("initializer_range")
        is_zero = value == 0 and not isinstance(value, bool)
        return 0.0 if is_zero else self.number("initializer_range", float, 0.02)

    def _no_rope_layer(self, family: Family) -> int | None:
        """Interval of the layers without rotary embedding. transformers gives the interval, or a list with an entry per
        layer: 0 for a layer without rotary embedding (SmolLM3Config)."""
        if self.is_nanotron:
            return None if self.raw.get("no_rope_layer") is None else self.number("no_rope_layer", int)
        if family.name != "smollm3":
            return None
        kinds = self.raw.get("no_rope_layers")
        if kinds is None:
            return int(self.number("no_rope_layer_interval", int, 4))
        if not isinstance(kinds, list) or len(kinds) > MAX_LAYERS or not all(kind in (0, 1) for kind in kinds):
            self.complain(f"no_rope_layers is {quoted(kinds)}, not a list of 0 and 1")
            return None
        interval = kinds.index(0) + 1 if 0 in kinds else None
        if interval and kinds != [int((layer + 1) % interval != 0) for layer in range(len(kinds))]:
            self.complain("no_rope_layers is not every n-th layer; Nanotron only has an interval")
        return interval

    def _experts(self, family: Family) -> Experts | None:
        """The mixture of experts, by `moe_config` of Nanotron (MoEConfig, nanotron/config/models_config.py) or the keys
        of transformers (Qwen2MoeConfig)."""
        if not any(row.is_stacked for row in family.rows):
            return None
        raw = self.raw.get("moe_config") if self.is_nanotron else self.raw
        if not isinstance(raw, Mapping):
            self.complain(f"moe_config is {quoted(raw)}, not an object")
            return None
        reader = ConfigReader(raw, self.name, self.defaults)
        experts = Experts(reader.number("num_experts", int),
                          reader.number("top_k" if self.is_nanotron else "num_experts_per_tok", int),
                          reader.number("moe_intermediate_size", int),
                          reader.number("shared_expert_intermediate_size", int),
                          0.0 if raw.get("router_aux_loss_coef") == 0 else
                          reader.number("router_aux_loss_coef", float, 0.01))
        self.problems.extend(reader.problems)
        if experts.num_experts > MAX_EXPERTS:
            self.complain(f"num_experts is {experts.num_experts}, more than {MAX_EXPERTS}")
        elif experts.num_experts_per_tok > experts.num_experts:
            self.complain(f"{experts.num_experts_per_tok} of {experts.num_experts} experts are chosen")
        return experts

    def _check_rope_layers(self, config: ModelConfig) -> None:
        if config.no_rope_layer and config.num_hidden_layers % config.no_rope_layer:
            self.complain(f"num_hidden_layers {config.num_hidden_layers} is not a multiple of {config.no_rope_layer}: "
                          f"Nanotron requires it, as every {config.no_rope_layer}th layer has no rotary embedding")

    def _check_heads(self, config: ModelConfig) -> None:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if config.hidden_size % heads:
            self.complain(f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}")
        elif config.head_dim % 2:
            self.complain(f"a head of {config.head_dim} elements is odd; rotary embedding turns pairs")
        if heads % kv_heads:
            self.complain(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
