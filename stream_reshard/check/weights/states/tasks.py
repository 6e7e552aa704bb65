"""The parts of the comparison of training states that read tensors and whole files; each is a task.

Between two checkpoints: every kind of state of every parameter. Within the copy: masters, rounded, are the weights, so
both are of one step; what several ranks hold is equal; every byte of its files has the checksum that it had when it was
saved.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from stream_reshard.check.weights.checkpoint import Checkpoint, Weights
from stream_reshard.check.weights.compare import Compared, Rule, compare
from stream_reshard.check.weights.states.moved import Repeat, StateWeights, masters_rounded
from stream_reshard.check.weights.states.state import TrainingState
from stream_reshard.errors import DifferenceError, SourceError
from stream_reshard.machine.stop import Stop
from stream_reshard.model.parameters import Parameter
from stream_reshard.storage.torch_bytes import damage_in

Task = Callable[[], Compared]


def state_tasks(source: Checkpoint, copy: Checkpoint, rule: Rule, stop: Stop) -> Iterator[Task]:
    """Tasks of all tensors in the state of `copy`, which it has; the source may have none."""
    assert copy.state is not None
    rows = min(source.config.vocab_size, copy.config.vocab_size)
    rule = replace(rule, dtype=None, vocab_size=rows)
    inside = replace(rule, vocab_size=copy.config.vocab_size, padding_is_zero=False, source_padding_is_known=True)
    for name in copy.weights:
        if source.state is not None and name in source.weights:
            for kind in (kind for kind in copy.state.kinds if kind in source.state.kinds):
                theirs = StateWeights(source.weights, source.state, kind)
                ours = StateWeights(copy.weights, copy.state, kind)
                if theirs.dtype_of(name) == ours.dtype_of(name):
                    yield partial(_compare, name, _with(source, theirs), _with(copy, ours), rule, stop,
                                  is_counted=True)
        yield from _inside_tasks(name, copy, copy.state, inside, stop)


def _inside_tasks(name: str, copy: Checkpoint, state: TrainingState, rule: Rule, stop: Stop) -> Iterator[Task]:
    """Tasks that compare a parameter's state with its weights, and its repeats with each other."""
    weights = copy.weights
    if state.has_masters:  # Read as they are stored they take twice the memory of the weights, and once more rounded.
        yield partial(_compare, name, _with(copy, masters_rounded(weights, state)), copy, replace(
            rule, block_nbytes=rule.block_nbytes // 4, other="its master rounds to"), stop)
    for repeat in _repeats(weights[name].parameter, state):
        for kind in state.kinds:
            yield partial(_compare, name, _with(copy, StateWeights(weights, state, kind)),
                          _with(copy, StateWeights(weights, state, kind, repeat)),
                          replace(rule, other="another rank has"), stop)


def _compare(name: str, source: Checkpoint, copy: Checkpoint, rule: Rule, stop: Stop, is_counted: bool = False
             ) -> Compared:
    """As `compare`, but what is counted are no weights."""
    compared = compare(name, source, copy, rule, stop)
    return replace(compared, num_elements=0, num_states=compared.num_elements if is_counted else 0)


def _repeats(parameter: Parameter, state: TrainingState) -> Iterator[Repeat]:
    """The copies of a parameter beyond the first: on other ranks, and on another stage."""
    stages = range(len(state.stages_of[parameter.nanotron]))
    ranks = range(state.topology.tp if parameter.split is None else 1)
    return (Repeat(tp, stage) for stage in stages for tp in ranks if (tp, stage) != (0, 0))


def _with(checkpoint: Checkpoint, weights: Weights) -> Checkpoint:
    return replace(checkpoint, weights=weights)


def byte_tasks(copy: Checkpoint, buffer_nbytes: int, stop: Stop) -> Iterator[Task]:
    """One task per .pt file of the training state: its checksums."""
    paths = copy.state.paths if copy.state else ()
    return (partial(_undamaged, copy.root, path, buffer_nbytes, stop) for path in paths if path.endswith(".pt"))


def _undamaged(root: Path, path: str, buffer_nbytes: int, stop: Stop) -> Compared:
    try:
        fault = damage_in(root, path, memoryview(bytearray(buffer_nbytes)), stop)
    except SourceError as error:
        fault = str(error)
    return Compared(0, DifferenceError(fault) if fault else None)
