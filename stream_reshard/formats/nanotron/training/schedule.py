"""The state of the learning rate: files of the scheduler of one checkpoint, made into those of another topology.

A scheduler's file is the `state_dict` of torch's LambdaLR. It has one entry per parameter of its stage in some lists,
all else is the same in every stage. Neither tensor nor data parallelism changes it.

A trainer of Nanotron that resumes goes one step further in the schedule than the training was (`load_lr_scheduler`,
nanotron/serialize/optimizer.py), and takes the present learning rate for the initial one (`lr_scheduler_builder`,
nanotron/helpers.py). The exact schedule makes up for both in advance.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from itertools import chain
from typing import Any

from stream_reshard.errors import SourceError, quoted
from stream_reshard.storage.torch_file import TorchFile

_RATES = "_last_lr"
"""List of the learning rates of the last step."""

_PER_PARAMETER = ("base_lrs", _RATES)
"""Lists that every scheduler's file has."""


def check_schedules(files: Sequence[TorchFile], names: Sequence[Sequence[str]]) -> None:
    """Raises SourceError for files that are not of one schedule, or not of these stages; see `moved_schedule`."""
    for file, stage in zip(files, names):
        _check(file, len(stage))
    for file, stage in zip(files[1:], names[1:]):
        _check_same(files[0], len(names[0]), file, len(stage))


def moved_schedule(files: Sequence[TorchFile], names: Sequence[Sequence[str]], new_names: Sequence[Sequence[str]]
                   ) -> list[dict[str, Any]]:
    """The contents of the scheduler's file of each new stage.

    `files`: one of each stage of the source, or only that of the first, as trees before September 2024 save; `names`,
    `new_names`: the parameters of each stage in their order. Entries go with their parameter; all other values stay the
    objects that they are, as a pickle writes what is one object once. Raises SourceError.
    """
    check_schedules(files, names)
    first, num_first = files[0].contents, len(names[0])
    keys = [key for key, value in first.items() if _is_per_parameter(value, num_first)]
    entries = {key: _entries(key, files, names) for key in keys}
    # A copy of a dict, where a parameter is in two stages: in each it is an object of its own.
    return [{key: [copy(entries[key][name]) for name in stage] if key in entries else value
             for key, value in first.items()} for stage in new_names]


def exact_schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a scheduler's file with which Nanotron goes on at the very step, with `exact_group`."""
    return {**state, "last_epoch": state["last_epoch"] - 1}


def exact_group(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A group of an optimizer's file with which Nanotron makes the schedule that it had; `where` names the file. Raises
    SourceError."""
    if "initial_lr" not in group:
        raise SourceError(f"{where}: a group of parameters has no initial_lr, from which --schedule exact starts; take "
                          f"--schedule saved")
    return {**group, "lr": group["initial_lr"]}


def saved_schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    """The contents from which `exact_schedule` made these."""
    return {**state, "last_epoch": state["last_epoch"] + 1}


def saved_group(group: Mapping[str, Any], rate: Any) -> dict[str, Any]:
    """The group from which `exact_group` made this one; `rate`: its learning rate in `rates_of`."""
    return {**group, "lr": rate}


def rates_of(files: Sequence[TorchFile], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The learning rate of the last step by the name of the parameter. Raises SourceError."""
    return _entries(_RATES, files, names)


def schedule_of(state: Mapping[str, Any], groups: Iterable[Mapping[str, Any]], num_steps: int) -> str:
    """"exact" or "saved": the kind of schedule in a scheduler's file and the groups beside it, after so many steps. A
    trainer saves the learning rate of each group in both files, and is never behind the steps that are done."""
    groups = list(groups)
    is_exact = all(group.get("lr") == group.get("initial_lr") for group in groups) and (
        state["last_epoch"] < num_steps or any(
            group.get("lr") != rate for group, rate in zip(groups, state[_RATES])))
    return "exact" if is_exact else "saved"


def _is_per_parameter(value: Any, num_parameters: int) -> bool:
    return isinstance(value, list) and len(value) == num_parameters


def _check(file: TorchFile, num_parameters: int) -> None:
    """Raises SourceError for contents that are no scheduler's state of so many parameters."""
    where, state = quoted(file.path), file.contents
    if not isinstance(state, dict) or type(state.get("last_epoch")) is not int:
        raise SourceError(f"{where} holds no state of a scheduler of learning rates: it has no last_epoch")
    for key in _PER_PARAMETER:
        if not _is_per_parameter(value := state.get(key), num_parameters):
            found = f"{len(value)} entries" if isinstance(value, list) else f"a {type(value).__name__}"
            raise SourceError(f"{where}: {key} has {found}, its stage has {num_parameters} parameters; restore the "
                              f"file that was saved with this checkpoint")


def _check_same(first: TorchFile, num_first: int, other: TorchFile, num_other: int) -> None:
    """Raises SourceError where two stages differ in more than their parameters."""
    for key in {**first.contents, **other.contents}:
        here, there = first.contents.get(key), other.contents.get(key)
        is_same = (type(here) is type(there) and _is_per_parameter(there, num_other)
                   if _is_per_parameter(here, num_first) else here == there)
        if not is_same:
            raise SourceError(f"{quoted(first.path)} and {quoted(other.path)} are of different schedules: "
                              f"{quoted(key)} is {quoted(here)} and {quoted(there)}; restore the files of one step")


def _entries(key: str, files: Sequence[TorchFile], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The entry of each parameter in a list; a tied one, which two stages have, has the same in both."""
    values = [file.contents[key] for file in files]
    found = dict(zip(chain(*names[:len(files)]), chain(*values)))
    for name in chain(*names[len(files):]):
        if name not in found:
            if any(value != values[0][0] for value in values[0]):
                raise SourceError(f"{quoted(files[0].path)} is of the first stage alone, and its {quoted(key)} differ: "
                                  f"what {quoted(name)} has is not known; --weights-only goes without the training")
            found[name] = values[0][0]
    return found
