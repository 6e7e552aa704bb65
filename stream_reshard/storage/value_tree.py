"""Trees of values as a .pt file holds them: walked through without recursion, in bounded time."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stream_reshard.storage.torch_names import Name
from stream_reshard.storage.torch_values import StorageReference, TensorReference

MAX_DEPTH = 64
"""Values within values, at most: a state has some five."""


@dataclass(slots=True)
class _Walked:
    """A container that the walk is inside, or was."""

    items: Iterator[Any]
    """Of its values those that were not looked at."""
    count: int = 1
    """Values seen in it so far, itself and all below included."""
    height: int = 1
    """Containers within each other, itself included."""
    is_done: bool = False

    def add(self, other: _Walked) -> None:
        """Take a container for one of its values. Raises ValueError where the walk is still inside that one."""
        if not other.is_done:
            raise ValueError("one of its values contains itself")
        self.count += other.count
        self.height = max(self.height, other.height + 1)


def check_tree(value: Any, max_values: int) -> None:
    """Raises ValueError for what is no value of a state, is nested too deep, contains itself, or has too many values
    where what is shared counts each time: a few bytes can describe a tree that nobody can walk through."""
    seen: dict[int, _Walked] = {}
    inside = [_Walked(iter((value,)))]
    while inside:
        top = inside[-1]
        for item in top.items:
            if id(item) in seen:
                top.add(seen[id(item)])
            elif children := _children(item):
                seen[id(item)] = _Walked(iter(children))
                inside.append(seen[id(item)])
                break
            else:
                top.count += 1
        else:
            top.is_done = True
            inside.pop()
            if inside:
                inside[-1].add(top)
        if max(len(inside), top.height) > MAX_DEPTH + 1:
            raise ValueError(f"its values are nested more than {MAX_DEPTH} deep")
        if top.count > max_values:
            raise ValueError(f"its values repeat each other so often that they are more than {max_values}")


def _children(value: Any) -> list[Any]:
    """What a container contains but for plain values, which only count; raises ValueError for what is no value."""
    if isinstance(value, (StorageReference, Name)):
        what = f"the name {value}" if isinstance(value, Name) else "a storage without a tensor"
        raise ValueError(f"its pickle holds {what} as a value")
    if isinstance(value, dict):
        return [*value.values(), *(vars(value).values() if isinstance(value, OrderedDict) else ())]
    return list(value) if isinstance(value, (list, tuple)) else []


def tensors_in(contents: Any) -> Iterator[tuple[tuple[Any, ...], TensorReference]]:
    """The tensors in a tree of values, in its order, each with the keys and positions that lead to it."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), contents)]
    while waiting:
        keys, value = waiting.pop()
        if isinstance(value, TensorReference):
            yield keys, value
        elif isinstance(value, dict):
            waiting += [((*keys, key), item) for key, item in reversed(value.items())]
        elif isinstance(value, (list, tuple)):
            waiting += [((*keys, index), value[index]) for index in reversed(range(len(value)))]
