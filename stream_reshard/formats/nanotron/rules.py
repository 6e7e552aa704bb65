"""Rules of a Nanotron checkpoint beside its model: topology, version, padding, stages; and the models that fit them."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from stream_reshard.errors import Problems, UsageError
from stream_reshard.model.parameters import Model, ModelConfig
from stream_reshard.model.topology import Topology

MARKERS = {"LlamaConfig": "is_llama_config", "Qwen2Config": "is_qwen2_config"}
"""The key by which Nanotron's parser recognizes each config class."""

STAGES = "stages"
"""Name in `verify --allow` for blocks on other stages than in Nanotron's balancing. Its loader finds them, but has to
read every file."""

PADDING = "padding"
"""Name in `verify --allow` for rows of padding that are not zero. Nanotron itself fills them with random values."""

MAX_TP, MAX_PP = 1024, 4096
"""Largest numbers of ranks among the usable ones that a message lists."""


@dataclass(frozen=True)
class NanotronRules:
    """Everything about a Nanotron checkpoint that does not follow from its model."""

    topology: Topology
    config_class: str = "LlamaConfig"
    """Nanotron's config class."""
    version: str = "1.5"
    """The format version."""
    rope_interleaved: bool = False
    """Heads are stored as (pair, half) instead of Hugging Face's (half, pair)."""
    vocab_multiple: int = 1
    """Nanotron's make_vocab_size_divisible_by."""
    vocab_rows: int | None = None
    """Rows of the embedding with padding in an existing checkpoint; None to pad as Nanotron does."""

    pad_row: int | None = None
    """Row of the embedding that rows of padding repeat: a trained one. None for zeros."""

    def padded_vocab(self, vocab_size: int) -> int:
        """Rows of the embedding with padding: the trainer pads before it builds the model (nanotron/trainer.py)."""
        return self.vocab_rows or padded_size(vocab_size, self.topology.tp * self.vocab_multiple)


def stages_of(config: ModelConfig, rules: NanotronRules) -> dict[str, int]:
    """The stage of each pipeline block in Nanotron's balancing, by the block's name (`decoder.3`).

    Costs are those of `get_block_compute_costs` (nanotron/models/llama.py, qwen.py) with the padded vocabulary; blocks
    without a cost there count 0.
    """
    layer = (4 * config.num_attention_heads * config.head_dim * config.hidden_size
             + 3 * config.intermediate_size * config.hidden_size)
    head = rules.padded_vocab(config.vocab_size) * config.hidden_size
    costs = {"token_position_embeddings": 0}
    costs |= {f"decoder.{i}": layer for i in range(config.num_hidden_layers)}
    costs |= {"final_layer_norm": 0, "lm_head": head, "cast_to_fp32": 0, "loss": 0}
    stages = assign_stages(tuple(costs.values()), rules.topology.pp)
    return {name: stage for name, stage in zip(costs, stages) if name not in ("cast_to_fp32", "loss")}


def uneven_dims(model: Model, tp: int) -> dict[tuple[str, int], str]:
    """The dims that `tp` ranks cannot split: (dim, size), with the name of the first such parameter. The vocabulary is
    padded, so it can always be split."""
    uneven: dict[tuple[str, int], str] = {}
    for row in model.stored_rows:
        parameter = model.parameter(model.firsts[row])
        if parameter.split and parameter.split != "vocab":
            size = parameter.shape[parameter.dims.index(parameter.split)]
            if size % tp:
                uneven.setdefault((parameter.split, size), parameter.name)
    return uneven


def topology_problems(model: Model, rules: NanotronRules) -> Problems:
    """Reasons why the model cannot be cut like this, one UsageError for each axis."""
    problems = Problems()
    tp, pp, config = rules.topology.tp, rules.topology.pp, model.config
    if uneven := uneven_dims(model, tp):
        usable = [n for n in range(1, min(MAX_TP, *(size for _, size in uneven)) + 1)
                  if all(size % n == 0 for _, size in uneven)]
        dims = " nor ".join(f"the {size} {dim} of {name}" for (dim, size), name in uneven.items())
        problems.append(UsageError(f"--tp {tp} cannot split {dims}; --tp can be {listed(usable)}"))
    empty = _empty_stages(config, rules) if pp <= MAX_PP else [pp - 1]
    if empty:
        usable = [n for n in range(1, min(pp, config.num_hidden_layers + 4)) if not _empty_stages(
            config, NanotronRules(Topology(tp, n), vocab_multiple=rules.vocab_multiple))]
        problems.append(UsageError(f"--pp {pp} leaves stage {listed(empty)} without parameters in Nanotron's own "
                                   f"balancing of {config.num_hidden_layers} layers; --pp can be {listed(usable)}"))
    return problems


def _empty_stages(config: ModelConfig, rules: NanotronRules) -> list[int]:
    return sorted(set(range(rules.topology.pp)) - set(stages_of(config, rules).values()))


def listed(numbers: Iterable[int]) -> str:
    """The numbers for a person; of more than 20 the first ones and the last."""
    texts = list(map(str, numbers))
    return ", ".join(texts if len(texts) <= 20 else [*texts[:19], f"... {texts[-1]}"])


def padded_size(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple: Nanotron's `_vocab_size_with_padding` (nanotron/helpers.py)."""
    return -(-size // multiple) * multiple


def assign_stages(costs: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """The stage of each pipeline block, by its cost, in Nanotron's balancing (`build_model`, nanotron/models/base.py).

    Each block goes to the current stage. After it, the next stage begins if the cost so far exceeds the limit of the
    current one. So the block that exceeds the limit is in the earlier stage, and the last stages may be empty. Limits
    are computed in floating point, as in Nanotron.
    """
    total = sum(costs)
    limits = [total * ((stage + 1) / num_stages) for stage in range(num_stages)]
    stages, stage = [], 0
    for cost_so_far in accumulate(costs):
        stages.append(stage)
        stage += float(cost_so_far) > limits[stage]
    return tuple(stages)
