"""Whatever stands in the values of a training state, verify and inspect end well, in printable lines."""
import copy
import json
import random
import shutil

import numpy as np
import pytest
from damage import every
from running import said
from training import load, make_training, save

from stream_reshard.cli import main

VALUES = [None, 0, -1, 2**40, 1e308, float("nan"), True, "", "x", "\x1b[1m", "9" * 99, [], {}, (), [[]], [None] * 20,
          {"a": {}}, {0: "x"}, np.zeros(0, np.float32), np.zeros((2, 2), np.uint16), np.zeros((), np.int64)]


def places(value, keys=()):
    """The keys that lead to each value in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield (*keys, key)
        yield from places(item, (*keys, key))


def mutated(value, chooser):
    """The same tree with another value somewhere, or a value less, or a key more."""
    value = copy.deepcopy(value)
    *above, key = chooser.choice(list(places(value)))
    inside = value
    for one in above:
        inside = inside[one]
    if isinstance(inside, tuple):
        return value
    other = chooser.choice(VALUES)
    if chooser.random() < 0.2:
        del inside[key]
    elif chooser.random() < 0.2 and isinstance(inside, dict):
        inside[chooser.choice(["\x1b", "step", 7, "params", "lr"])] = other
    else:
        inside[key] = other
    return value


def odd_files(root, number, chooser):
    """The paths of files that hold an odd value meanwhile: states, schedules and documents of a training."""
    files = {path: load(path) for path in every(root, ".pt") if "random" not in path.parts}
    documents = {path: json.loads(path.read_text()) for path in (
        root / "optimizer/optimizer_config.json", root / "checkpoint_metadata.json")}
    for _ in range(number):
        path = chooser.choice([*files, *documents])
        shutil.copy(path, kept := root.with_name("kept"))
        if path in files:
            save(path, mutated(files[path], chooser))
        else:
            path.write_text(json.dumps(mutated(documents[path], chooser), default=str))
        yield path
        shutil.copy(kept, path)


@pytest.mark.parametrize("number", [25, pytest.param(250, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp": 2, "zero": 1}], ids=["ZeRO-0", "ZeRO-1"])
def test_values_of_every_kind_at_every_place(tmp_path, verify, capsys, figures, number, sizes):
    source = make_training(tmp_path / "a", config={"num_hidden_layers": 1})
    root = make_training(tmp_path / "b", config={"num_hidden_layers": 1}, **sizes)
    chooser, wrong = random.Random(0), []
    for turn, path in enumerate(odd_files(root, number, chooser)):
        code, _, problems = verify(source, root)
        other, _, more = verify(root, source)
        told = main(["inspect", str(root)])
        said(capsys)
        if code not in (0, 5) or other not in (0, 3, 5) or told != 0:
            wrong.append((turn, path.name, code, other, told, problems, more))
    figures("odd values in a training state", number, wrong)


@pytest.mark.parametrize("number", [20, pytest.param(250, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"dp": 2, "zero": 1}], ids=["ZeRO-0", "ZeRO-1"])
def test_moves_of_odd_values(tmp_path, capsys, figures, number, sizes):
    """A move is refused in words, or it is made: no values end it in a traceback, or leave a part of it."""
    root, out = make_training(tmp_path / "b", config={"num_hidden_layers": 1}, **sizes), tmp_path / "out"
    chooser, wrong = random.Random(1), []
    for turn, path in enumerate(odd_files(root, number, chooser)):
        schedule = chooser.choice(["saved", "exact"])
        code = main([str(root), str(out), "--quiet", "--to", "nanotron", "--schedule", schedule, "--max-memory", "8GiB"])
        said(capsys)
        if code not in (0, 2, 3) or (code == 0) != out.exists() or [*tmp_path.glob("out.*")]:
            wrong.append((turn, path.name, code))
        shutil.rmtree(out, ignore_errors=True)
    figures("moves of odd values in a training state", number, wrong)
