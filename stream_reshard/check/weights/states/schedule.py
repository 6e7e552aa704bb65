"""The schedule of the learning rate: per stage, lists with an entry per parameter; and numbers of the training."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_reshard.check.weights.states.names import word
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.formats.nanotron.training.files import SINGLE_SCHEDULER_NAME, scheduler_path
from stream_reshard.model.topology import Topology
from stream_reshard.storage.torch_file import read_torch_file

_MUST_HAVE = {"base_lrs", "last_epoch"}


@dataclass(frozen=True)
class Schedule:
    """The state of a schedule."""

    numbers: Mapping[str, Any]
    """What belongs to the whole training, by key."""
    entries: Mapping[tuple[int, int], Mapping[str, Any]]
    """By (stage, index of the group in it), of each parameter or of all: its entries in the lists, by key."""

    @property
    def last_epoch(self) -> Any:
        """Steps that the schedule counts."""
        return self.numbers["last_epoch"]


def schedule_paths(topology: Topology, is_single: bool) -> dict[str, int]:
    """The stage that each file of the schedule describes."""
    if is_single:
        return {SINGLE_SCHEDULER_NAME: 0}
    return {scheduler_path(pp, tp, topology): pp for pp in range(topology.pp) for tp in range(topology.tp)}


def read_schedule(root: Path, paths: Mapping[str, int], num_groups: Sequence[int], max_nbytes: int,
                  problems: Problems) -> Schedule | None:
    """Read all files of a schedule, by their stages; every fault goes to `problems`. None where there is one.
    `num_groups`: groups of parameters of each stage."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    numbers: dict[str, Any] = {}
    num_before = len(problems)
    for path, stage in paths.items():
        file = problems.collect(read_torch_file, root, path, max_nbytes)
        if file is None:
            continue
        fault = _fault(file.contents, num_groups[stage])
        if fault is None and found:
            first, contents = found.get(stage) or next(iter(found.values()))
            own, other = (file.contents, contents) if stage in found else map(_numbers, (file.contents, contents))
            fault = next((f"{word(key)} is {quoted(own.get(key))}, and {quoted(other.get(key))} in {quoted(first)}"
                          for key in {**own, **other} if repr(own.get(key)) != repr(other.get(key))), None)
        if fault is not None:
            problems.append(SourceError(f"{quoted(path)}: {fault}", kind="files of the schedule are wrong"))
            continue
        numbers = numbers or _numbers(file.contents)
        found.setdefault(stage, (path, file.contents))
    if len(problems) > num_before:
        return None
    return Schedule(numbers, {place: entry for stage, (_, contents) in found.items()
                              for place, entry in _entries(stage, contents)})


def _fault(contents: Any, num_groups: int) -> str | None:
    """The fault of one file, if any."""
    if not isinstance(contents, dict) or not _MUST_HAVE <= contents.keys():
        return "it is no state of a schedule: base_lrs or last_epoch is missing"
    for key, value in contents.items():
        if isinstance(value, list) and len(value) != num_groups:
            return f"{word(key)} has {len(value)} entries, its stage has {num_groups} groups of parameters"
    if not isinstance(contents["base_lrs"], list) or type(contents["last_epoch"]) is not int:
        return "base_lrs is no list, or last_epoch no whole number"
    return None


def _numbers(contents: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in contents.items() if not isinstance(value, list)}


def _entries(stage: int, contents: Mapping[str, Any]) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    lists = {key: value for key, value in contents.items() if isinstance(value, list)}
    for index in range(len(lists["base_lrs"])):
        yield (stage, index), {key: value[index] for key, value in lists.items()}
