"""The schedule that is asked for is written, whichever the source has, and `verify` knows both."""
import pytest
from running import call
from training import edit, load, make_training

MOVE = ("--quiet", "--to", "nanotron", "--tp", 2, "--verify")


def ahead(root):
    """A training that Nanotron has resumed once: its schedule is a step ahead."""
    for path in (root / "lr_scheduler").iterdir():
        edit(path, lambda state: state.update(last_epoch=state["last_epoch"] + 1))
    return root


def one_group(root):
    """A training with one group for all parameters, as release 0.4 saves it."""
    def join(contents):
        groups = contents["param_groups"]
        contents["param_groups"] = [{**groups[0], "lr": 0.1, "initial_lr": 0.2, "params": list(range(len(groups)))}]

    for path in (root / "optimizer").glob("*.pt"):
        edit(path, join)
    for path in (root / "lr_scheduler").iterdir():
        edit(path, lambda state: state.update(base_lrs=[0.2], _last_lr=[0.1], lr_lambdas=[{}]))
    return root


def files_of(root):
    """The values of the schedule, and the settings of the parameters."""
    return ([load(path) for path in sorted((root / "lr_scheduler").iterdir())],
            [load(path)["param_groups"] for path in sorted((root / "optimizer").glob("*.pt"))])


@pytest.mark.parametrize("change", [lambda root: root, ahead, one_group], ids=["trained", "resumed", "one group"])
def test_a_schedule_moves_twice_and_back(tmp_path, change):
    source = change(make_training(tmp_path / "source", pp=2))
    for name, origin, kind in (("saved", "source", "saved"), ("exact", "source", "exact"), ("twice", "exact", "exact"),
                               ("back", "exact", "saved")):
        assert call(tmp_path / origin, tmp_path / name, *MOVE, "--pp", 2, "--schedule", kind) == 0, name
    assert files_of(tmp_path / "exact") == files_of(tmp_path / "twice") != files_of(tmp_path / "saved")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "saved")
    before = [load(path)["last_epoch"] for path in sorted((source / "lr_scheduler").iterdir())]
    assert files_of(tmp_path / "exact")[0][0]["last_epoch"] == before[0] - 1


def test_a_schedule_that_is_damaged_is_refused_by_a_plan_without_a_destination(tmp_path, capsys):
    source = make_training(tmp_path / "source")
    edit(next((source / "lr_scheduler").iterdir()), lambda state: state.pop("_last_lr"))
    assert call("plan", source, "--to", "nanotron") == 3
    assert "_last_lr has a NoneType" in capsys.readouterr().err
