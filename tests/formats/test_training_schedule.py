"""The state of the learning rate at another topology is what Nanotron saves there, and says where a training goes on."""
from dataclasses import replace

import pytest
import torch
from golden_training import HERE, PAIRS, TREES, by_name, documents_of, names_of, optimizer_files, schedules_of
from torch_files import read, saved, without_id

from stream_reshard.errors import SourceError
from stream_reshard.formats.nanotron.training.schedule import (exact_group, exact_schedule, moved_schedule,
                                                               schedule_of)
from stream_reshard.storage.torch_writer import folder_of, plan_torch_file, stream

EMBEDDING = "model.embedding"
STAGES = [[EMBEDDING, "a", "b"], ["c", "head"]]
WHOLE = [EMBEDDING, "a", "b", "c", "head"]


def rate_of(name):
    return 0.001 * (1 + WHOLE.index(name))


def schedule(folder, names, **more):
    """A scheduler's file as torch saves it, each parameter with a rate of its own."""
    rates = [rate_of(name) for name in names]
    state = {"base_lrs": rates, "last_epoch": 4, "_step_count": 5, "_is_initial": False,
             "_last_lr": [rate / 2 for rate in rates], "lr_lambdas": [{} for _ in names]} | more
    folder.mkdir(exist_ok=True)
    return read(saved(state, folder, f"{'_'.join(names)}.pt"))


def moved(tmp_path, names, new_names, **more):
    return moved_schedule([schedule(tmp_path, stage, **more) for stage in names], names, new_names)


@HERE
@pytest.mark.parametrize("tree, other", PAIRS, **by_name)
def test_files_are_those_that_nanotron_saves(tree, other):
    """Byte for byte, of every stage."""
    made = moved_schedule(list(map(read, schedules_of(tree))), names_of(tree), names_of(other))
    assert len(made) == len(schedules_of(other))
    for state, path in zip(made, schedules_of(other)):
        written = b"".join(stream(plan_torch_file(state, folder_of(path.name)), lambda storage: []))
        assert without_id(written) == without_id(path.read_bytes())


@pytest.mark.parametrize("names, new_names", [(STAGES, [WHOLE]), ([WHOLE], STAGES), (STAGES, [[name] for name in WHOLE])])
def test_entries_go_with_their_parameter(tmp_path, names, new_names):
    for state, stage in zip(moved(tmp_path, names, new_names), new_names, strict=True):
        assert state["base_lrs"] == [rate_of(name) for name in stage]
        assert state["_last_lr"] == [rate_of(name) / 2 for name in stage]
        assert state["lr_lambdas"] == [{} for _ in stage] and state["last_epoch"] == 4
        assert list(state) == ["base_lrs", "last_epoch", "_step_count", "_is_initial", "_last_lr", "lr_lambdas"]


def test_a_tied_parameter_has_its_entry_in_both_stages(tmp_path):
    """Its dicts are two, as Nanotron has them: one in two places would be referred to in the second."""
    tied = [[EMBEDDING, "a", "b"], ["c", EMBEDDING]]
    whole = [[EMBEDDING, "a", "b", "c"]]
    first, last = moved(tmp_path, whole, tied)
    assert last["base_lrs"] == [rate_of("c"), rate_of(EMBEDDING)]
    assert first["lr_lambdas"][0] is not last["lr_lambdas"][1]
    assert moved(tmp_path, tied, whole)[0]["base_lrs"] == [rate_of(name) for name in whole[0]]


def test_one_file_stands_for_all_stages_where_its_entries_are_equal(tmp_path):
    """Format 1.2 has only that of the first stage."""
    equal = {"base_lrs": [0.1] * 3, "_last_lr": [0.05] * 3}
    state, = moved_schedule([schedule(tmp_path, STAGES[0], **equal)], STAGES, [WHOLE])
    assert state["base_lrs"] == [0.1] * 5 and state["lr_lambdas"] == [{}] * 5
    with pytest.raises(SourceError, match="of the first stage alone, and its 'base_lrs' differ.*'c'"):
        moved_schedule([schedule(tmp_path, STAGES[0])], STAGES, [WHOLE])


