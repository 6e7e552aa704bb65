"""Side: one of the two checkpoints, of either format, ready to be run; imports no torch."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TYPE_CHECKING

from stream_reshard.check.forward.hugging_face_config import CONFIG_NAME, HuggingFaceConfig, read_hugging_face_config
from stream_reshard.check.forward.hugging_face_tensors import HuggingFaceTensors
from stream_reshard.check.forward.nanotron_config import NanotronConfig, read_nanotron_config
from stream_reshard.check.forward.nanotron_tensors import NanotronTensors
from stream_reshard.destination.manifest import open_manifest
from stream_reshard.errors import Problems, SourceError, quoted
from stream_reshard.formats.causes import no_checkpoint
from stream_reshard.model.truncation import WHOLE

if TYPE_CHECKING:
    from stream_reshard.check.forward.steps import Model
    from stream_reshard.check.forward.weights import Weights

MOVED_STAGES = "stages"
"""Name, in a manifest or in `allow`, of blocks on other stages than in Nanotron's balancing."""


@dataclass(frozen=True)
class Side(ABC):
    """A folder of either format."""

    root: Path
    config: HuggingFaceConfig | NanotronConfig
    tensors: HuggingFaceTensors | NanotronTensors
    vocab_size: int | None
    """Rows of embedding and head without padding; None if no manifest states them."""
    dtype: str
    """Dtype to which the conversion cast the weights; `keep` if no manifest names one."""
    whole_num_layers: int | None
    """Number of layers of the whole model, if the folder is marked as its first ones."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Description of the forward pass, for people."""

    @abstractmethod
    def model(self, weights: Weights) -> Model:
        """The model to run; imports torch."""


class HuggingFaceSide(Side):
    """A Hugging Face folder."""

    config: HuggingFaceConfig
    tensors: HuggingFaceTensors

    @property
    def title(self) -> str:
        return "as transformers does"

    def model(self, weights: Weights) -> Model:
        from stream_reshard.check.forward.hugging_face import HuggingFaceModel
        return HuggingFaceModel(self.config, self.tensors, weights)


class NanotronSide(Side):
    """A Nanotron folder."""

    config: NanotronConfig
    tensors: NanotronTensors

    @property
    def title(self) -> str:
        return f"as Nanotron's {self.tensors.num_tp} x {self.tensors.num_stages} ranks do (tp x pp)"

    def model(self, weights: Weights) -> Model:
        from stream_reshard.check.forward.nanotron import NanotronModel
        return NanotronModel(self.config, self.tensors, weights)


def open_side(root: Path, max_nbytes: int, allow: Collection[str] = (), copy: Side | None = None) -> Side:
    """Read config and headers; `max_nbytes`: limit on each header and small file. The source of a truncated `copy` has
    only the copy's layers. Raises SourceError or Refused with every reason why the model cannot be run."""
    problems = Problems()
    side: Side | None = None
    manifest = problems.collect(open_manifest, root, max_nbytes)
    facts: Mapping[str, Any] = manifest.facts if manifest else {"vocab_size": None, "dtype": "keep", "allowed": ()}
    if (root / "model" / "model").is_dir():
        may_be_moved = MOVED_STAGES in {*allow, *facts["allowed"]}
        side = problems.collect(_open_nanotron, root, max_nbytes, problems, facts, may_be_moved, copy)
    elif _holds_meta(root):
        problems.append(SourceError(f"{quoted(root)} holds Meta's parts, whose forward pass is not run; verify without "
                                    f"--forward compares the weights"))
    elif (root / CONFIG_NAME).is_file():
        side = problems.collect(_open_hugging_face, root, max_nbytes, problems, facts, copy)
    else:
        problems.append(no_checkpoint(root))
    return problems.required(side)


def _holds_meta(root: Path) -> bool:
    """True for a folder of Meta's parts without shards of Hugging Face."""
    return any(root.glob("consolidated*.pth")) and not any(
        any(root.glob(pattern)) for pattern in ("model*.safetensors*", "pytorch_model*.bin*"))


def _open_hugging_face(root: Path, max_nbytes: int, problems: Problems, facts: Mapping[str, Any],
                       copy: Side | None) -> Side:
    whole = read_hugging_face_config(root, problems, max_nbytes)
    config = replace(whole, num_layers=_num_taken(whole.num_layers, whole.whole_num_layers, copy))
    tensors = HuggingFaceTensors(root, problems, max_nbytes, config.num_layers)
    if not problems:
        tensors.find(config)
    return HuggingFaceSide(root, config, tensors, config.vocab_size, facts["dtype"], whole.whole_num_layers)


def _open_nanotron(root: Path, max_nbytes: int, problems: Problems, facts: Mapping[str, Any], may_be_moved: bool,
                   copy: Side | None) -> Side:
    tensors = NanotronTensors(root, problems, max_nbytes)
    config = read_nanotron_config(root, tensors.version, problems, max_nbytes)
    if not problems:
        tensors.find(config, may_be_moved)
    taken = replace(config, num_layers=_num_taken(config.num_layers, facts.get(WHOLE), copy))
    return NanotronSide(root, taken, tensors, facts["vocab_size"], facts["dtype"], facts.get(WHOLE))


def _num_taken(num_layers: int, whole: int | None, copy: Side | None) -> int:
    """Number of layers to run: that of the copy, if it is a truncated copy of a model of so many layers."""
    if copy is None or copy.whole_num_layers != (whole or num_layers):
        return num_layers
    return min(num_layers, copy.config.num_layers)
