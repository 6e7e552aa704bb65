"""The documents of a Nanotron checkpoint, as the classes of Nanotron's trainer define them.

`model_config.json` is `asdict` of the config class, `checkpoint_metadata.json` is `CheckpointMetadata`
(nanotron/serialize/metadata.py), and `get_config_from_file` (nanotron/config/config.py) reads `config.yaml`. It is
strict, so config.yaml holds only keys that every source tree of its format version knows.
"""
from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import Any

from stream_reshard.formats.nanotron.config import METADATA_NAME, MODEL_CONFIG_NAME, ids_written
from stream_reshard.formats.nanotron.rules import MARKERS, NanotronRules
from stream_reshard.formats.nanotron.yaml_text import CONFIG_YAML
from stream_reshard.model.parameters import Experts, ModelConfig
from stream_reshard.model.truncation import layers_text


def nanotron_config(config: ModelConfig, rules: NanotronRules, attention_bias: bool,
                    vocab_size: int) -> dict[str, Any]:
    """The fields of Nanotron's config class that depend on the model; all others keep their defaults."""
    fields: dict[str, Any] = ids_written(config) | {
        "hidden_act": config.hidden_act, "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range, "intermediate_size": config.intermediate_size,
        MARKERS[rules.config_class]: True, "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads, "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads, "pretraining_tp": 1, "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_word_embeddings, "use_cache": True, "vocab_size": vocab_size}
    if rules.version != "1.2":
        fields |= {"rope_theta": config.rope_theta, "rope_interleaved": rules.rope_interleaved}
    if rules.config_class == "Qwen2Config":
        fields["attention_bias"] = attention_bias
    if config.experts is not None:
        fields["moe_config"] = moe_config(config.experts)
    if config.no_rope_layer is not None:
        fields["no_rope_layer"] = config.no_rope_layer
    return fields


def moe_config(experts: Experts) -> dict[str, Any]:
    """The fields of Nanotron's MoEConfig; -1 is every layer."""
    return {"num_experts": experts.num_experts, "top_k": experts.num_experts_per_tok,
            "moe_intermediate_size": experts.moe_intermediate_size,
            "shared_expert_intermediate_size": experts.shared_expert_intermediate_size,
            "router_aux_loss_coef": experts.router_aux_loss_coef, "layers": [-1], "enable_shared_expert": True,
            "token_dispatcher_type": "alltoall"}


def checkpoint_metadata(rules: NanotronRules, sequence_length: int) -> dict[str, Any]:
    """The metadata of a checkpoint before its first step. The loader of Nanotron's main requires data_stages."""
    document: dict[str, Any] = {"version": rules.version, "tp": rules.topology.tp, "dp": rules.topology.dp}
    metas: dict[str, Any] = {"last_train_step": 0, "consumed_train_samples": 0}
    if rules.version != "1.2":
        stage = {"name": "stable", "start_training_step": 1, "consumed_train_samples": 0}
        if rules.version == "1.5":
            stage |= {"sequence_length": sequence_length, "consumed_tokens_per_dataset_folder": {}}
            metas["consumed_tokens_total"] = 0
            document |= {"cp": 1, "custom_metas": None}
        metas |= {"last_stage_idx": 0, "data_stages": [stage]}
    return document | {"metas": metas}


def _scalar(value: Any) -> str:
    """A YAML 1.1 value in one line. Floats need a point: YAML reads 1e-05 as a string, 1.0e-05 as a number."""
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return mantissa + (".0" if e and "." not in mantissa else "") + e + exponent
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_scalar(item)}" for key, item in value.items()) + "}"
    return yaml_string(value) if isinstance(value, str) else json.dumps(value)


def yaml_string(text: str) -> str:
    """A string as a YAML 1.1 scalar in double quotes (section 5.7, escape sequences), in ASCII for readers of any
    encoding. JSON would not do: YAML reads its surrogate pairs as two characters. A byte of a path that is not UTF-8 is
    a lone surrogate in Python; PyYAML reads it back as one, and the path still names the same file."""
    return '"' + "".join(map(_escaped, decoded_path(text))) + '"'


