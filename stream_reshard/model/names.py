"""Names made from templates such as `layers.{layer}.attention.q`, and the template of a name.

A model of 100,000 tensors has a dozen templates. The words of a name give its template, and its numbers give the
instance of the template, so no table of names is kept in memory. Instances are counted as digits are: in a template
with the fields `layer` and `expert`, the last expert of a layer is followed by the first expert of the next layer.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_FIELD = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,11})(?=\.|\Z)")
"""A number in a name, without leading zeros: `layers.07` is no layer."""


def fields_of(template: str) -> tuple[str, ...]:
    """The fields of a template, such as ("layer",). A field stands in braces and is a whole word between dots."""
    return tuple(_FIELD.findall(template))


def indices_of(template: str, extents: Mapping[str, int], instance: int) -> dict[str, int]:
    """The number of each field in an instance of a template. `extents`: the count of numbers of each field."""
    indices = {}
    for field in reversed(fields_of(template)):
        instance, indices[field] = divmod(instance, extents[field])
    return indices


class Templates:
    """Finds the template of a name."""

    def __init__(self, templates: Sequence[str], extents: Mapping[str, int]):
        self._extents = [tuple(extents[field] for field in fields_of(template)) for template in templates]
        self._by_words = {tuple(re.split(r"\.\{\w+\}", template)): i for i, template in enumerate(templates)}
        assert len(self._by_words) == len(templates), "two templates make the same names"

    def find(self, name: str) -> tuple[int, int] | None:
        """(index of the template, instance) of a name; None where no template makes it."""
        pieces = _NUMBER.split(name)
        index = self._by_words.get(tuple(pieces[::2]))
        if index is None:
            return None
        instance = 0
        for text, extent in zip(pieces[1::2], self._extents[index]):
            if (number := int(text)) >= extent:
                return None
            instance = instance * extent + number
        return index, instance
