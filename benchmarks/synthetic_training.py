"""Add the state of a training, of random bits, to a Nanotron checkpoint of this tool: input for measurements.

    python benchmarks/synthetic_training.py CHECKPOINT --dp 2 --zero 1
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from stream_reshard.errors import Problems
from stream_reshard.formats.nanotron.source import NanotronSource, open_nanotron
from stream_reshard.formats.nanotron.training.documents import optimizer_config
from stream_reshard.formats.nanotron.training.entries import STATE, Entry
from stream_reshard.formats.nanotron.training.files import OPTIMIZER_CONFIG_NAME, optimizer_path, scheduler_path
from stream_reshard.formats.nanotron.training.layout import MASTERS, positions_of
from stream_reshard.formats.nanotron.training.target import NewTrainingState
from stream_reshard.model.topology import Topology
from stream_reshard.storage.torch_values import StorageReference, new_tensor
from stream_reshard.storage.torch_writer import folder_of, plan_torch_file, stream

_GROUP = {"lr": 3e-4, "weight_decay": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": False, "maximize": False,
          "foreach": None, "capturable": False, "differentiable": False, "fused": True, "initial_lr": 3e-4}
_KINDS = ("exp_avg", "exp_avg_sq", MASTERS)
_PIECE_NBYTES = 8 * 2**20


def add_training(root: Path, dp: int, zero: int) -> None:
    """Write the optimizer, the schedule and the settings of a training with fp32 masters, in its tenth step."""
    opened = open_nanotron(root, 2**24, None, Problems(), is_exact=False)
    assert isinstance(opened, NanotronSource)
    weights, tp, pp = opened.layout, opened.layout.rules.topology.tp, opened.layout.rules.topology.pp
    topology, names = Topology(tp, pp, dp), tuple(sorted(positions_of(weights), key=_layer_of))
    state = {"step": new_tensor("F32", ()), **{kind: new_tensor("F32", (1,)) for kind in _KINDS[:2]}}
    entries = {name: Entry(name, _GROUP, state, {(STATE, "step"): bytes(4)}, dict.fromkeys(_KINDS, "F32"))
               for name in names}
    new = NewTrainingState(_Made(entries, names), weights, topology, zero)  # type: ignore[arg-type]
    for rank in new.layout.ranks():
        path = optimizer_path(rank, topology)
        _write(root / path, stream(new.made(rank).file, _noise))
    for stage, own in enumerate(new.names):
        rates = [3e-4] * len(own)
        schedule = {"base_lrs": rates, "last_epoch": 10, "_step_count": 11, "_last_lr": rates,
                    "lr_lambdas": [{}] * len(own)}
        for rank in range(tp):
            path = scheduler_path(stage, rank, topology)
            _write(root / path, stream(plan_torch_file(schedule, folder_of(path)), _noise))
    shapes = [(name, new.layout.shape_of(position)) for name, position in zip(new.names[0], new.layout.stages[0])]
    (root / OPTIMIZER_CONFIG_NAME).write_bytes(optimizer_config(topology, zero, True, shapes))
    settings = yaml.safe_load((root / "config.yaml").read_text())
    settings["parallelism"]["dp"], settings["optimizer"]["zero_stage"] = dp, zero
    settings["tokens"]["batch_accumulation_per_replica"] = 64 // dp
    (root / "config.yaml").write_text(yaml.dump(settings))
    metadata = json.loads((root / "checkpoint_metadata.json").read_text())
    metadata["dp"] = dp
    (root / "checkpoint_metadata.json").write_text(json.dumps(metadata))
    (root / "stream_reshard.json").unlink(missing_ok=True)


def _layer_of(name: str) -> float:
    """The layer of a parameter: Nanotron counts them layer by layer, the embedding first and the head last."""
    layer = re.search(r"decoder\.(\d+)\.", name)
    return int(layer[1]) if layer else -1 if "embedding" in name else math.inf


class _Made:
    """As much of a source as a new state is made of."""

    has_one_group = False
    keys = ("state", "param_groups", "names", MASTERS)

    def __init__(self, entries: dict[str, Entry], names: tuple[str, ...]):
        self.entries, self.order = entries, names
        self.layout: Any = argparse.Namespace(kinds=_KINDS)


def _noise(storage: StorageReference) -> Iterator[bytes]:
    """The step, the only scalar, is the same everywhere. Each other storage begins elsewhere in the noise, so that no
    two are equal."""
    if storage.nbytes == len(_STEP):
        yield _STEP
        return
    noise, left, begin = _NOISE, storage.nbytes, next(_STARTS)
    while left:
        piece = noise[begin:begin + min(left, _PIECE_NBYTES)]
        yield piece
        left, begin = left - len(piece), (begin + 4099) % 2**20


_NOISE = os.urandom(2**20) * 9
_STEP = struct.pack("<f", 10)
_STARTS = (number * 4099 % 2**20 for number in count())


def _write(path: Path, pieces: Iterator[bytes | memoryview]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--zero", type=int, default=0)
    arguments = parser.parse_args()
    add_training(arguments.checkpoint, arguments.dp, arguments.zero)
