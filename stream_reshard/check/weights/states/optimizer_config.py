"""optimizer_config.json: the topology of a training state, and how ZeRO-1 cuts it. All its numbers are texts."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_reshard.check.weights.states.cut import stretch_of
from stream_reshard.check.weights.states.names import word
from stream_reshard.check.weights.states.rank_file import PREFIX
from stream_reshard.errors import SourceError, quoted
from stream_reshard.formats.nanotron.training.files import OPTIMIZER_CONFIG_NAME
from stream_reshard.model.topology import Topology
from stream_reshard.storage.small_files import read_json

_ZERO = "ZeroDistributedOptimizer"
"""Nanotron's class of an optimizer whose states are cut by ZeRO-1."""

_KEYS = {"type", "parallelism", "configs"}
_SIZES = {"tp": "tp_size", "pp": "pp_size", "dp": "dp_size"}
_MAX_RANKS = 2**16


@dataclass(frozen=True)
class OptimizerConfig:
    """What the document states."""

    optimizer: str
    """Nanotron's class of the optimizer. It does not tell whether there are masters."""
    topology: Topology
    configs: Any
    """The cut of ZeRO-1; empty without it."""

    @property
    def is_zero(self) -> bool:
        """True if ZeRO-1 cuts the states over data-parallel ranks."""
        return self.optimizer == _ZERO

    @property
    def num_stretches(self) -> int:
        """Number of stretches of each shard."""
        return self.topology.dp if self.is_zero else 1

    def faults(self, first_stage: Sequence[tuple[str, tuple[int, ...]]], has_masters: bool) -> Iterator[SourceError]:
        """Errors where it does not describe the files; `first_stage`: the parameters there, with the shapes of their
        shards. Nanotron's first process writes the document, so it lists no others."""
        fitting = _ZERO if self.is_zero else "OptimizerFromGradientAccumulator" if has_masters else "NamedOptimizer"
        if self.optimizer != fitting:
            yield SourceError(f"{OPTIMIZER_CONFIG_NAME}: type is {quoted(self.optimizer)}, the files are those of "
                              f"{fitting}")
        wanted: dict[str, Any] = {}
        if self.is_zero:
            wanted = {"param_name_to_dp_rank_offsets": {PREFIX + name: _offsets(shape, self.topology.dp)
                                                        for name, shape in first_stage},
                      "orig_param_shapes": {PREFIX + name: list(map(str, shape)) for name, shape in first_stage}}
        found = self.configs if isinstance(self.configs, dict) else {"configs": self.configs}
        for key in sorted({*wanted, *found}):
            if found.get(key) != wanted.get(key):
                yield SourceError(f"{OPTIMIZER_CONFIG_NAME}: {word(key)} does not describe the parameters of the first "
                                  f"stage, as they are cut for DP={self.topology.dp}")


def read_config(root: Path, max_nbytes: int, of_weights: Topology | None) -> OptimizerConfig:
    """The document in a checkpoint whose weights have the topology `of_weights`. Raises SourceError."""
    config = read_json(root, OPTIMIZER_CONFIG_NAME, max_nbytes)
    if config.keys() != _KEYS or not isinstance(config["parallelism"], dict):
        raise SourceError(f"{OPTIMIZER_CONFIG_NAME}: it has {quoted(sorted(config))}, where Nanotron writes "
                          f"{', '.join(sorted(_KEYS))}")
    sizes = config["parallelism"]
    texts = {axis: sizes.get(key) for axis, key in _SIZES.items()}
    if not all(map(_is_size, texts.values())):
        raise SourceError(f"{OPTIMIZER_CONFIG_NAME}: parallelism is {quoted(sizes)}, not tp_size, pp_size and dp_size")
    topology = Topology(**{axis: int(str(text)) for axis, text in texts.items()})
    if of_weights is not None and (topology.tp, topology.pp) != (of_weights.tp, of_weights.pp):
        raise SourceError(f"{OPTIMIZER_CONFIG_NAME} is of TP={topology.tp} PP={topology.pp}, the weights beside it are "
                          f"of TP={of_weights.tp} PP={of_weights.pp}")
    if sizes.get("expert_parallel_size") != "1" or len(sizes) > len(texts) + 1:
        raise SourceError(f"{OPTIMIZER_CONFIG_NAME}: expert_parallel_size is "
                          f"{quoted(sizes.get('expert_parallel_size'))}, not '1', or it has other sizes")
    return OptimizerConfig(str(config["type"]), topology, config["configs"])


def _is_size(text: Any) -> bool:
    """True for a number of ranks as Nanotron writes it."""
    return (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 6 and text == str(int(text))
            and 0 < int(text) <= _MAX_RANKS)


def _offsets(shape: tuple[int, ...], num_ranks: int) -> dict[str, list[str]]:
    stretches = (stretch_of(math.prod(shape), num_ranks, rank) for rank in range(num_ranks))
    return {str(rank): [str(start), str(stop)] for rank, (start, stop) in enumerate(stretches) if start < stop}