def decoded_path(text: str) -> str:
    """The text of a path that Python decoded in an ASCII locale: each byte of UTF-8 beyond ASCII is a lone surrogate
    there, and becomes part of its character here."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text


def _escaped(character: str) -> str:
    if " " <= character <= "~":
        return "\\" + character if character in '"\\' else character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def config_yaml(config: ModelConfig, rules: NanotronRules, attention_bias: bool, dtype: str, destination: Path,
                has_tokenizer: bool) -> str:
    """A config.yaml that starts training from the weights alone; its vocabulary has no padding."""
    fields = nanotron_config(config, rules, attention_bias, config.vocab_size)
    model_config = "\n".join(f"    {key}: {_scalar(value)}" for key, value in sorted(fields.items()))
    truncation = "" if (whole := config.whole_num_hidden_layers) is None else (
        f"# A trial of a conversion, not a whole model: {layers_text(config.num_hidden_layers, whole)}.\n")
    topology, path = rules.topology, yaml_string(str(destination))
    if rules.version == "1.2":
        stages = "data:\n" + indent(_DATA, "  ")
        optimizer = indent(_ADAM, "  ")
    else:
        stages = "data_stages:\n- name: stable\n  start_training_step: 1\n  data:\n" + indent(_DATA, "    ")
        optimizer = "  optimizer_factory:\n    name: adamW\n" + indent(_ADAM, "    ")
    return truncation + _CONFIG.format(
        destination=path, checkpoints=yaml_string(str(destination.with_name(destination.name + "-training"))),
        stages=stages, optimizer=optimizer, model_config=model_config, dtype=dtype, multiple=rules.vocab_multiple,
        dp=topology.dp, tp=topology.tp, pp=topology.pp, tokenizer=path if has_tokenizer else "null",
        sequence_length=min(config.max_position_embeddings, 2048), bf16_grads=_scalar(dtype != "float32"))


_DATA = """\
dataset: null   # random tokens; for real data see the datasets in nanotron/config/config.py
num_loading_workers: 1
seed: 42
"""

_ADAM = """\
adam_beta1: 0.9
adam_beta2: 0.95
adam_eps: 1.0e-08
torch_adam_is_fused: true
"""

_CONFIG = """\
# Continue pretraining from the converted weights (weights only: no optimizer state, step 0).
# Before a real run set: the data, the learning rate and its schedule, the batch, train_steps.
checkpoints:
  checkpoint_interval: 1000
  checkpoints_path: {checkpoints}   # where this training saves
  resume_checkpoint_path: null   # null, so that init_method below is used
{stages}\
general:
  project: stream_reshard
  run: continued_pretraining
  seed: 42
logging:
  iteration_step_info_interval: 1
  log_level: info
  log_level_replica: info
model:
  ddp_bucket_cap_mb: 25
  dtype: {dtype}
  init_method:
    path: {destination}   # this folder; change it when the folder moves
  make_vocab_size_divisible_by: {multiple}
  model_config:   # the vocabulary without padding: the trainer pads it itself
{model_config}
optimizer:
  accumulate_grad_in_fp32: {bf16_grads}
  clip_grad: 1.0
  learning_rate_scheduler:   # a low constant-ish start for weights that are trained already
    learning_rate: 3.0e-05
    lr_decay_style: cosine
    lr_warmup_steps: 100
    lr_warmup_style: linear
    min_decay_lr: 3.0e-06
{optimizer}\
  weight_decay: 0.01
  zero_stage: 0
parallelism:   # the topology the weights are cut for; another one loads too, only slower
  dp: {dp}
  expert_parallel_size: 1
  pp: {pp}
  pp_engine: 1f1b
  tp: {tp}
  tp_linear_async_communication: false
  tp_mode: ALL_REDUCE
tokenizer:
  tokenizer_name_or_path: {tokenizer}
tokens:
  batch_accumulation_per_replica: {pp}   # at least the number of stages
  micro_batch_size: 1
  sequence_length: {sequence_length}
  train_steps: 1000
"""


def documents(config: ModelConfig, rules: NanotronRules, attention_bias: bool, dtype: str, destination: Path,
              has_tokenizer: bool) -> dict[str, bytes]:
    """The documents, by name."""
    padded = rules.padded_vocab(config.vocab_size)
    metadata = checkpoint_metadata(rules, min(config.max_position_embeddings, 2048))
    return {
        METADATA_NAME: json.dumps(metadata, indent=2, sort_keys=True).encode(),
        CONFIG_YAML: config_yaml(config, rules, attention_bias, dtype, destination, has_tokenizer).encode(),
        MODEL_CONFIG_NAME: json.dumps(nanotron_config(config, rules, attention_bias, padded), indent=2).encode()}
