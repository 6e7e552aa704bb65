"""Agreement of two checkpoints beyond their weights, and of one checkpoint with its own manifest."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.nanotron import MAX_LISTED
from stream_reshard.destination.manifest import MANIFEST_NAME, FileDone
from stream_reshard.errors import DifferenceError, quoted
from stream_reshard.formats.base import routers
from stream_reshard.formats.config_json_limits import QUANTIZATION
from stream_reshard.formats.nanotron.config import NEUTRAL
from stream_reshard.formats.nanotron.yaml_text import CONFIG_YAML
from stream_reshard.model.parameters import TOKEN_IDS, ModelConfig
from stream_reshard.options import ALLOWABLE
from stream_reshard.storage.dtypes import TORCH_DTYPES

_COMPARED_ELSEWHERE = {"vocab_size", "family", "unsaid_ids", "whole_num_hidden_layers", *TOKEN_IDS}
"""Fields of ModelConfig that are compared with the weights (padding, set of parameters) or as token ids."""

WITHOUT_EFFECT = (*TOKEN_IDS, "initializer_range")
"""Settings that change no forward pass; --allow accepts differences in them."""


@dataclass(frozen=True)
class Setting:
    """A setting in which the copy differs from the source."""

    name: str
    in_source: str
    """The source's value, as text."""
    in_copy: str | None
    """The copy's value, as text; None if the copy does not state it."""

    def text(self, copy: Checkpoint) -> str:
        """The name and both values."""
        return f"{self.name}: in the source: {self.in_source}; in {quoted(copy.root)}: {self.in_copy or 'not set'}"

    def difference(self, copy: Checkpoint) -> DifferenceError:
        """The setting as an error."""
        cure = f" (--allow {self.name} accepts it)" if self.name in {*ALLOWABLE, *NEUTRAL, *WITHOUT_EFFECT} else ""
        return DifferenceError(self.text(copy) + cure)


def setting_differences(source: Checkpoint, copy: Checkpoint) -> Iterator[Setting]:
    """Settings that differ and change the forward pass, or may."""
    for field in fields(ModelConfig):
        in_source, in_copy = getattr(source.config, field.name), getattr(copy.config, field.name)
        if in_source != in_copy and field.name not in _COMPARED_ELSEWHERE:
            yield Setting(field.name, quoted(in_source), None if field.name in copy.unsaid else quoted(in_copy))
    for name in sorted(source.extras.keys() | copy.extras.keys()):
        extra, copy_extra = source.extras.get(name), copy.extras.get(name)
        if name == QUANTIZATION and copy_extra is None:
            continue  # A source whose weights are quantised was refused: here only its config names the setting.
        if (extra and extra.value) != (copy_extra and copy_extra.value):
            yield Setting(name, extra.text if extra else "not set", copy_extra.text if copy_extra else None)


def vocabulary_difference(source: Checkpoint, copy: Checkpoint) -> Iterator[DifferenceError]:
    """An error if both folders state the size of the vocabulary and the sizes differ."""
    sizes = copy.vocab_size, source.vocab_size
    if None not in sizes and sizes[0] != sizes[1]:
        yield DifferenceError(f"the vocabulary has {sizes[0]} rows in {quoted(copy.root)}, {sizes[1]} in the source")


def parameter_differences(source: Checkpoint, copy: Checkpoint) -> Iterator[DifferenceError]:
    """An error for each parameter of only one checkpoint: the first MAX_LISTED, and the number of the rest."""
    for one, other in ((source, copy), (copy, source)):
        missing = [name for name in one.weights if name not in other.weights]
        for name in missing[:MAX_LISTED]:
            yield DifferenceError(f"{one.weights[name].parameter.hugging_face} is in {quoted(one.root)}, but not in "
                                  f"{quoted(other.root)}")
        if len(missing) > MAX_LISTED:
            yield DifferenceError(f"and {len(missing) - MAX_LISTED} more parameters are in {quoted(one.root)}, but not "
                                  f"in {quoted(other.root)}")


def dtype_differences(source: Checkpoint, copy: Checkpoint, cast_dtype: str | None,
                      is_cast: bool) -> Iterator[DifferenceError]:
    """Errors for dtypes in the copy that are not those of its own documents, or of Nanotron. `cast_dtype`: the dtype of
    a cast by the copy's manifest. The config of a copy that is not cast may repeat a wrong dtype of the source's."""
    router_numbers = routers(copy.model) if copy.is_nanotron else []
    for parameter in (copy.model.parameter(number) for numbers in router_numbers for number in numbers):
        if parameter.name in copy.weights and (dtype := copy.weights.dtype_of(parameter.name)) != "F32":
            yield DifferenceError(f"{parameter.hugging_face} has the dtype {dtype} in {quoted(copy.root)}, where "
                                  f"Nanotron has F32 (nanotron/nn/moe.py)")
    counts = Counter(map(copy.weights.dtype_of, copy.weights))
    if not counts:
        return
    stored = TORCH_DTYPES.get(most := max(counts, key=counts.__getitem__), most)
    if cast_dtype is not None and cast_dtype != stored:
        yield DifferenceError(f"{MANIFEST_NAME} states a cast of the weights to {quoted(cast_dtype)}, but they are "
                              f"stored in {stored}")
    if copy.dtype not in (None, stored) and (copy.dtype != source.dtype or is_cast):
        yield DifferenceError(f"config.json of {quoted(copy.root)} states the dtype {quoted(copy.dtype)}, in which "
                              f"transformers would load the weights, but they are stored in {stored}")


def digest_difference(root: Path, file: FileDone, digest: str | None) -> DifferenceError | None:
    """An error for a file with another size or digest than in the manifest; `digest` is None if that holds none."""
    nbytes = (root / file.path).stat().st_size
    if (nbytes, digest) == (file.nbytes, file.xxh3_128):
        return None
    hint = "; if you edited it, add --edited config.yaml" if file.path == CONFIG_YAML else ""
    return DifferenceError(f"{quoted(file.path)} has {nbytes} bytes of digest {digest}, {MANIFEST_NAME} has "
                           f"{file.nbytes} of {file.xxh3_128}{hint}")
