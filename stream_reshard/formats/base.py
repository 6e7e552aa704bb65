"""Source: a checkpoint opened to be converted. Target: a format, with everything that was chosen of it."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from stream_reshard.errors import Problems
from stream_reshard.formats.layout import Layout
from stream_reshard.formats.unsupported import Unsupported
from stream_reshard.model.architectures import Family
from stream_reshard.model.parameters import Model, ModelConfig
from stream_reshard.storage.identity import Identity


@dataclass(frozen=True, kw_only=True)
class Described:
    """A checkpoint as its config describes it, whether its weights can be opened or are refused: a user sees at once
    what else is wrong."""

    root: Path
    config_name: str
    """The file that says what the model is."""
    family: Family
    config: ModelConfig
    unsupported: tuple[Unsupported, ...]
    """Settings beyond `config` that change the forward pass."""
    notes: tuple[str, ...] = ()
    """Remarks about the checkpoint for the user."""
    rope_interleaved: bool = False
    """A head is kept as (pair, half)."""
    config_class: str | None = None
    """Nanotron's config class, where the checkpoint names one."""
    model: Model | None = None
    """The model that the config describes; None where the files beside it cannot be it."""
    identities: Mapping[str, Identity] = field(default_factory=dict)
    """Everything that says what the weights are, by path, as it was before it was read."""
    router_dtype: str | None = None
    """The safetensors dtype of MoE routers before Nanotron, which keeps them in float32; None where it is not known."""
    ids_are_known: bool = True
    """False where the token ids are no more than what Nanotron's config could hold of those of the model."""
    ignored: Mapping[str, str] | None = None
    """Stored tensors that hold no parameter, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Source(Described):
    """A checkpoint that can be converted: headers and configs are read, and make sense."""

    layout: Layout


OwnLayout = TypeVar("OwnLayout", bound=Layout)


class Target(ABC, Generic[OwnLayout]):
    """A format to be written, with its choices."""

    marker: ClassVar[str]
    """The file whose presence makes a folder a checkpoint."""

    def unsupported(self, source: Described) -> Iterable[Unsupported]:
        """Settings of the source that this target cannot express."""
        return source.unsupported

    def notes(self, source: Source, layout: OwnLayout) -> Iterable[str]:
        """Remarks about the choices for the user."""
        return ()

    def accepted_differences(self, layout: OwnLayout) -> Iterable[str]:
        """Names (as in `verify --allow`) of deviations in the layout that the user chose."""
        return ()

    @abstractmethod
    def problems(self, model: Model) -> Problems:
        """Every way in which the model cannot be cut as was chosen."""

    @abstractmethod
    def layout(self, root: Path, model: Model, dtypes: Callable[[int], str]) -> OwnLayout:
        """The layout of the files to be written below `root`."""

    @abstractmethod
    def documents(self, source: Source, layout: OwnLayout, dtype: str, destination: Path,
                  companions: Iterable[str]) -> dict[str, bytes]:
        """The small files beside the weights, by name; `companions` are copied there."""

    def held_nbytes(self, layout: OwnLayout) -> int:
        """Bytes of memory that the documents take, beyond a little."""
        return 0

    @abstractmethod
    def facts(self, layout: OwnLayout) -> dict[str, Any]:
        """The choices, for JSON."""

    @abstractmethod
    def lines(self, layout: OwnLayout, facts: Mapping[str, Any]) -> Iterator[str]:
        """A table of what goes where, for a person; `facts` are those above."""

    @abstractmethod
    def next_step(self, destination: Path) -> tuple[str, str]:
        """(word, command) that a user wants to run next."""


def routers(model: Model) -> list[range]:
    """Numbers of the parameters that Nanotron keeps in float32, row by row."""
    return [model.numbers_of(row) for row, own in enumerate(model.rows) if own.is_float32]


def router_dtype_of(layout: Layout) -> str | None:
    """The safetensors dtype that all routers have in a layout; None where they differ or there are none."""
    dtypes = {layout.dtype_at(number) for numbers in routers(layout.model) for number in numbers}
    return dtypes.pop() if len(dtypes) == 1 else None


def with_router_dtype(model: Model, dtypes: Callable[[int], str], own: str) -> Callable[[int], str]:
    """The same dtypes by number, but `own` for what Nanotron keeps in float32."""
    numbers = routers(model)
    return partial(_with_own, numbers, dtypes, own) if numbers else dtypes


def _with_own(numbers: Sequence[range], dtypes: Callable[[int], str], own: str, number: int) -> str:
    return own if any(number in part for part in numbers) else dtypes(number)
