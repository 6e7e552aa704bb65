"""Source: a checkpoint opened for a conversion. Target: a format to be written, with its options."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from stream_reshard.errors import Problems
from stream_reshard.formats.layout import Layout
from stream_reshard.formats.unsupported import Unsupported
from stream_reshard.model.architectures import Family
from stream_reshard.model.parameters import Model, ModelConfig
from stream_reshard.storage.identity import Identity


@dataclass(frozen=True, kw_only=True)
class Described:
    """A checkpoint as its config describes it. Its weights may be refused: the other checks run nevertheless, so that a
    user sees all problems at once."""

    root: Path
    config_name: str
    """Name of the file that describes the model."""
    family: Family
    config: ModelConfig
    model: Model | None = None
    """The model; None where the weights are far from enough for it."""
    unsupported: tuple[Unsupported, ...]
    """Settings beyond `config` that change the forward pass."""
    notes: tuple[str, ...] = ()
    """Remarks about the checkpoint for the user."""
    rope_interleaved: bool = False
    """A Nanotron checkpoint stores heads as (pair, half), and keeps that at another topology."""
    config_class: str | None = None
    """Nanotron's config class; None where the checkpoint names none."""
    identities: Mapping[str, Identity] = field(default_factory=dict)
    """Identities of the configs, the index and the weight files, by path, each taken before the file was read."""
    router_dtype: str | None = None
    """The safetensors dtype of the MoE routers in the Hugging Face checkpoint; None where unknown. (Nanotron keeps
    routers in float32.)"""
    origin: Mapping[str, str] | None = None
    """Repository and commit on the hub that the folder is a snapshot of, where its cache shows them."""
    ids_are_known: bool = True
    """False where the token ids come from Nanotron's config, which has room for only one id per purpose."""
    recorded_vocab_size: int | None = None
    """Rows of the embedding without padding by the manifest; None where it does not say."""
    ignored: Mapping[str, str] | None = None
    """Stored tensors that hold no parameter, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Source(Described):
    """A checkpoint that can be converted: its config and its headers are read, and agree."""

    model: Model
    layout: Layout


class NextStep(NamedTuple):
    """A step that follows a conversion."""

    word: str
    place: str
    """Where the command is given, and what has to be done before."""
    command: str


OwnLayout = TypeVar("OwnLayout", bound=Layout)


class Target(ABC, Generic[OwnLayout]):
    """A format to be written, with its options."""

    marker: ClassVar[str]
    """The file whose presence makes a folder a checkpoint."""

    def taken(self, source: Source) -> Source:
        """The part of the source that goes into the target."""
        return source

    def unsupported(self, source: Described) -> Iterable[Unsupported]:
        """Settings of the source that this target cannot express."""
        return source.unsupported

    def notes(self, source: Source, layout: OwnLayout) -> Iterable[str]:
        """Remarks for the user about this target."""
        return ()

    def accepted_differences(self, layout: OwnLayout) -> Iterable[str]:
        """Names (as in `verify --allow`) of differences in the layout that the user has accepted."""
        return ()

    def problems(self, model: Model) -> Problems:
        """Options that do not fit the model."""
        return Problems()

    @abstractmethod
    def layout(self, root: Path, model: Model, dtypes: Callable[[int], str]) -> OwnLayout:
        """The layout of the files to be written below `root`."""

    @abstractmethod
    def documents(self, source: Source, layout: OwnLayout, dtype: str, destination: Path,
                  companions: Iterable[str]) -> dict[str, bytes]:
        """The documents, by name. `companions`: names of the companions that the destination gets."""

    def state(self, layout: OwnLayout) -> Any:
        """The training state that goes along; None where weights go alone."""
        return None

    def identities(self) -> Mapping[str, Identity]:
        """Identities of further files of the source, by path, each taken before the file was read."""
        return {}

    def copied(self) -> Mapping[str, Path]:
        """Files of the source that are copied as they are, by their new names."""
        return {}

    def held_nbytes(self, layout: OwnLayout) -> int:
        """Bytes of memory that large documents take; 0 where all documents are small."""
        return 0

    @abstractmethod
    def facts(self, layout: OwnLayout) -> dict[str, Any]:
        """Facts about the target, for JSON."""

    @abstractmethod
    def lines(self, layout: OwnLayout, facts: Mapping[str, Any]) -> Iterator[str]:
        """A table of the files for a person. `facts`: the result of the method `facts`."""

    @abstractmethod
    def next_step(self, destination: Path) -> NextStep:
        """The step that a user wants to take next."""


def routers(model: Model) -> list[range]:
    """Numbers of the MoE routers, which Nanotron keeps in float32, row by row."""
    return [model.numbers_of(index) for index, row in enumerate(model.rows) if row.is_float32]


def router_dtype_of(layout: Layout) -> str | None:
    """The safetensors dtype of all routers in a layout; None where they differ or there are none."""
    dtypes = {layout.dtype_at(number) for numbers in routers(layout.model) for number in numbers}
    return dtypes.pop() if len(dtypes) == 1 else None


def with_router_dtype(model: Model, dtypes: Callable[[int], str], router_dtype: str) -> Callable[[int], str]:
    """The dtype of each parameter by its number: `router_dtype` for routers, `dtypes` for all others."""
    numbers = routers(model)
    return partial(_dtype, numbers, router_dtype, dtypes) if numbers else dtypes


def _dtype(routers: Sequence[range], router_dtype: str, dtypes: Callable[[int], str], number: int) -> str:
    return router_dtype if any(number in numbers for numbers in routers) else dtypes(number)
