"""The parameters that the optimizer of each stage holds, in its order: Nanotron matches states to them by position
(nanotron/optim/base.py, custom_load_state_dict), so another order loads without a word and is wrong."""
from __future__ import annotations

from collections.abc import Sequence

from stream_reshard.formats.nanotron.rules import NanotronRules, stages_of
from stream_reshard.model.parameters import Model
from stream_reshard.model.topology import Topology

_QWEN2_LAYER = (
    "input_layernorm", "post_attention_layernorm", "attn.qkv_proj.weight", "attn.qkv_proj.bias", "attn.o_proj",
    "mlp.gate_up_proj", "mlp.down_proj", "mlp.router", "mlp.shared_expert.gate_up_proj", "mlp.shared_expert.down_proj",
    "mlp.shared_expert_gate", "mlp.experts.merged_gate_up_proj", "mlp.experts.merged_down_proj")
"""Beginnings of the names in a layer, in the order in which Qwen2DecoderLayer makes its modules
(nanotron/models/qwen.py, nanotron/nn/moe.py). LlamaDecoderLayer makes them in that of the forward pass
(nanotron/models/llama.py)."""

HEAD = "lm_head.pp_block.weight"


def stages_in_order(model: Model, config_class: str, num_stages: int) -> tuple[tuple[str, ...], ...]:
    """The names of the parameters of each stage, below `model.`. A tied embedding is on the stage of the head too, as
    its last parameter (nanotron/models/base.py)."""
    stages = stages_of(model.config, NanotronRules(Topology(pp=num_stages)))
    listed: list[list[str]] = [[] for _ in range(num_stages)]
    for name in dict.fromkeys(parameter.nanotron for parameter in model.stored()):
        listed[stages[_block(name)]].append(name)
    if config_class == "Qwen2Config":
        listed = [_in_order_of_qwen2(names) for names in listed]
    embedding = next(model.stored()).nanotron
    if model.config.tie_word_embeddings and stages[_block(HEAD)] != stages[_block(embedding)]:
        listed[stages[_block(HEAD)]].append(embedding)
    return tuple(map(tuple, listed))


def _in_order_of_qwen2(names: Sequence[str]) -> list[str]:
    """The names with those of each layer in the order of Qwen2DecoderLayer."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(_block(name), []).append(name)
    return [name for of_block in blocks.values() for name in sorted(of_block, key=_place)]


def _place(name: str) -> int:
    inside = name.split(".pp_block.")[1]
    return next((place for place, begin in enumerate(_QWEN2_LAYER) if inside.startswith(begin)), -1)


def _block(name: str) -> str:
    return name.split(".pp_block")[0]
