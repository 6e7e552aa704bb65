"""Agreement of two checkpoints beyond their weights, and of one checkpoint with its own manifest."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from stream_reshard.check.weights.checkpoint import Checkpoint
from stream_reshard.check.weights.files import CONFIG_YAML
from stream_reshard.check.weights.nanotron import MAX_LISTED
from stream_reshard.destination.manifest import MANIFEST_NAME, FileDone
from stream_reshard.errors import DifferenceError, quoted
from stream_reshard.formats.hugging_face.unsupported import QUANTIZATION
from stream_reshard.formats.nanotron.config import NEUTRAL
from stream_reshard.model.parameters import TOKEN_IDS, ModelConfig
from stream_reshard.options import ALLOWABLE
from stream_reshard.storage.dtypes import TORCH_DTYPES

_SETTLED_ELSEWHERE = {"vocab_size", "family", "unsaid_ids", *TOKEN_IDS}
"""Fields of ModelConfig that are compared through the weights (padding, and which parameters there are) or as token
ids."""

WITHOUT_EFFECT = (*TOKEN_IDS, "initializer_range")
"""Settings that change no forward pass, which may be allowed to differ."""


@dataclass(frozen=True)
class Setting:
    """A setting in which the copy differs from the source."""

    name: str
    theirs: str
    """The source's value, as text."""
    mine: str | None
    """The copy's value, as text; None where the copy does not state it."""

    def difference(self, copy: Checkpoint) -> DifferenceError:
        """The setting as an error."""
        cure = (f" (--allow {self.name} accepts it)" if self.name in {*ALLOWABLE, *NEUTRAL, *WITHOUT_EFFECT} else "")
        return DifferenceError(f"{self.name}: the source says: {self.theirs}; {quoted(copy.root)} says: "
                               f"{self.mine or 'nothing'}{cure}")


def setting_differences(source: Checkpoint, copy: Checkpoint) -> Iterator[Setting]:
    """Settings in which two checkpoints of one model would compute different things."""
    for field in fields(ModelConfig):
        mine, theirs = getattr(copy.config, field.name), getattr(source.config, field.name)
        if mine != theirs and field.name not in _SETTLED_ELSEWHERE:
            yield Setting(field.name, quoted(theirs), None if field.name in copy.unsaid else quoted(mine))
    for name in sorted(source.extras.keys() | copy.extras.keys()):
        own, other = copy.extras.get(name), source.extras.get(name)
        if name == QUANTIZATION and own is None:
            continue  # The source says it of weights that are not quantised, else they would not be here.
        if (own and own.value) != (other and other.value):
            yield Setting(name, other.text if other else "nothing", own.text if own else None)


def vocabulary_difference(source: Checkpoint, copy: Checkpoint) -> Iterator[DifferenceError]:
    """An error where both folders state the size of the vocabulary and the sizes differ."""
    mine, theirs = copy.vocab_size, source.vocab_size
    if None not in (mine, theirs) and mine != theirs:
        yield DifferenceError(f"the vocabulary has {mine} rows in {quoted(copy.root)}, {theirs} in the source")


def parameter_differences(source: Checkpoint, copy: Checkpoint) -> Iterator[DifferenceError]:
    """Parameters that only one of the two has: the first few, and the number of the rest."""
    for one, other in ((source, copy), (copy, source)):
        missing = [name for name in one.weights if name not in other.weights]
        for name in missing[:MAX_LISTED]:
            yield DifferenceError(f"{one.weights[name].parameter.hugging_face} is in {quoted(one.root)}, but not in "
                                  f"{quoted(other.root)}")
        if len(missing) > MAX_LISTED:
            yield DifferenceError(f"and {len(missing) - MAX_LISTED} more parameters are in {quoted(one.root)}, but not "
                                  f"in {quoted(other.root)}")


def dtype_differences(source: Checkpoint, copy: Checkpoint, told: str | None,
                      is_cast: bool) -> Iterator[DifferenceError]:
    """Errors for dtypes in the copy that are not those of its own documents, or of Nanotron. `told`: the dtype that its
    manifest says the weights were cast to. The config of a copy that is not cast may repeat a wrong one of the
    source."""
    model, counts = copy.model, Counter(map(copy.weights.dtype_of, copy.weights))
    float32 = [parameter.name for parameter in (model.parameter(number) for row, _ in enumerate(model.rows)
               if model.rows[row].is_float32 for number in model.numbers_of(row))]
    for name in filter(copy.weights.__contains__, float32):
        if copy.is_nanotron and (dtype := copy.weights.dtype_of(name)) != "F32":
            yield DifferenceError(f"{copy.weights[name].parameter.hugging_face} has the dtype {dtype} in "
                                  f"{quoted(copy.root)}, where Nanotron has F32 (nanotron/nn/moe.py)")
    if not counts:
        return
    stored = TORCH_DTYPES.get(most := max(counts, key=counts.__getitem__), most)
    if told is not None and told != stored:
        yield DifferenceError(f"{MANIFEST_NAME} says that the weights were cast to {quoted(told)}, but they are stored "
                              f"in {stored}")
    if copy.dtype not in (None, stored) and (copy.dtype != source.dtype or is_cast):
        yield DifferenceError(f"config.json of {quoted(copy.root)} says the dtype {quoted(copy.dtype)}, in which "
                              f"transformers then loads the weights, but they are stored in {stored}")


def digest_difference(root: Path, file: FileDone, digest: str | None) -> DifferenceError | None:
    """A difference where size or digest of a file is not the manifest's; `digest` is None where that has none."""
    nbytes = (root / file.path).stat().st_size
    if (nbytes, digest) == (file.nbytes, file.xxh3_128):
        return None
    hint = "; if you edited it, say so with --edited" if file.path == CONFIG_YAML else ""
    return DifferenceError(f"{quoted(file.path)} has {nbytes} bytes of digest {digest}, {MANIFEST_NAME} says "
                           f"{file.nbytes} of {file.xxh3_128}{hint}")
