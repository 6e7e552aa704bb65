"""The weights in a file of torch.save, as the header of a safetensors file gives them."""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from stream_reshard.storage.header import SHARD_NAME, TensorFile

BIN_NAME = re.compile(SHARD_NAME.pattern.replace("safetensors", "bin"))
"""A path below the folder, as SHARD_NAME has it."""


@dataclass(frozen=True)
class TorchWeights(TensorFile):
    """A file of weights that torch.save wrote. Tensors may share bytes, and more than tensors stands in it."""

    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By name those of the tensors that do not stand in C order, in elements per dim."""
    size: int = 0

    @property
    def nbytes(self) -> int:
        return self.size
