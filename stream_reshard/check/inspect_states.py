"""The training state beside the weights of a checkpoint, for `inspect`: its facts, its faults, and what Nanotron will
get wrong when it resumes from it."""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.nanotron import open_nanotron
from stream_reshard.check.weights.start import TrainingFolder
from stream_reshard.check.weights.states.metadata import sum_faults
from stream_reshard.check.weights.states.state import TrainingState, has_state, open_state, shape_at, shapes_of
from stream_reshard.check.weights.training import training_problems
from stream_reshard.errors import Problems
from stream_reshard.machine.memory import human
from stream_reshard.storage.dtypes import ITEMSIZE

SAVED, EXACT = "saved", "exact"
"""Kinds of schedule: as Nanotron saves it, and so that its loader goes on exactly."""


def state_facts(root: Path, max_nbytes: int) -> tuple[dict[str, Any], list[str], list[str]]:
    """(facts under the key `training`, faults, notes) of the training state in a Nanotron checkpoint, if it has one.
    Faults of the weights are told elsewhere; with them the state cannot be described."""
    if not has_state(root):
        return {}, [], []
    checkpoint = Problems().collect(open_nanotron, root, None, max_nbytes, Problems())
    if checkpoint is None:
        return {}, [], ["the training state is not described: the weights beside it have faults"]
    faults, notes = Problems(), list[str]()
    state = faults.collect(open_state, checkpoint, max_nbytes, faults)
    if state is None:
        return {}, list(map(str, faults)), notes
    problems, _ = training_problems(TrainingFolder(root, root, None), replace(checkpoint, state=state), state.topology,
                                    max_nbytes, notes)
    return ({"training": _facts(checkpoint, state)}, list(map(str, problems)), [*_notes(state), *notes])


def _facts(checkpoint: Checkpoint, state: TrainingState) -> dict[str, Any]:
    rates = [settings.get("lr") for _, _, settings in state.groups()]
    numbers = [rate for rate in rates if isinstance(rate, (int, float))]
    return {"step": state.metas["last_train_step"], "optimizer_step": state.step,
            "samples": state.metas.get("consumed_train_samples"), "tokens": state.metas.get("consumed_tokens_total"),
            "learning_rates": [min(numbers), max(numbers)] if numbers else None, "optimizer": state.config.optimizer,
            "zero_stage": int(state.is_zero), "dp": state.topology.dp, "has_masters": state.has_masters,
            "schedule": EXACT if state.is_exact else SAVED, "vocab_rows": checkpoint.config.vocab_size,
            "states": {kind: _kind_facts(checkpoint, state, kind) for kind in state.kinds},
            "num_files": len(state.paths)}


def _kind_facts(checkpoint: Checkpoint, state: TrainingState, kind: str) -> dict[str, Any]:
    """Dtypes and bytes of one kind of state, in all files: what ranks hold whole, each of them has."""
    dtypes: dict[str, int] = {}
    for name, shapes in shapes_of(checkpoint).items():
        dtype = state.dtype_of(kind, name)
        num_elements = sum(math.prod(shape_at(shapes, tp)) for tp in range(state.topology.tp))
        dtypes[dtype] = dtypes.get(dtype, 0) + num_elements * len(state.stages_of[name]) * ITEMSIZE[dtype]
    return {"dtypes": dtypes, "nbytes": sum(dtypes.values())}


def _notes(state: TrainingState) -> Iterator[str]:
    """What Nanotron will not do as the state asks for, when it resumes."""
    yield from sum_faults(state.metas)
    if state.is_zero and state.has_masters and state.topology.dp > 1:
        yield ("ZeRO-1 with float32 masters at DP>1: Nanotron's main cannot train so (NotImplementedError in the hook "
               "of its gradients); it can with ZeRO-0")
    if state.step != state.metas["last_train_step"]:
        yield (f"the optimizer has done {state.step:g} steps, the training {state.metas['last_train_step']}: its state "
               f"was not loaded at some start")
    if not state.is_exact and any(settings.get("lr") == 0 for _, _, settings in state.groups()):
        yield "the learning rate is 0: Nanotron's main divides by it when it resumes, and does not start"


def state_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The facts for a person."""
    counts = [f"{facts[key]} {key}" for key in ("samples", "tokens") if facts[key] is not None]
    yield "training   " + ", ".join([f"step {facts['step']}", *counts, *_rates(facts)])
    masters = "masters in float32" if facts["has_masters"] else "no masters"
    yield f"optimizer  {facts['optimizer']}, ZeRO-{facts['zero_stage']}, DP={facts['dp']}, {masters}"
    kinds = [f"{kind} {human(of_kind['nbytes'])} in {' and '.join(of_kind['dtypes'])}"
             for kind, of_kind in facts["states"].items()]
    yield f"states     {', '.join(kinds)}, each with {facts['vocab_rows']} rows of the vocabulary"
    yield ("schedule   exact: Nanotron goes on where it stopped" if facts["schedule"] == EXACT else
           "schedule   as Nanotron saves it; its main skips one step of it when it resumes")


def _rates(facts: Mapping[str, Any]) -> Iterator[str]:
    if facts["learning_rates"]:
        least, most = facts["learning_rates"]
        yield f"learning rate {least:.6g}" + (f" to {most:.6g}" if most != least else "")
