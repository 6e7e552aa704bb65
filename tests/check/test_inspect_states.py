"""`inspect` says what a training state holds, and what Nanotron will get wrong when it resumes from it."""
import json

import pytest
from damage import edit_json, edit_yaml, every
from golden_training import HERE, TREES
from running import call
from training import LENGTH, SAMPLES, STEP, edit, load, make_training

from stream_reshard.cli import main


@pytest.fixture
def told(capsys):
    """told(root): (facts, lines for people)."""
    def run(root):
        assert main(["inspect", str(root), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert main(["inspect", str(root)]) == 0
        return facts, " ".join(capsys.readouterr().out.split())
    return run


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "pp": 2, "dp": 3, "zero": 1}, {"masters": False, "tp": 2}])
def test_what_a_state_holds(tmp_path, told, sizes):
    facts, lines = told(root := make_training(tmp_path / "a", tied=True, **sizes))
    training, masters = facts["training"], sizes.get("masters", True)
    assert facts["faults"] == [] and training | {
        "step": STEP, "optimizer_step": STEP, "samples": SAMPLES, "tokens": SAMPLES * LENGTH, "vocab_rows": 12,
        "zero_stage": sizes.get("zero", 0), "dp": sizes.get("dp", 1), "has_masters": masters, "schedule": "saved",
        "num_files": len([path for path in root.rglob("*") if path.parent.name in ("optimizer", "lr_scheduler", "random")]),
    } == training
    assert list(training["states"]) == ["exp_avg", "exp_avg_sq", "master"][:3 if masters else 2]
    for kind, of_kind in training["states"].items():
        dtype = "F32" if masters else "BF16"
        assert list(of_kind["dtypes"]) == [dtype] and of_kind["nbytes"] == in_files(root, kind)
    assert f"step {STEP}, {SAMPLES} samples, {SAMPLES * LENGTH} tokens, learning rate" in lines
    assert f"ZeRO-{sizes.get('zero', 0)}, DP={sizes.get('dp', 1)}" in lines and "skips one step" in lines


def in_files(root, kind):
    """Bytes of the tensors of a kind, as they stand in the files."""
    total = 0
    for path in every(root, "optimizer/optimizer_", ".pt"):
        values = load(path)
        tensors = values["gradient_accumulator"].values() if kind == "master" else [
            state[kind] for state in values["state"].values()]
        total += sum(tensor.nbytes for tensor in tensors)
    return total


def test_weights_alone_have_no_training(tmp_path, told):
    make_training(tmp_path / "a")
    assert "training" not in told(tmp_path / "a-source")[0]


def test_a_training_that_moved(tmp_path, told):
    """Its manifest does not know how many rows of the vocabulary are padding, because Nanotron does not."""
    moved = tmp_path / "moved"
    assert call(make_training(tmp_path / "a"), moved, "--to", "nanotron", "--tp", 2, "--schedule", "exact", "--quiet") == 0
    facts, lines = told(moved)
    assert facts["faults"] == [] and facts["vocab_size"] is None and facts["training"]["schedule"] == "exact"
    assert "rows without padding are not known: 12 with padding" in lines


def test_a_schedule_that_goes_on_exactly(tmp_path, told):
    root = make_training(tmp_path / "a")
    edit(every(root, "lr_scheduler/")[0], lambda values: values.update(last_epoch=STEP - 1))
    assert told(root)[0]["training"]["schedule"] == "saved"
    edit(every(root, "optimizer_pp")[0], lambda values: [
        group.update(lr=group["initial_lr"]) for group in values["param_groups"]])
    facts, lines = told(root)
    assert facts["training"]["schedule"] == "exact" and "exact: Nanotron goes on where it stopped" in lines


def tokens(root):
    metas = json.loads((root / "checkpoint_metadata.json").read_text())["metas"]
    metas["data_stages"][0]["consumed_tokens_per_dataset_folder"] = {}
    edit_json(root, "checkpoint_metadata.json", metas=metas)


def no_rate(root):
    edit(every(root, "optimizer_pp")[0], lambda values: values["param_groups"][0].update(lr=0.0))


def started_anew(root):
    edit(every(root, "optimizer_pp")[0], lambda values: [one["step"].fill(1) for one in values["state"].values()])


WRONG = [
    ("a dummy dataset", {}, tokens, "notes", "add up to 0: Nanotron refuses to load it"),
    ("a rate of 0", {}, no_rate, "notes", "the learning rate is 0"),
    ("an optimizer that started anew", {}, started_anew, "notes", "done 1 steps, the training 4"),
    ("ZeRO-1 with masters", {"dp": 2, "zero": 1}, lambda root: None, "notes", "Nanotron's main cannot train so"),
    ("no first step", {}, lambda root: edit(every(root, "optimizer_pp")[0], lambda values: values.update(
        state={}, names={}, gradient_accumulator={})), "faults", "no step was done before it was saved"),
    ("no schedule", {"tp": 2}, lambda root: every(root, "lr_scheduler/", "tp-1")[0].unlink(), "faults", "is missing"),
    ("another stage of ZeRO in config.yaml", {}, lambda root: edit_yaml(root, "zero_stage: 0", "zero_stage: 1"),
     "faults", "zero_stage is '1', the weights beside it need '0'"),
    ("another topology in config.yaml", {"dp": 2, "zero": 1}, lambda root: edit_yaml(root, " dp: 2", " dp: 4"),
     "faults", "dp is '4', the weights beside it need '2'"),
    ("weights that are missing", {}, lambda root: every(root, "lm_head")[0].unlink(), "faults", "lm_head")]


@pytest.mark.parametrize("sizes, damage, key, words", [pytest.param(*row[1:], id=row[0]) for row in WRONG])
def test_what_nanotron_will_get_wrong(tmp_path, told, sizes, damage, key, words):
    root = make_training(tmp_path / "a", **sizes)
    damage(root)
    facts, lines = told(root)
    assert any(words in text for text in facts[key]), facts[key]
    assert words in lines


@HERE
@pytest.mark.parametrize("root", TREES, ids=lambda tree: tree.name)
def test_what_nanotron_saved_has_no_faults(told, root):
    facts, _ = told(root)
    assert facts["faults"] == [] and facts["training"]["step"] == 4
