"""Names of the files of a Nanotron checkpoint: the files that a run may remove when it replaces one."""
from __future__ import annotations

import re
from pathlib import Path

from stream_reshard.destination.removal import Naming
from stream_reshard.errors import SourceError
from stream_reshard.formats.nanotron.config import METADATA_NAME, MODEL_CONFIG_NAME
from stream_reshard.formats.nanotron.weight_files import parse_path
from stream_reshard.formats.nanotron.yaml_text import CONFIG_YAML

_SETTINGS = frozenset({CONFIG_YAML, METADATA_NAME, MODEL_CONFIG_NAME})
"""Files at the root of a checkpoint (nanotron/serialize/main.py, nanotron/trainer.py)."""

_OF = r"(?:0|[1-9]\d*)-of-[1-9]\d*"
_RANKS = rf"pp-{_OF}(?:_dp-{_OF})?_tp-{_OF}(?:_exp-{_OF})?"
_OF_TRAINING = re.compile(
    rf"optimizer/(?:optimizer_config\.json|optimizer_{_RANKS}\.pt)|lr_scheduler/lr_scheduler(?:_{_RANKS})?\.pt"
    rf"|random/tp-{_OF}_dp-{_OF}_pp-{_OF}\.pt", re.ASCII)
"""States of the optimizer, the schedule and the random generators, as Nanotron names them (`optimizer_filename` and
`lr_scheduler_filename` in nanotron/serialize/optimizer.py, nanotron/serialize/random.py)."""

_OF_EXPERTS = re.compile(rf"(?<=\d)_exp-rank-{_OF}(?=\.safetensors\Z)", re.ASCII)
"""The part of a weight file's name for expert parallelism (`get_path`, nanotron/serialize/utils.py)."""


def is_of_training(path: str) -> bool:
    """True for the path of a training state that Nanotron's trainer saves."""
    return _OF_TRAINING.fullmatch(path) is not None


def is_weights(path: str) -> bool:
    """True for the path of a weight file."""
    try:
        parse_path(_OF_EXPERTS.sub("", path))
    except SourceError:
        return False
    return True


def _is_named_by_nanotron(path: str) -> bool:
    return path in _SETTINGS or is_weights(path) or is_of_training(path)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MODEL_CONFIG_NAME).is_file() and (folder / "model").is_dir()


NAMING = Naming(_is_named_by_nanotron, is_weights, is_of_training, _is_checkpoint)
"""The names by which `destination` knows what it may remove."""
