"""A training that moves: every file is the one that the real Nanotron saved of the same state at the other topology."""
import json
import re
from itertools import pairwise

import pytest
import torch
from golden_training import HERE, PAIRS, TREES, family_of
from running import call
from safetensors.torch import load_file
from test_golden import read_tree
from torch_files import GOLDEN_TRAINING, without_id

pytestmark = HERE

NEXT = [pair for pair in pairwise([*TREES, TREES[0]]) if pair in PAIRS]
"""Each tree to the next one of its family: a few of all pairs."""


def flags_to(saved):
    """The flags that ask for the topology of a golden tree."""
    tp, pp, dp, zero = re.search(r"tp(\d+)_pp(\d+)_dp(\d+)_zero(\d)", saved.name).groups()
    flags = ["--to", "nanotron", "--tp", tp, "--pp", pp, "--dp", dp, "--zero", zero]
    return flags + ["--vocab-size", "129"] * saved.name.startswith("tied") + ["--allow", "global_batch"]


def assert_equals(made, saved):
    """All but config.yaml, which names paths and what the trainer was told to ignore."""
    assert read_tree(made) == read_tree(saved)
    for path in sorted(saved.rglob("*")):
        name = path.relative_to(saved).as_posix()
        if path.is_dir() or name.startswith("model/") or name == "config.yaml":
            continue
        ours, theirs = (made / name).read_bytes(), path.read_bytes()
        if name.startswith(("optimizer/", "lr_scheduler/")) and name.endswith(".pt"):
            ours, theirs = without_id(ours), without_id(theirs)
        if not name.startswith("random/"):
            assert ours == theirs, name
    names = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert names - {"stream_reshard.json"} == {path.relative_to(saved).as_posix() for path in saved.rglob("*")
                                               if path.is_file()}


def check_pair(tmp_path, source, saved):
    assert call(source, tmp_path / "out", "--quiet", *flags_to(saved)) == 0
    assert_equals(tmp_path / "out", saved)


@pytest.mark.parametrize("source, saved", NEXT, ids=lambda tree: tree.name)
def test_the_next_topology(tmp_path, source, saved):
    check_pair(tmp_path, source, saved)


@pytest.mark.heavy
@pytest.mark.parametrize("source, saved", [pair for pair in PAIRS if pair not in NEXT], ids=lambda tree: tree.name)
def test_every_topology(tmp_path, source, saved):
    check_pair(tmp_path, source, saved)


@pytest.mark.parametrize("source", [tree for tree in TREES if "zero1" in tree.name], ids=lambda tree: tree.name)
def test_the_same_topology_is_a_copy(tmp_path, source):
    check_pair(tmp_path, source, source)


def test_padding_is_state_and_stays_where_it_can_be_split(tmp_path):
    """Without a word of the user all 130 rows go to one rank and come back; none is taken for padding."""
    source = GOLDEN_TRAINING / "tied_tp2_pp2_dp1_zero0"
    assert call(source, tmp_path / "one", "--quiet", "--to", "nanotron") == 0
    assert json.loads((tmp_path / "one" / "model_config.json").read_text())["vocab_size"] == 130
    assert "vocab_size: 130" in (tmp_path / "one" / "config.yaml").read_text()
    assert call(tmp_path / "one", tmp_path / "back", "--quiet", *flags_to(source)[:-4]) == 0
    assert_equals(tmp_path / "back", source)


def test_new_rows_are_told_with_what_they_do_to_the_loss(tmp_path, capsys):
    assert call(GOLDEN_TRAINING / "tied_tp1_pp1_dp1_zero0", tmp_path / "out", "--to", "nanotron", "--tp", "2") == 0
    assert "the embedding gets 1 rows of zeros after 129" in (told := " ".join(capsys.readouterr().out.split()))
    assert "ln(130 / 129) = 0.0077" in told


def test_a_batch_that_cannot_be_kept_is_refused_with_the_numbers_that_can(tmp_path, capsys):
    source = GOLDEN_TRAINING / "untied_tp1_pp1_dp1_zero0"
    assert call(source, tmp_path / "out", "--quiet", "--to", "nanotron", "--dp", "3") == 2
    assert "--dp can be 1, 2, 4, or --allow global_batch accepts it" in capsys.readouterr().err


@pytest.mark.parametrize("flags, word", [(["--rope", "interleaved"], "--rope"), (["--dtype", "float32"], "--dtype"),
                                         (["--checkpoint-version", "1.4"], "--checkpoint-version")])
def test_what_the_training_has_decided_is_no_choice(tmp_path, capsys, flags, word):
    source = GOLDEN_TRAINING / "untied_tp1_pp1_dp1_zero0"
    assert call(source, tmp_path / "out", "--quiet", "--to", "nanotron", *flags) == 2
    assert f"{word} with a training state: the training has decided that" in capsys.readouterr().err


def test_weights_only_leaves_the_state_behind_and_says_so(tmp_path, capsys):
    source = GOLDEN_TRAINING / "untied_tp2_pp2_dp1_zero0"
    assert call(source, tmp_path / "out", "--to", "nanotron", "--weights-only", "--vocab-size", 128) == 0
    assert "is left behind: weights alone are written" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "out" / "optimizer").exists()
    assert call(source, tmp_path / "again", "--to", "nanotron", "--weights-only", "--vocab-size", 128, "--zero", 1) == 2


def test_the_plan_names_the_states(capsys):
    assert call("plan", GOLDEN_TRAINING / "moe_tp1_pp1_dp1_zero0", "--to", "nanotron", "--tp", 2) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "state step 4, ZeRO 0, schedule saved, 345.0 KiB in 2 files" in told
    assert "masters float32 " in told and "exp_avg_sq float32 " in told


def test_trees_of_every_family_are_here():
    assert {family_of(tree) for tree in TREES} >= {"moe", "tied", "trained_untied", "untied"} and len(NEXT) > 8


@pytest.mark.parametrize("source", [tree for tree in TREES if "nofp32" not in tree.name], ids=lambda tree: tree.name)
def test_weights_from_masters_round_to_those_beside_them(tmp_path, source):
    """In float32 no less than what the training knows, and in bfloat16 what model/ holds."""
    flags = ["--quiet", "--to", "hf", "--vocab-size", 129 if source.name.startswith("tied") else 128]
    assert call(source, tmp_path / "weights", *flags) == 0
    assert call(source, tmp_path / "masters", *flags, "--from-masters", "--verify") == 0
    assert call(source, tmp_path / "rounded", *flags, "--from-masters", "--dtype", "bfloat16", "--verify") == 0
    weights, masters, rounded = (load_file(tmp_path / name / "model.safetensors")
                                 for name in ("weights", "masters", "rounded"))
    assert weights.keys() == masters.keys() == rounded.keys()
    for key, weight in weights.items():
        assert masters[key].dtype == torch.float32 and torch.equal(masters[key].to(weight.dtype), weight), key
        assert torch.equal(rounded[key], weight.to(torch.bfloat16)), key
    assert any(not torch.equal(masters[key], weight.float()) for key, weight in weights.items())


def test_masters_that_are_not_there_are_refused(tmp_path, capsys):
    source = GOLDEN_TRAINING / "untied_tp1_pp1_dp2_zero1_nofp32"
    assert call(source, tmp_path / "out", "--quiet", "--to", "hf", "--from-masters", "--vocab-size", 128) == 3
    assert "keeps no fp32 masters" in capsys.readouterr().err
    assert call(source, tmp_path / "out", "--quiet", "--to", "nanotron", "--from-masters") == 2
