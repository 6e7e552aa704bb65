"""Trainings that release 0.4 of Nanotron saved, which PyPI has. It keeps one group of settings for all parameters, where later
trees have one for each: its states do not move, and its weights do."""
from itertools import permutations

import pytest
from conversions import convert
from refusals import told
from torch_files import read

from real import launch, trees

VOCAB = 323
PLACES = {"plain": ("--tp", 2, "--pp", 2), "zero": ("--zero", 1), "stages": ("--pp", 4)}
"""Flags for Nanotron; what remains of four processes is dp."""

TOPOLOGIES = {"plain": ("--tp", 2, "--pp", 2, "--vocab-multiple", 2), "zero": ("--dp", 4, "--vocab-multiple", 4),
              "stages": ("--pp", 4, "--vocab-multiple", 4)}
"""The same for the command; the vocabulary is padded for four ranks everywhere."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{place: the same weights, and states, as Nanotron saved them there}."""
    if launch.missing_release():
        pytest.skip(launch.missing_release())
    from real import models
    root = tmp_path_factory.mktemp("release")
    convert(models.save_tied_llama(root / "hf"), root / "weights", "--checkpoint-version", "1.2", "--vocab-multiple", 4)
    folders = {place: root / place for place in PLACES}
    launch.nanotron(*((root / "weights", folder, *PLACES[place]) for place, folder in folders.items()), ranks=4,
                    script="states.py")
    return folders


def test_it_has_one_group_for_all_parameters(saved):
    """And one entry in the schedule, in one file for all ranks."""
    for folder in saved.values():
        for path in (folder / "optimizer").glob("*.pt"):
            state = read(path).contents
            assert [group["params"] for group in state["param_groups"]] == [list(state["names"])]
        path, = (folder / "lr_scheduler").iterdir()
        assert path.name == "lr_scheduler.pt" and len(read(path).contents["base_lrs"]) == 1


@pytest.mark.parametrize("place", PLACES)
def test_its_state_is_refused_in_words(saved, place, tmp_path, capsys):
    line = told(capsys, saved[place], tmp_path / "nt", "--to", "nanotron", "--tp", 2, "--vocab-size", VOCAB)
    assert "it has 1 groups, Nanotron makes one for each" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("source, place", list(permutations(PLACES, 2)))
def test_its_weights_move(saved, source, place, tmp_path):
    """To what it saved there itself."""
    convert(saved[source], tmp_path / "nt", "--to", "nanotron", "--weights-only", "--checkpoint-version", "1.2",
            "--vocab-size", VOCAB, *TOPOLOGIES[place])
    assert trees.differences(tmp_path / "nt", saved[place], VOCAB) == []
