"""The optimizer's file of one rank, checked against the parameters that Nanotron gives the rank.

Nanotron compares `names` as a set only, and neither shapes nor the order of states (nanotron/optim/named_optimizer.py,
optim/base.py): what is wrong here, it loads without a word.
"""
from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stream_reshard.check.weights.states.names import word
from stream_reshard.errors import SourceError, quoted
from stream_reshard.storage.source_file import SourceFile
from stream_reshard.storage.torch_file import TorchFile, read_torch_file
from stream_reshard.storage.torch_values import TensorReference

MASTERS = "master"
"""Kind of the float32 weights that the optimizer steps on."""

_ACCUMULATOR = "gradient_accumulator"
"""Key of the masters in a file."""

_KEYS = {"state", "param_groups", "names"}

_NUMBERS = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}

PREFIX = "model."
"""Beginning of the names in a file."""


class Held(NamedTuple):
    """A parameter that a rank holds, as the file must have it."""

    name: str
    """Below `model.`."""
    shape: tuple[int, ...]
    """Of the moments: that of the shard, or of the flat stretch."""


@dataclass(frozen=True)
class RankFile:
    """Facts kept of one file."""

    path: str
    names: tuple[str, ...]
    """The parameters with a state, by id. Ranks with the same parameters share one object."""
    begins: Mapping[str, array[int]]
    """Per kind, the first byte of each tensor."""
    dtypes: Mapping[str, tuple[str, ...]]
    """Per kind, the dtype of each tensor; shared as `names` is."""
    groups: tuple[Mapping[str, Any], ...]
    """The settings of each parameter of the stage, with a state or not; shared."""
    has_one_group: bool
    """One group holds all parameters, as release 0.4 saves them."""
    step: float | None
    """Steps of the optimizer; None where the file holds no state."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of state: moments by their keys, and masters."""
        return tuple(self.begins)


def read_rank_file(root: Path, path: str, stage: Sequence[str], held: Sequence[Held | None], max_nbytes: int,
                   common: dict[Any, Any]) -> RankFile:
    """Read a file of a rank that holds, of each parameter of `stage`, what `held` says; None for an empty stretch.
    `common` makes equal values of many files one object. Raises SourceError with the first fault."""
    file = read_torch_file(root, path, max_nbytes)
    for fault in _form_faults(file.contents):
        raise SourceError(f"{quoted(path)}: {fault}")
    present = [one for one in held if one is not None]
    for fault in (*_place_faults(file.contents, stage, held), *_tensor_faults(file.contents, present)):
        raise SourceError(f"{quoted(path)}: {fault}")
    tensors = _tensors(file.contents, present)
    with SourceFile(root, path) as opened:
        steps = {_number(opened, file, state["step"]) for state in file.contents["state"].values()}
        groups = tuple(_settings(opened, file, group, common) for group in file.contents["param_groups"])
    if has_one_group := len(groups) < len(stage):
        groups *= len(stage)
    if len(steps) > 1:
        raise SourceError(f"{quoted(path)}: its parameters are of several steps: {', '.join(map(str, sorted(steps)))}")

    def once(value: Any) -> Any:
        return common.setdefault(value, value)

    return RankFile(path, once(tuple(one.name for one in present)),
                    {kind: array("q", map(file.begin_of, of_kind)) for kind, of_kind in tensors.items()},
                    {kind: once(tuple(tensor.dtype for tensor in of_kind)) for kind, of_kind in tensors.items()},
                    once(groups), has_one_group, steps.pop() if steps else None)


def _form_faults(contents: Any) -> Iterator[str]:
    """Faults of the containers, before anything in them is looked at."""
    keys = contents.keys() if isinstance(contents, dict) else ()
    if not keys or not _KEYS <= keys <= _KEYS | {_ACCUMULATOR}:
        yield (f"it holds {quoted(sorted(map(str, keys)))}, where the state of Nanotron's optimizer has names, "
               f"param_groups, state and perhaps {_ACCUMULATOR}")
        return
    state, groups = contents["state"], contents["param_groups"]
    is_whole = (isinstance(state, dict) and all(isinstance(one, dict) and "step" in one for one in state.values())
                and isinstance(groups, list) and all(isinstance(one, dict) and isinstance(one.get("params"), list)
                                                     for one in groups)
                and isinstance(contents["names"], dict) and isinstance(contents.get(_ACCUMULATOR, {}), dict))
    if not is_whole:
        yield "its state, param_groups, names or gradient_accumulator are no dicts and lists as Nanotron saves"
    elif len({frozenset(one) for one in state.values()}) > 1:
        yield "its parameters have states of several kinds"
    elif odd := [kind for one in state.values() for kind in one if word(kind) != kind or kind == MASTERS]:
        yield f"it has a state of the kind {quoted(odd[0])}, which no optimizer of Nanotron keeps"


