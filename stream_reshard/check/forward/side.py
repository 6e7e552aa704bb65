"""Side: one of the two checkpoints, found and ready to be run; of whatever format. Nothing here needs torch."""
from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TYPE_CHECKING, cast

from stream_reshard.check.forward.hugging_face_config import CONFIG_NAME, HuggingFaceConfig, read_hugging_face_config
from stream_reshard.check.forward.hugging_face_tensors import HuggingFaceTensors
from stream_reshard.check.forward.nanotron_config import NanotronConfig, read_nanotron_config
from stream_reshard.check.forward.nanotron_tensors import NanotronTensors
from stream_reshard.destination.manifest import open_manifest
from stream_reshard.errors import Problems
from stream_reshard.formats.causes import no_checkpoint

if TYPE_CHECKING:
    from stream_reshard.check.forward.steps import Model
    from stream_reshard.check.forward.weights import Weights

MOVED_STAGES = "stages"
"""Name in a manifest, or in `allow`, for blocks on other stages than those of Nanotron's balancing."""


@dataclass(frozen=True)
class HuggingFaceSide:
    """A Hugging Face folder."""

    root: Path
    config: HuggingFaceConfig
    tensors: HuggingFaceTensors
    dtype: str
    """Dtype to which the weights were cast when they were converted; `keep` where nothing says so."""

    @property
    def vocab_size(self) -> int:
        """Rows of embedding and head without padding."""
        return self.config.vocab_size

    @property
    def title(self) -> str:
        """Description of the run, for people."""
        return "as transformers does"

    def model(self, weights: Weights) -> Model:
        """The model; imports torch."""
        from stream_reshard.check.forward.hugging_face import HuggingFaceModel
        return HuggingFaceModel(self.config, self.tensors, weights)


@dataclass(frozen=True)
class NanotronSide:
    """A Nanotron folder."""

    root: Path
    config: NanotronConfig
    tensors: NanotronTensors
    vocab_size: int | None
    """Rows of embedding and head without padding; None where nothing says it."""
    dtype: str
    """Dtype to which the weights were cast when they were converted; `keep` where nothing says so."""

    @property
    def title(self) -> str:
        """Description of the run, for people."""
        return f"as Nanotron's {self.tensors.num_tp} x {self.tensors.num_stages} ranks do (tp x pp)"

    def model(self, weights: Weights) -> Model:
        """The model; imports torch."""
        from stream_reshard.check.forward.nanotron import NanotronModel
        return NanotronModel(self.config, self.tensors, weights)


Side = HuggingFaceSide | NanotronSide


def open_side(root: Path, max_nbytes: int, allow: Collection[str] = ()) -> Side:
    """Read config and headers. No header or small file may have more than `max_nbytes`. Raises SourceError or Refused
    with everything that keeps the model from being run."""
    problems = Problems()
    side: Side | None = None
    manifest = problems.collect(open_manifest, root, max_nbytes)
    facts: Mapping[str, Any] = manifest.facts if manifest else {"vocab_size": None, "dtype": "keep", "allowed": ()}
    if (root / "model" / "model").is_dir():
        may_be_moved = MOVED_STAGES in {*allow, *facts["allowed"]}
        side = problems.collect(_open_nanotron, root, max_nbytes, problems, facts, may_be_moved)
    elif (root / CONFIG_NAME).is_file():
        side = problems.collect(_open_hugging_face, root, max_nbytes, problems, facts)
    else:
        problems.append(no_checkpoint(root))
    return cast(Side, problems.required(side))  # mypy joins the two to object.


def _open_hugging_face(root: Path, max_nbytes: int, problems: Problems, facts: Mapping[str, Any]) -> Side:
    config = read_hugging_face_config(root, problems, max_nbytes)
    tensors = HuggingFaceTensors(root, problems, max_nbytes)
    if not problems:
        tensors.find(config)
    return HuggingFaceSide(root, config, tensors, facts["dtype"])


def _open_nanotron(root: Path, max_nbytes: int, problems: Problems, facts: Mapping[str, Any],
                   may_be_moved: bool) -> Side:
    tensors = NanotronTensors(root, problems, max_nbytes)
    config = read_nanotron_config(root, tensors.version, problems, max_nbytes)
    if not problems:
        tensors.find(config, may_be_moved)
    return NanotronSide(root, config, tensors, facts["vocab_size"], facts["dtype"])
