"""The values of an optimizer file: read, checked, and taken apart into one entry per parameter.

The format (`torch.save` of `state_dict()`, nanotron/optim/gradient_accumulator.py, zero.py, named_optimizer.py)::

    {"state": {i: {"step": [], "exp_avg": T, "exp_avg_sq": T}}, "param_groups": [{..., "params": [i]}, ...],
     "names": {i: name}, "gradient_accumulator": {name: T}}

One group per parameter of the stage, in its order; release 0.4 has one for all of them. A rank of ZeRO has no state of
a parameter that is empty on it; the group then has no params, and the ids of the parameters behind it move up.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stream_reshard.errors import quoted
from stream_reshard.formats.nanotron.training.layout import MASTERS
from stream_reshard.storage.torch_file import TorchFile
from stream_reshard.storage.torch_values import TensorReference
from stream_reshard.storage.value_tree import tensors_in

NOT_NANOTRONS = "files of the optimizer are not as Nanotron saves them"

_KIND = re.compile(r"[A-Za-z_]{1,40}", re.ASCII)
"""Name of a kind of state."""

_KEYS = ("state", "param_groups", "names")

GROUP, STATE = "param_groups", "state"
"""Places of scalars."""

Shape = tuple[int, ...] | None
"""Shape of a parameter's states in a file; None where the file holds none of them."""


@dataclass(frozen=True)
class Entry:
    """All that an optimizer keeps of one parameter beside the values of its states."""

    name: str
    """Name of the parameter in Nanotron."""
    group: Mapping[str, Any]
    """The settings of its group."""
    state: Mapping[str, Any]
    """Its states in their order: a TensorReference for a tensor of its shape or for a scalar, or a plain value."""
    scalars: Mapping[tuple[str, str], bytes]
    """The bytes of the tensors of no dims, by (GROUP or STATE, key)."""
    dtypes: Mapping[str, str]
    """The safetensors dtype of each kind of state, masters included."""


def kinds_of(entry: Entry) -> tuple[str, ...]:
    """The kinds of state, masters last."""
    return tuple(entry.dtypes)


def names_in(file: TorchFile) -> list[str]:
    """The names of the parameters whose states a file holds, in its order. Raises ValueError, in words."""
    contents = _dict_of(file.contents, "it")
    for key in _KEYS:
        if key not in contents:
            raise ValueError(f"its values have no {key}")
    if unknown := contents.keys() - {*_KEYS, MASTERS}:
        raise ValueError(f"it holds {quoted(sorted(map(str, unknown))[0])}, which is not known here")
    names = _dict_of(contents["names"], "names")
    if list(names) != list(range(len(names))) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError("its names are not numbered 0, 1, 2 ...")
    if len(set(names.values())) != len(names):
        raise ValueError("a parameter is named twice")
    return list(names.values())


def check_values(file: TorchFile, shapes: Mapping[str, Shape]) -> None:
    """Compare a file with the parameters of its stage, in their order. Raises ValueError, in words."""
    names, held = names_in(file), [name for name, shape in shapes.items() if shape is not None]
    if not names and held:
        raise ValueError("it holds no state: it was saved before the first step, and Nanotron's loader refuses it; "
                         "move the weights alone with --weights-only")
    if names != held:
        missing = [name for name in held if name not in names] or [name for name in names if name not in shapes]
        raise ValueError(f"it holds the states of {len(names)} parameters, its rank has {len(held)}" + (
            f"; {quoted(missing[0])} is not in both" if missing else ", in another order"))
    contents = file.contents
    if list(_dict_of(contents["state"], "state")) != list(range(len(names))):
        raise ValueError(f"it has {len(contents['state'])} states for {len(names)} names")
    _check_groups(contents["param_groups"], shapes)
    for number, name in enumerate(names):
        _check_states(name, dict(_tensors(file, number, name)), shapes[name] or ())
    masters = contents.get(MASTERS)
    if masters is not None and list(_dict_of(masters, MASTERS)) != names:
        raise ValueError(f"its {MASTERS} is not of the parameters that it names")


def entries_of(file: TorchFile, read: Callable[[int, int], bytes]) -> Iterator[Entry]:
    """The entries of a file that holds a state of every parameter of its stage; `read` gives (offset, nbytes) of it."""
    contents, is_single = file.contents, has_one_group(file)
    for number, name in enumerate(contents["names"].values()):
        state = contents["state"][number]
        dtypes = {kind: tensor.dtype for kind, tensor in _tensors(file, number, name)}
        group = contents["param_groups"][0 if is_single else number]
        scalars = {place: read(file.begin_of(value), value.itemsize)
                   for place, value in scalars_in(group, state) if is_scalar(value)}
        yield Entry(name, group, state, scalars, dtypes)


