"""A training state, opened: its files are those of one topology, and agree with each other and with the weights."""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.states.cut import stretch_of
from stream_reshard.check.weights.states.metadata import read_metas
from stream_reshard.check.weights.states.names import OPTIMIZER, RANDOM, SCHEDULE, random_paths, state_paths
from stream_reshard.check.weights.states.optimizer_config import OptimizerConfig, read_config
from stream_reshard.check.weights.states.order import stages_in_order
from stream_reshard.check.weights.states.rank_file import MASTERS, Held, RankFile, read_rank_file
from stream_reshard.check.weights.states.schedule import Schedule, read_schedule, schedule_paths
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.formats.nanotron.training.files import (
    OPTIMIZER_CONFIG_NAME, SINGLE_SCHEDULER_NAME, StateRank, optimizer_path)
from stream_reshard.formats.nanotron.weight_files import parse_path
from stream_reshard.model.topology import Topology

_MAX_MISSING = 1000
"""Missing files that are told one by one."""

Shapes = Mapping[str, Mapping[int | None, tuple[int, ...]]]
"""Of each Nanotron parameter, the shape of the shard by tensor-parallel rank; None where ranks hold it whole."""


@dataclass(frozen=True)
class TrainingState:
    """The state of a training beside the weights."""

    root: Path
    config: OptimizerConfig
    stages: tuple[tuple[str, ...], ...]
    """The parameters of each stage, in the optimizer's order."""
    files: Mapping[tuple[int, int, int], RankFile]
    """By (stage, data-parallel rank, tensor-parallel rank)."""
    schedule: Schedule
    document: Mapping[str, Any]
    """checkpoint_metadata.json."""
    paths: Sequence[str]
    """All files, those of random generators among them."""

    @property
    def topology(self) -> Topology:
        """Sizes of the parallel axes."""
        return self.config.topology

    @property
    def is_zero(self) -> bool:
        """True if ZeRO-1 cuts the states over data-parallel ranks."""
        return self.config.is_zero

    @property
    def num_stretches(self) -> int:
        """Number of stretches of each shard."""
        return self.config.num_stretches

    @property
    def metas(self) -> Mapping[str, Any]:
        """Steps, samples and tokens of the training."""
        metas: Mapping[str, Any] = self.document["metas"]
        return metas

    @property
    def random_paths(self) -> list[str]:
        """Paths of the states of random generators, if there are any."""
        return [path for path in self.paths if path.startswith(f"{RANDOM}/")]

    @property
    def step(self) -> float | None:
        """Steps of the optimizer."""
        return next((file.step for file in self.files.values() if file.step is not None), None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of state: moments by their keys, then masters."""
        return max((file.kinds for file in self.files.values()), key=len)

    @property
    def has_masters(self) -> bool:
        """True if the optimizer keeps float32 weights."""
        return MASTERS in self.kinds

    @cached_property
    def stages_of(self) -> Mapping[str, list[int]]:
        """The stages that hold each parameter: two for a tied embedding at several stages."""
        found: dict[str, list[int]] = {}
        for stage, names in enumerate(self.stages):
            for name in names:
                found.setdefault(name, []).append(stage)
        return found

    @cached_property
    def ids(self) -> Mapping[tuple[str, ...], Mapping[str, int]]:
        """By the parameters of a file: the id of each."""
        return {file.names: {name: number for number, name in enumerate(file.names)} for file in self.files.values()}

    def dtype_of(self, kind: str, name: str) -> str:
        """The dtype of a state of a Nanotron parameter; its first element is in the first stretch."""
        file = self.files[self.stages_of[name][0], 0, 0]
        return file.dtypes[kind][self.ids[file.names][name]]

    def groups(self) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        """(parameter, index of the stage among those that hold it, settings) of every group."""
        seen: set[str] = set()
        for stage, names in enumerate(self.stages):
            for name, settings in zip(names, self.files[stage, 0, 0].groups):
                yield name, int(name in seen), settings
                seen.add(name)

    @property
    def is_exact(self) -> bool:
        """True if the schedule is written so that Nanotron goes on where it stopped: its loader sets each learning
        rate anew from the first one, and counts a step more (nanotron/serialize/optimizer.py, helpers.py)."""
        if any(settings.get("lr") != settings.get("initial_lr") for _, _, settings in self.groups()):
            return False
        # A trainer that was resumed is ahead of its steps, and still so after one step less.
        return bool(self.schedule.last_epoch < self.metas["last_train_step"]) or any(
            self.files[stage, 0, 0].groups[index].get("lr") != entries.get("_last_lr")
            for (stage, index), entries in self.schedule.entries.items())


def has_state(root: Path) -> bool:
    """True if there are files of an optimizer or a schedule; those of random generators alone are none."""
    return any(path.startswith((f"{OPTIMIZER}/", f"{SCHEDULE}/")) for path in state_paths(root))


def open_state(checkpoint: Checkpoint, max_nbytes: int, problems: Problems) -> TrainingState | None:
    """Read the values of all files but for tensors; every fault goes to `problems`. None where there is a fault, or no
    state."""
    root, opening = checkpoint.root, _Opening(checkpoint, max_nbytes)
    found = state_paths(root)
    if not has_state(root):
        return None
    state = opening.problems.collect(opening.state, found)
    problems.extend(opening.problems)
    return state if not opening.problems else None


@dataclass
class _Opening:
    """Reading of one training state."""

    checkpoint: Checkpoint
    max_nbytes: int
    problems: Problems = field(default_factory=Problems)

    def state(self, found: Sequence[str]) -> TrainingState | None:
        """The state in these files; faults that do not end the reading go to `problems`."""
        root, checkpoint = self.checkpoint.root, self.checkpoint
        config = read_config(root, self.max_nbytes, checkpoint.topology)
        topology = config.topology
        has_randoms = any(path.startswith(f"{RANDOM}/") for path in found)
        if (config.is_zero or has_randoms) and topology.world_size > len(found) + _MAX_MISSING:
            raise SourceError(f"{OPTIMIZER_CONFIG_NAME} is of {topology}: there are {len(found)} files for "
                              f"{topology.world_size} ranks")
        stages = stages_in_order(checkpoint.model, checkpoint.config_class or "", topology.pp)
        ranks = {(pp, dp, tp): optimizer_path(StateRank(pp, tp, dp if config.is_zero else None), topology)
                 for pp in range(topology.pp) for dp in range(config.num_stretches) for tp in range(topology.tp)}
        document, _ = read_metas(root, self.max_nbytes)
        if document.get("dp", topology.dp) != topology.dp:
            raise SourceError(f"checkpoint_metadata.json has dp {quoted(document['dp'])}, {OPTIMIZER_CONFIG_NAME} has "
                              f"{topology.dp}")
        of_schedule = schedule_paths(topology, _is_single(checkpoint.version, found))
        randoms = list(random_paths(topology)) if has_randoms else []
        expected = [OPTIMIZER_CONFIG_NAME, *ranks.values(), *of_schedule, *randoms]
        self.problems.extend(_set_faults(set(found), set(expected), topology))
        shapes = shapes_of(checkpoint)
        if self.problems or any(name not in shapes for names in stages for name in names):
            return None  # Where weights are missing, that is told already.
        files = self._rank_files(ranks, stages, shapes, config)
        num_lists = 1 if any(file.has_one_group for file in files.values()) else None
        schedule = read_schedule(root, of_schedule, [num_lists or len(stage) for stage in stages], self.max_nbytes,
                                 self.problems)
        if self.problems or schedule is None:
            return None
        state = TrainingState(root, config, stages, files, schedule, document, sorted(expected))
        self.problems.extend(_disagreements(state))
        first_stage = [(name, shape_at(shapes[name], 0)) for name in stages[0]]
        self.problems.extend(config.faults(first_stage, state.has_masters))
        return state

    def _rank_files(self, paths: Mapping[tuple[int, int, int], str], stages: Sequence[Sequence[str]], shapes: Shapes,
                    config: OptimizerConfig) -> dict[tuple[int, int, int], RankFile]:
        files: dict[tuple[int, int, int], RankFile] = {}
        common: dict[Any, Any] = {}
        for (pp, dp, tp), path in paths.items():
            held = [_held(name, shape_at(shapes[name], tp), dp, config) for name in stages[pp]]
            file = self.problems.collect(read_rank_file, self.checkpoint.root, path, stages[pp], held, self.max_nbytes,
                                         common)
            if file is not None:
                files[pp, dp, tp] = file
        return files


def _is_single(version: str | None, found: Sequence[str]) -> bool:
    """True if one file holds the schedule, as in format 1.2; source trees between it and 1.5 have either."""
    return version == "1.2" or (version != "1.5" and SINGLE_SCHEDULER_NAME in found)


def shapes_of(checkpoint: Checkpoint) -> Shapes:
    """The shapes of all shards, by the headers of the weights."""
    shapes: dict[str, dict[int | None, tuple[int, ...]]] = {}
    for name in checkpoint.weights:
        weight = checkpoint.weights[name]
        of_ranks = shapes.setdefault(weight.parameter.nanotron, {})
        for piece in weight.pieces:
            rank = parse_path(piece.tensor.file)[1]
            of_ranks[rank.tp if rank else None] = piece.tensor.shape
    return shapes


def shape_at(shapes: Mapping[int | None, tuple[int, ...]], tp: int) -> tuple[int, ...]:
    """The shape of a parameter on a rank: that of its shard, or of the whole."""
    return shapes[None] if None in shapes else shapes[tp]


def _held(name: str, shape: tuple[int, ...], dp: int, config: OptimizerConfig) -> Held | None:
    """What a rank holds of a shard of this shape, which ZeRO-1 flattens also for one rank; None for nothing."""
    if not config.is_zero:
        return Held(name, shape)
    start, stop = stretch_of(math.prod(shape), config.num_stretches, dp)
    return Held(name, (stop - start,)) if start < stop else None


def _set_faults(found: set[str], expected: set[str], topology: Topology) -> Iterator[SourceError]:
    """Errors for files that are missing, and for those of another topology or of none."""
    for path in sorted(expected - found):
        yield SourceError(f"{quoted(path)} is missing: {OPTIMIZER_CONFIG_NAME} is of {topology}",
                          kind="files of the training state are missing")
    for path in sorted(found - expected):
        yield SourceError(f"{quoted(path)} is extra: {OPTIMIZER_CONFIG_NAME} is of {topology}",
                          kind="files beside the training state are extra")


def _disagreements(state: TrainingState) -> Iterator[SourceError]:
    """Errors for what all ranks, or those of one stage, must have in common."""
    first, kinds = next(iter(state.files.values())), state.kinds
    dtypes: dict[tuple[str, str], tuple[str, str]] = {}
    for (pp, _, _), file in state.files.items():
        if file.names and file.kinds != kinds:
            yield SourceError(f"{quoted(file.path)} holds {', '.join(file.kinds)}, other ranks {', '.join(kinds)}")
        if file.step not in (None, state.step):
            yield SourceError(f"{quoted(file.path)} is of step {file.step:g}, {quoted(first.path)} of "
                              f"{state.step:g}")
        other = state.files[pp, 0, 0]
        if file.groups is not other.groups:
            yield SourceError(f"{quoted(file.path)} and {quoted(other.path)} of the same stage have other param_groups")
        for kind, of_kind in file.dtypes.items():
            for name, dtype in zip(file.names, of_kind):
                before = dtypes.setdefault((kind, name), (dtype, file.path))
                if before[0] != dtype:
                    yield SourceError(f"{quoted(file.path)}: {kind} of {quoted(name)} has the dtype {dtype}, "
                                      f"{before[0]} in {quoted(before[1])}")
