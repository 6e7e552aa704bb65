"""Optimizer files that Nanotron's loader would take, and its trainer does not save."""
import pickle

import numpy as np
from running import call
from training import edit, load, make_training

from stream_reshard.convert.conversion import Options, plan_conversion


def edited(root, change):
    for path in (root / "optimizer").glob("*.pt"):
        edit(path, change)
    return root


def masters_first(contents):
    rest = dict(contents)
    contents.clear()
    contents.update({"gradient_accumulator": rest.pop("gradient_accumulator"), **rest})


def test_states_may_stand_behind_their_masters(tmp_path):
    """The kinds of state are then in another order in the file."""
    source = edited(make_training(tmp_path / "source"), masters_first)
    assert call(source, tmp_path / "moved", "--quiet", "--to", "nanotron", "--tp", 2, "--verify") == 0
    assert list(load(next((tmp_path / "moved/optimizer").glob("*.pt"))))[0] == "gradient_accumulator"


def halve_one(contents):
    masters = contents["gradient_accumulator"]
    name = list(masters)[1]
    masters[name] = (np.array(masters[name]).view(np.uint32) >> 16).astype(np.uint16)


def test_masters_of_two_dtypes_are_refused(tmp_path, capsys):
    source = edited(make_training(tmp_path / "source"), halve_one)
    assert call(source, tmp_path / "moved", "--quiet", "--to", "nanotron", "--tp", 2) == 3
    assert "its masters have the dtypes BF16, F32" in capsys.readouterr().err


def test_a_plan_is_picklable_and_counts_the_bytes_of_whole_files(tmp_path):
    """What stands between the states is more than they are in a small model."""
    source = make_training(tmp_path / "source", dp=2, zero=1)
    moved = plan_conversion(Options(source, tmp_path / "moved", to="nanotron", tp=2, max_memory=2**32))
    plan = pickle.loads(pickle.dumps(moved.states.plan))
    assert list(plan.jobs) == list(moved.states.plan.jobs)
    assert 0 < sum(len(part.tensors) for job in plan.jobs for part in job.files) <= moved.states.max_crcs
    assert call(source, tmp_path / "moved", "--quiet", "--to", "nanotron", "--tp", 2, "--zero", 1) == 0
    assert plan.nbytes == sum(path.stat().st_size for path in (tmp_path / "moved/optimizer").glob("*.pt"))
    masters = plan_conversion(Options(source, tmp_path / "hf", to="hf", from_masters=True, vocab_size=12, max_memory=2**32))
    assert list(pickle.loads(pickle.dumps(masters.plan)).jobs) == list(masters.plan.jobs)