def scalars_in(group: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Any]]:
    """((place, key), value) of all settings and states; an optimizer that runs in a graph of CUDA has tensors there."""
    yield from (((GROUP, key), value) for key, value in group.items())
    yield from (((STATE, key), value) for key, value in state.items())


def has_one_group(file: TorchFile) -> bool:
    """True for a file with one group for all its parameters."""
    groups = file.contents["param_groups"]
    return len(groups) == 1 and len(groups[0]["params"]) > 1


def is_scalar(value: Any) -> bool:
    """True for a tensor of no dims, such as the count of steps."""
    return isinstance(value, TensorReference) and not value.shape


def begins_of(file: TorchFile, shapes: Mapping[str, Shape], kinds: Sequence[str]) -> Iterator[int]:
    """Offset of each kind of state of each parameter of the stage; 0 where the file does not hold it."""
    numbers = {name: number for number, name in file.contents["names"].items()}
    for name in shapes:
        tensors = dict(_tensors(file, numbers[name], name)) if name in numbers else {}
        yield from (file.begin_of(tensors[kind]) if kind in tensors else 0 for kind in kinds)


def dtypes_in(file: TorchFile) -> dict[str, dict[str, str]]:
    """The dtype of each kind of state, by the name of the parameter."""
    return {name: {kind: tensor.dtype for kind, tensor in _tensors(file, number, name)}
            for number, name in file.contents["names"].items()}


def _tensors(file: TorchFile, number: int, name: str) -> Iterator[tuple[str, TensorReference]]:
    """(kind, tensor) of one parameter, masters last. Raises ValueError, in words."""
    for key, value in _dict_of(file.contents["state"][number], f"the state of {quoted(name)}").items():
        if isinstance(value, TensorReference) and not is_scalar(value):
            if not isinstance(key, str) or not _KIND.fullmatch(key) or key == MASTERS:
                raise ValueError(f"the state of {quoted(name)} has the name {quoted(key)}")
            yield key, value
        elif not is_scalar(value) and any(tensors_in(value)):
            raise ValueError(f"the state {quoted(key)} of {quoted(name)} holds tensors within other values")
    if MASTERS in file.contents:
        master = _dict_of(file.contents[MASTERS], MASTERS).get(name)
        if not isinstance(master, TensorReference):
            raise ValueError(f"it has no master of {quoted(name)}")
        yield MASTERS, master


def _check_states(name: str, tensors: Mapping[str, TensorReference], shape: tuple[int, ...]) -> None:
    if not tensors:
        raise ValueError(f"it has no state of {quoted(name)}")
    for kind, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{kind} of {quoted(name)} has the shape {tensor.shape}, its rank has {shape}")
        if not tensor.is_contiguous:
            raise ValueError(f"{kind} of {quoted(name)} has the strides {tensor.strides}, which Nanotron does not "
                             f"save")


def _check_groups(groups: Any, shapes: Mapping[str, Shape]) -> None:
    """Raises ValueError, in words, unless there is one group per parameter, with the next id or none, or one for all
    parameters."""
    for group in groups if isinstance(groups, list) else ():
        for key, value in _dict_of(group, "a group").items():
            if not is_scalar(value) and any(tensors_in(value)):
                raise ValueError(f"the setting {quoted(key)} of a group is a tensor or holds some, not one number")
    num_held = sum(shape is not None for shape in shapes.values())
    if isinstance(groups, list) and len(groups) == 1 and _dict_of(groups[0], "a group").get("params") == [
            *range(num_held)]:
        return
    if not isinstance(groups, list) or len(groups) != len(shapes):
        raise ValueError(f"it has {len(groups) if isinstance(groups, list) else 'no list of'} groups, Nanotron makes "
                         f"one for each of the {len(shapes)} parameters of a stage")
    number = 0
    for group, (name, shape) in zip(groups, shapes.items()):
        params = _dict_of(group, "a group").get("params")
        if params != ([] if shape is None else [number]):
            raise ValueError(f"the group of {quoted(name)} has the parameters {quoted(params)}, its place gives it "
                             f"{[] if shape is None else [number]}")
        number += shape is not None


def _dict_of(value: Any, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}, not a dict")
    return value
