"""Training checkpoints that Nanotron itself saved, several of one state at other topologies."""
import json
import re
from itertools import permutations

import pytest
from torch_files import GOLDEN_TRAINING, read

from stream_reshard.formats.nanotron.training.documents import read_training_documents

HERE = pytest.mark.skipif(not GOLDEN_TRAINING.is_dir(), reason="the golden checkpoints are not beside this checkout")

TREES = sorted(path.parent for path in GOLDEN_TRAINING.glob("*/config.yaml"))
"""All but those that hold optimizer files alone."""


def family_of(tree):
    """Trees of one family hold one state. Without fp32 masters the settings are others."""
    return tree.name.partition("_tp")[0] + tree.name.partition("_nofp32")[1]


PAIRS = [(a, b) for a, b in permutations(TREES, 2) if family_of(a) == family_of(b)]
"""(tree, another one of the same state)."""

by_name = {"ids": lambda tree: tree.name}


def optimizer_files(tree, stage):
    """The optimizer files of a stage, that of the first rank before the others."""
    return [read(path) for path in sorted((tree / "optimizer").glob(f"optimizer_pp-{stage}-of-*.pt"))]


def names_of(tree):
    """The names of the parameters of each stage, in their order."""
    num_stages = int(re.search(r"-of-(\d+)", next((tree / "optimizer").glob("*.pt")).name)[1])
    return [list(optimizer_files(tree, stage)[0].contents["names"].values()) for stage in range(num_stages)]


def schedules_of(tree):
    """The paths of the scheduler's files, those of the first tensor-parallel rank, stage by stage."""
    return sorted((tree / "lr_scheduler").glob("lr_scheduler_pp-*_tp-0-of-*.pt"))


def rows_of(tree):
    """Rows of the embedding with padding."""
    return json.loads((tree / "model_config.json").read_text())["vocab_size"]


def documents_of(tree):
    return read_training_documents(tree)
