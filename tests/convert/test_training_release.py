"""Trainings that release 0.4 of Nanotron saved, which PyPI has. It keeps one group of settings for all parameters, where
later trees have one for each."""
from itertools import permutations

import pytest
from conversions import convert
from running import call
from torch_files import read, without_id

from real import launch, trees

pytestmark = pytest.mark.heavy

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


STATES = {"plain": ("--tp", 2, "--pp", 2, "--zero", 0), "zero": ("--dp", 4, "--zero", 1),
          "stages": ("--pp", 4, "--zero", 0)}


@pytest.mark.parametrize("source, place", list(permutations(PLACES, 2)))
def test_its_states_move(saved, source, place, tmp_path, capsys):
    """To the files that it saved there itself. Their masters are random, so verify finds that they round to others."""
    convert(saved[source], tmp_path / "nt", "--to", "nanotron", "--allow", "global_batch", *STATES[place])
    assert trees.differences(tmp_path / "nt", saved[place], VOCAB) == []
    for path in [*(saved[place] / "optimizer").iterdir(), *(saved[place] / "lr_scheduler").iterdir()]:
        ours = tmp_path / "nt" / path.relative_to(saved[place])
        if path.suffix == ".pt":
            assert without_id(ours.read_bytes()) == without_id(path.read_bytes()), path
        else:
            assert ours.read_bytes() == path.read_bytes(), path
    call("verify", saved[source], tmp_path / "nt")
    lines = capsys.readouterr().err.splitlines()
    assert lines and all("its master rounds to" in line or "more" in line for line in lines)


@pytest.mark.parametrize("source, place", list(permutations(PLACES, 2)))
def test_its_weights_move(saved, source, place, tmp_path):
    """To what it saved there itself."""
    convert(saved[source], tmp_path / "nt", "--to", "nanotron", "--weights-only", "--checkpoint-version", "1.2",
            "--vocab-size", VOCAB, *TOPOLOGIES[place])
    assert trees.differences(tmp_path / "nt", saved[place], VOCAB) == []