@pytest.mark.parametrize("change, words", [
    ({"last_epoch": 5}, "of different schedules: 'last_epoch' is '4' and '5'"), ({"more": 1}, "'more' is 'None' and '1'"),
    ({"base_lrs": [0.1]}, "base_lrs has 1 entries, its stage has 2"), ({"_last_lr": None}, "_last_lr has a NoneType"),
    ({"lr_lambdas": [{}]}, "of different schedules: 'lr_lambdas'"),
    ({"last_epoch": None}, "no state of a scheduler")])
def test_stages_that_disagree_are_refused(tmp_path, change, words):
    files = [schedule(tmp_path, STAGES[0]), schedule(tmp_path, STAGES[1], **change)]
    with pytest.raises(SourceError, match=words):
        moved_schedule(files, STAGES, [WHOLE])


def test_what_is_no_dict_is_refused(tmp_path):
    with pytest.raises(SourceError, match="no state of a scheduler"):
        moved_schedule([replace(schedule(tmp_path, WHOLE), contents=[])], [WHOLE], [WHOLE])


def resumed(state, groups):
    """The rates of the next steps after Nanotron's own way of resuming: lr_scheduler_builder, load_lr_scheduler."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], **group} for group in groups])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [decay(group["lr"]) for group in groups])
    scheduler.load_state_dict(state)
    scheduler._initial_step()
    return rates_of(optimizer, scheduler, 3)


def rates_of(optimizer, scheduler, num_steps):
    rates = []
    for _ in range(num_steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def decay(initial_lr):
    """As Nanotron's lambda: the factor is computed from the initial rate and a least one of 0.01."""
    return lambda step: (0.01 + (initial_lr - 0.01) * max(0, 1 - step / 20)) / initial_lr


def trained(num_steps=4):
    """(state of the scheduler, groups, rates of the next steps) after some steps."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in (0.1, 0.2)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [decay(0.1), decay(0.2)])
    rates_of(optimizer, scheduler, num_steps)
    state = {"state": scheduler.state_dict(), "groups": [{"lr": g["lr"], "initial_lr": g["initial_lr"]} for g in optimizer.param_groups]}
    return state["state"] | {"lr_lambdas": [{}, {}]}, state["groups"], rates_of(optimizer, scheduler, 3)


def test_from_the_exact_schedule_a_resumed_training_has_the_rates_of_one_that_never_stopped():
    """Resumed from what was saved it has others: Nanotron's own fault, which the exact schedule undoes."""
    state, groups, wanted = trained()
    assert resumed(dict(state), groups) != wanted
    exact = exact_schedule(state), [exact_group(group, "a file") for group in groups]
    assert resumed(*exact) == wanted
    assert list(exact[0]) == list(state) and list(exact[1][0]) == list(groups[0])
    assert schedule_of(state, groups, 4) == "saved" and schedule_of(*exact, 4) == "exact"


def test_a_schedule_is_told_by_its_rates_too():
    """After a resume Nanotron's schedule is ahead of the steps: an exact one is then behind by its rates alone. At the
    initial rate, where all rates agree, it is behind the steps."""
    state, groups, _ = trained(6)
    assert schedule_of(state, groups, 5) == "saved"
    exact = [exact_group(group, "") for group in groups]
    assert schedule_of(exact_schedule(state), exact, 5) == "exact"
    flat = {"last_epoch": 4, "_last_lr": [0.1]}
    assert schedule_of(flat, [{"lr": 0.1, "initial_lr": 0.1}], 4) == "saved"
    assert schedule_of(exact_schedule(flat), [{"lr": 0.1, "initial_lr": 0.1}], 4) == "exact"


def test_the_exact_schedule_needs_the_initial_rate():
    with pytest.raises(SourceError, match="a file: a group of parameters has no initial_lr"):
        exact_group({"lr": 0.1}, "a file")


@HERE
@pytest.mark.parametrize("tree", TREES, **by_name)
def test_nanotron_s_own_checkpoints_have_the_saved_schedule(tree):
    groups = optimizer_files(tree, 0)[0].contents["param_groups"]
    assert schedule_of(read(schedules_of(tree)[0]).contents, groups, documents_of(tree).num_steps) == "saved"
