"""A Hugging Face folder to be written: shards, their index, and a config.json that transformers loads."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from stream_reshard.errors import Problems, UsageError
from stream_reshard.formats.base import Described, NextStep, Source, Target, with_router_dtype
from stream_reshard.formats.config_json import CONFIG_NAME, INDEX_NAME
from stream_reshard.formats.hugging_face.card import CARD_NAME, model_card
from stream_reshard.formats.hugging_face.planned import DEFAULT_MAX_SHARD_NBYTES, HuggingFaceTarget
from stream_reshard.formats.unsupported import Unsupported
from stream_reshard.machine.memory import human
from stream_reshard.model.parameters import Model
from stream_reshard.model.truncation import WHOLE
from stream_reshard.options import Options, nanotron_flags

_INDEX_NBYTES_PER_TENSOR = 600
"""Bytes of memory per tensor while an index is made: its names, an entry, two lines of text."""

_MAX_LISTED = 16
"""Shards in the table for a person."""


@dataclass(frozen=True)
class ToHuggingFace(Target[HuggingFaceTarget]):
    """Shards of a bounded size."""

    marker = CONFIG_NAME
    max_shard_nbytes: int = DEFAULT_MAX_SHARD_NBYTES
    router_dtype: str | None = None
    """The safetensors dtype of MoE routers; None to keep that of the source."""

    @classmethod
    def chosen(cls, options: Options, source: Described) -> ToHuggingFace:
        """The target that the options choose. Raises Refused for options of Nanotron targets."""
        problems = Problems(UsageError(f"{flag} with --to hf: only a Nanotron checkpoint is cut like that")
                            for flag in nanotron_flags(options))
        problems.raise_if_any()
        return cls(options.max_shard_size, source.router_dtype if options.dtype == "keep" else None)

    def unsupported(self, source: Described) -> Iterator[Unsupported]:
        """The source's unsupported settings. `--allow` accepts them of a Nanotron source only, which has no effect of
        them: of any other a new config.json would silently lose the setting."""
        is_nanotron = source.config_class is not None
        for setting in source.unsupported:
            yield setting if is_nanotron else replace(setting, name=f"{setting.name} in a new config.json")

    def notes(self, source: Source, layout: HuggingFaceTarget) -> Iterator[str]:
        """A remark on token ids, where the source does not hold all of them."""
        if not source.ids_are_known:
            ids = ", ".join(f"{key} {json.dumps(value)}" for key, value in source.config.token_ids.items())
            yield (f"{ids} are those of {source.config_name}, which holds one number each and none for padding; "
                   f"compare them with the config.json of the original model")

    def layout(self, root: Path, model: Model, dtypes: Callable[[int], str]) -> HuggingFaceTarget:
        if self.router_dtype is not None:
            dtypes = with_router_dtype(model, dtypes, self.router_dtype)
        return HuggingFaceTarget(root, model, dtypes, self.max_shard_nbytes)

    def documents(self, source: Source, layout: HuggingFaceTarget, dtype: str, destination: Path,
                  companions: Iterable[str]) -> dict[str, bytes]:
        documents = {CONFIG_NAME: json.dumps(config_of(source, dtype), indent=2, sort_keys=True).encode() + b"\n"}
        if not any(name.lower() == CARD_NAME.lower() for name in companions):
            documents[CARD_NAME] = model_card(source, dtype, destination)
        if layout.num_files > 1:
            index = {"metadata": {"total_size": layout.total_nbytes}, "weight_map": dict(sorted(layout.weight_map()))}
            documents[INDEX_NAME] = json.dumps(index, indent=2).encode() + b"\n"
        return documents

    def held_nbytes(self, layout: HuggingFaceTarget) -> int:
        """An index names every tensor, and is in memory as a dict, as text and as bytes."""
        return layout.model.num_stored * _INDEX_NBYTES_PER_TENSOR if layout.num_files > 1 else 0

    def facts(self, layout: HuggingFaceTarget) -> dict[str, Any]:
        return layout.facts | {"max_shard_nbytes": self.max_shard_nbytes}

    def lines(self, layout: HuggingFaceTarget, facts: Mapping[str, Any]) -> Iterator[str]:
        yield "shard                                                        tensors       bytes"
        for file in islice(layout.files, _MAX_LISTED):
            yield f"{file.path:<60} {len(file.tensors):>7} {human(file.nbytes):>11}"
        if layout.num_files > _MAX_LISTED:
            yield f"and {layout.num_files - _MAX_LISTED} more"

    def __str__(self) -> str:
        return f"shards of at most {self.max_shard_nbytes / 1e9:g} GB"

    def next_step(self, destination: Path) -> NextStep:
        return NextStep("load", "in Python, with transformers:",
                        f"AutoModelForCausalLM.from_pretrained({str(destination)!r})")


def config_of(source: Source, dtype: str) -> dict[str, Any]:
    """The keys of config.json, as transformers 4 writes them and 5 reads them."""
    config, family = source.config, source.family
    fields: dict[str, Any] = {
        "architectures": [family.hugging_face_class], "model_type": family.model_type,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads, "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings, "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta, "initializer_range": config.initializer_range,
        "hidden_act": config.hidden_act, "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype, "use_cache": True, "attention_dropout": 0.0}
    if config.experts is not None:
        fields |= asdict(config.experts)
    if (n := config.no_rope_layer) is not None:
        fields |= {"no_rope_layer_interval": n,
                   "no_rope_layers": [int((layer + 1) % n != 0) for layer in range(config.num_hidden_layers)]}
    if config.whole_num_hidden_layers is not None:
        fields[WHOLE] = config.whole_num_hidden_layers
    return fields | config.token_ids | dict(family.settings)
