"""The settings of config.yaml by which Nanotron looks for a training state, against the state beside it."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stream_reshard.check.weights.states.state import TrainingState

GRADIENTS = "accumulate_grad_in_fp32"


def wanted_settings(settings: Mapping[str, Any], state: TrainingState) -> Iterator[tuple[str, Any, Any]]:
    """(name, value in config.yaml, value that the state needs). `settings`: by the names of sections. Without ZeRO the
    files do not depend on dp."""
    optimizer, parallelism = (settings.get(section) for section in ("optimizer", "parallelism"))
    of_optimizer: Mapping[str, Any] = optimizer if isinstance(optimizer, Mapping) else {}
    yield "zero_stage", of_optimizer.get("zero_stage"), int(state.is_zero)
    if state.has_masters or state.is_zero or of_optimizer.get(GRADIENTS) is True:
        yield GRADIENTS, of_optimizer.get(GRADIENTS), state.has_masters
    if state.is_zero and isinstance(parallelism, Mapping):
        yield "dp", parallelism.get("dp"), state.topology.dp
