"""Names that are made from templates, such as `layers.{layer}.attention.q`, and the way back from a name.

A model of 100,000 tensors has a dozen templates. A name is looked up by its words, and its numbers say which instance
of a template it is, so no table of names is ever held. Instances count like the digits of a number: where a template
has the fields `layer` and `expert`, the last expert of a layer is followed by the first one of the next.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_FIELD = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,11})(?=\.|\Z)")
"""One spelling per number: `layers.07` is no layer."""


def fields_of(template: str) -> tuple[str, ...]:
    """The fields in braces, each of them a whole word between dots: ("layer",)."""
    return tuple(_FIELD.findall(template))


def indices_of(template: str, extents: Mapping[str, int], instance: int) -> dict[str, int]:
    """The number of each field in an instance of a template. `extents`: how many numbers each field takes."""
    indices = {}
    for field in reversed(fields_of(template)):
        instance, indices[field] = divmod(instance, extents[field])
    return indices


class Templates:
    """The way back from names to templates."""

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