def _place_faults(contents: Mapping[str, Any], stage: Sequence[str], held: Sequence[Held | None]) -> Iterator[str]:
    """Faults of ids, names and groups: which state is whose."""
    names, groups = contents["names"], contents["param_groups"]
    wanted = [f"{PREFIX}{one.name}" for one in held if one is not None]
    if not contents["state"] and not names and wanted:
        yield "it holds no state of any parameter: no step was done before it was saved, and Nanotron cannot resume it"
        return
    has_one_group = len(groups) == 1 and groups[0]["params"] == list(range(len(wanted)))
    if len(groups) != len(stage) and not has_one_group:
        yield f"it has {len(groups)} param_groups, one for each of the {len(stage)} parameters of its stage is needed"
        return
    for number, name in enumerate(wanted):
        if names.get(number) != name:
            yield (f"its state {number} is that of {quoted(names.get(number))}, but Nanotron gives it to "
                   f"{quoted(name)}, as it goes by position")
            return
    for key, ids in (("state", contents["state"]), ("names", names)):
        if list(ids) != list(range(len(wanted))):
            yield f"{key} has the ids {quoted(list(ids)[:9])}, not 0 to {len(wanted) - 1}"
    number = 0
    for name, one, group in zip(stage, held, () if has_one_group else groups):
        ids = [number] if one is not None else []
        if group["params"] != ids:
            yield f"the params of {quoted(PREFIX + name)} in param_groups are {quoted(group['params'][:9])}, not {ids}"
            return
        number += len(ids)
    if _ACCUMULATOR in contents and contents[_ACCUMULATOR].keys() != set(wanted):
        other = min(contents[_ACCUMULATOR].keys() ^ set(wanted), key=str)
        yield f"{quoted(other)} has a state or a master, but not both"


def _tensors(contents: Mapping[str, Any], held: Sequence[Held]) -> dict[str, list[Any]]:
    """Per kind, the tensor of each parameter."""
    states = list(contents["state"].values())
    found = {kind: [state[kind] for state in states] for kind in (states[0] if states else ()) if kind != "step"}
    if _ACCUMULATOR in contents:
        found[MASTERS] = [contents[_ACCUMULATOR][f"{PREFIX}{one.name}"] for one in held]
    return found


def _tensor_faults(contents: Mapping[str, Any], held: Sequence[Held]) -> Iterator[str]:
    """Faults of shapes and dtypes."""
    masters = contents.get(_ACCUMULATOR)
    if len(contents["state"]) != len(held) or (masters is not None and len(masters) != len(held)):
        return  # Told already.
    for kind, of_kind in _tensors(contents, held).items():
        for one, tensor in zip(held, of_kind):
            if not isinstance(tensor, TensorReference):
                yield f"{kind} of {quoted(one.name)} is a {type(tensor).__name__}, not a tensor"
            elif tensor.shape != one.shape or not tensor.is_contiguous:
                yield (f"{kind} of {quoted(one.name)} has the shape {tensor.shape}, this rank needs {one.shape}"
                       if tensor.shape != one.shape else
                       f"{kind} of {quoted(one.name)} is not in one piece: strides {tensor.strides}")
            elif kind == MASTERS and tensor.dtype != "F32":
                yield f"{kind} of {quoted(one.name)} has the dtype {tensor.dtype}, where Nanotron has F32"


def _number(opened: SourceFile, file: TorchFile, value: Any) -> float:
    """A number, or that in a tensor of one element."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, TensorReference) or value.num_elements != 1 or value.dtype not in _NUMBERS:
        raise SourceError(f"{quoted(file.path)}: a step or setting is no number")
    return float(struct.unpack(_NUMBERS[value.dtype], opened.read(file.begin_of(value), value.itemsize))[0])


class _Shared(dict[str, Any]):
    """Settings that are compared, and found again, by their text."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(self))

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)


def _settings(opened: SourceFile, file: TorchFile, group: Mapping[str, Any], common: dict[Any, Any]) -> _Shared:
    """The settings of a parameter in its group, without its id."""
    settings = _Shared((key, _number(opened, file, value) if isinstance(value, TensorReference) else value)
                       for key, value in group.items() if key != "params")
    shared: _Shared = common.setdefault(settings, settings)
    return shared
