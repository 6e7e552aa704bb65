"""Choices of a Nanotron checkpoint beyond its model: topology, version, padding; and which models it can hold."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from stream_reshard.errors import Problems, UsageError
from stream_reshard.model.parameters import Model, ModelConfig
from stream_reshard.model.topology import Topology

MARKERS = {"LlamaConfig": "is_llama_config", "Qwen2Config": "is_qwen2_config"}
"""The key by which Nanotron's parser tells its config classes apart."""

STAGES = "stages"
"""Name in `verify --allow` for blocks on other stages than Nanotron's balancing gives them: its loader finds them,
but reads every file for it."""

MAX_TP, MAX_PP = 1024, 4096
"""Up to where usable numbers of ranks are looked for."""


@dataclass(frozen=True)
class NanotronRules:
    """Everything about a Nanotron checkpoint that the model does not decide."""

    topology: Topology
    config_class: str = "LlamaConfig"
    """Nanotron's config class that the trainer will use."""
    version: str = "1.5"
    rope_interleaved: bool = False
    """A head is kept as (pair, half) instead of Hugging Face's (half, pair)."""
    vocab_multiple: int = 1
    """Nanotron's make_vocab_size_divisible_by."""
    vocab_rows: int | None = None
    """Rows of the embedding, padding included, where a checkpoint is there that has them."""

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of the embedding in Nanotron: the trainer pads before it builds the model (nanotron/trainer.py)."""
        return self.vocab_rows or padded_size(vocab_size, self.topology.tp * self.vocab_multiple)


def stages_of(config: ModelConfig, format: NanotronRules) -> dict[str, int]:
    """The stage of each pipeline block, by its Nanotron name (`decoder.3`).

    Costs as in `get_block_compute_costs` (nanotron/models/llama.py, qwen.py), on the padded vocabulary; blocks without
    a cost of their own ride along.
    """
    layer = (4 * config.num_attention_heads * config.head_dim * config.hidden_size
             + 3 * config.intermediate_size * config.hidden_size)
    head = format.padded_vocab(config.vocab_size) * config.hidden_size
    costs = {"token_position_embeddings": 0}
    costs |= {f"decoder.{i}": layer for i in range(config.num_hidden_layers)}
    costs |= {"final_layer_norm": 0, "lm_head": head, "cast_to_fp32": 0, "loss": 0}
    stages = assign_stages(tuple(costs.values()), format.topology.pp)
    return {name: stage for name, stage in zip(costs, stages) if name not in ("cast_to_fp32", "loss")}


def uneven_dims(model: Model, tp: int) -> dict[tuple[str, int], str]:
    """(dim, size) of everything that so many tensor-parallel ranks cannot split, with the first parameter that has it.
    The vocabulary is padded, so it always can be."""
    uneven: dict[tuple[str, int], str] = {}
    for row in model.stored_rows:
        parameter = model.parameter(model.firsts[row])
        if parameter.split and parameter.split != "vocab":
            size = parameter.shape[parameter.dims.index(parameter.split)]
            if size % tp:
                uneven.setdefault((parameter.split, size), parameter.name)
    return uneven


def topology_problems(model: Model, format: NanotronRules) -> Problems:
    """Every way in which the model cannot be cut like this, one UsageError each."""
    problems = Problems()
    tp, pp, config = format.topology.tp, format.topology.pp, model.config
    uneven = uneven_dims(model, tp)
    for (dim, size), name in uneven.items():
        usable = [n for n in range(1, min(size, MAX_TP) + 1) if all(s % n == 0 for _, s in uneven)]
        problems.append(UsageError(f"--tp {tp} cannot split the {size} {dim} of {name}; "
                                   f"--tp can be {_listed(usable)}"))
    empty = _empty_stages(config, format) if pp <= MAX_PP else [pp - 1]
    if empty:
        usable = [n for n in range(1, min(pp, config.num_hidden_layers + 4)) if not _empty_stages(
            config, NanotronRules(Topology(tp, n), vocab_multiple=format.vocab_multiple))]
        problems.append(UsageError(f"--pp {pp} leaves stage {_listed(empty)} without parameters in Nanotron's own "
                                   f"balancing of {config.num_hidden_layers} layers; --pp can be {_listed(usable)}"))
    return problems


def _empty_stages(config: ModelConfig, format: NanotronRules) -> list[int]:
    return sorted(set(range(format.topology.pp)) - set(stages_of(config, format).values()))


def _listed(numbers: Iterable[int]) -> str:
    texts = list(map(str, numbers))
    return ", ".join(texts if len(texts) <= 20 else [*texts[:19], f"... {texts[-1]}"])


def padded_size(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple: Nanotron's `_vocab_size_with_padding` (nanotron/helpers.py)."""
    return -(-size // multiple) * multiple


def assign_stages(costs: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """The stage of each pipeline block, in Nanotron's own balancing (`build_model`, nanotron/models/base.py).

    A block goes to the current stage, and only then does the stage advance, if the cost so far exceeds the stage's
    share. Hence the block that crosses the line stays in the earlier stage, and late stages may end up empty.
    Floating point, as there: a share is total * ((stage + 1) / num_stages).
    """
    total = sum(costs)
    shares = [total * ((stage + 1) / num_stages) for stage in range(num_stages)]
    stages, stage = [], 0
    for cost_so_far in accumulate(costs):
        stages.append(stage)
        stage += float(cost_so_far) > shares[stage]
    return tuple(stages)
