"""Training states of one training verify at whatever topologies; a folder without one is no difference where that is
meant."""
import json

import numpy as np
import pytest
from damage import edit_json, edit_yaml, every, poke, start_here
from golden_training import HERE, PAIRS
from running import call, measured
from torch_files import GOLDEN_TRAINING
from trees import raw_of
from training import edit, load, make_training, parameters_of, write_states

from stream_reshard.check.weights.checkpoint import rounded
from stream_reshard.check.weights.states.cut import boxes_between, stretch_of
from stream_reshard.cli.demo import CONFIG, write_random_source

CUT = {"tp": 2, "pp": 2, "dp": 3, "zero": 1}

FAMILIES = {"llama": {}, "tied": {"tied": True}, "moe": {"family": "qwen2_moe"},
            "interleaved": {"family": "qwen2", "flags": ("--rope", "interleaved")}, "no masters": {"masters": False},
            "Qwen2Config": {"flags": ("--nanotron-config", "Qwen2Config")}}


@HERE
@pytest.mark.parametrize("source, copy", PAIRS, ids=lambda tree: tree.name)
def test_what_nanotron_saved_at_all_topologies_is_one_state(verify, source, copy):
    code, out, problems = verify(source, copy)
    assert (code, problems) == (0, [])
    assert "state    of step 4" in out and ": all equal, checksums of" in out


@HERE
@pytest.mark.parametrize("name", ["untied_tp1_pp1_dp1_zero0", "moe_tp1_pp1_dp1_zero0"])
def test_parameters_are_made_here_in_the_order_of_nanotron(name):
    file = next((GOLDEN_TRAINING / name / "optimizer").glob("*.pt"))
    names = [name.removeprefix("model.") for name in load(file)["names"].values()]
    assert parameters_of(GOLDEN_TRAINING / name, 1) == names


@pytest.mark.parametrize("kind", FAMILIES)
def test_one_state_is_equal_at_two_topologies(tmp_path, verify, kind):
    whole, cut = make_training(tmp_path / "a", **FAMILIES[kind]), make_training(tmp_path / "b", **FAMILIES[kind] | CUT)
    for source, copy in ((whole, cut), (cut, whole), (cut, cut)):
        code, out, problems = verify(source, copy, "--json")
        assert (code, problems) == (0, [])
        facts = json.loads(out)
        assert facts["state"]["num_compared"] == len(facts["state"]["kinds"]) * facts["num_elements"] > 0


def test_more_ranks_than_elements_of_a_norm_and_one_alone(tmp_path, verify):
    whole, cut, flat = (make_training(tmp_path / name, **sizes) for name, sizes in (
        ("a", {}), ("b", {"dp": 20, "zero": 1}), ("c", {"dp": 1, "zero": 1})))
    for pair in ((whole, cut), (cut, whole), (flat, cut), (whole, flat)):
        assert verify(*pair)[0] == 0, pair


def test_the_one_schedule_of_format_1_2(tmp_path, verify, differs):
    old, new = (make_training(tmp_path / version, pp=2, config={"initializer_range": 0.01}, flags=(
        "--checkpoint-version", version, "--rope", "interleaved")) for version in ("1.2", "1.5"))
    assert verify(old, new)[0] == verify(new, old)[0] == 0
    edit(old / "lr_scheduler/lr_scheduler.pt", lambda values: values.update(last_epoch=5))
    differs(new, old, ["the schedule: last_epoch is '5', in the source '4'"])


@pytest.mark.parametrize("num_elements, num_ranks", [(32, 3), (1, 1), (7, 7), (5, 9), (32, 40), (1000, 7), (2**40, 511)])
def test_parts_are_those_of_nanotrons_rule(num_elements, num_ranks):
    """Section of its code: the longest part, and as many of the last ones shorter by one as are needed."""
    parts = [stretch_of(num_elements, num_ranks, rank) for rank in range(num_ranks)]
    longest = (num_elements - 1) // num_ranks + 1
    num_short = longest * num_ranks - num_elements
    assert [stop - start for start, stop in parts] == [longest] * (num_ranks - num_short) + [longest - 1] * num_short
    assert [start for start, _ in parts] + [num_elements] == [0] + [stop for _, stop in parts]


@pytest.mark.parametrize("width", [1, 2, 5, 30])
def test_a_stretch_of_a_matrix_is_at_most_three_boxes(width):
    places = np.arange(30).reshape(-1, width)
    for start in range(31):
        for stop in range(start, 31):
            boxes = list(boxes_between(start, stop, width))
            found = [places[box.start[0]:box.stop[0], box.start[1]:box.stop[1]].ravel() for box in boxes]
            assert np.concatenate([[], *found]).tolist() == list(range(start, stop)) and len(boxes) <= 3


@pytest.mark.parametrize("dtype, name", [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_masters_are_rounded_as_torch_rounds(torch, dtype, name):
    """Every upper half of a finite float32, with lower halves around a tie."""
    upper = np.arange(2**16, dtype=np.uint32)
    upper = upper[(upper & 0x7F80) != 0x7F80]
    for lower in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = upper << 16 | lower
        theirs = torch.from_numpy(bits.view(np.float32)).to(getattr(torch, name)).view(torch.uint8).numpy()
        assert np.array_equal(rounded(bits, dtype).view(np.uint8), theirs), lower


def test_a_state_in_the_copy_alone_is_checked_by_itself(tmp_path, verify, differs):
    root = make_training(tmp_path / "b", **CUT)
    source = tmp_path / "b-source"
    code, out, _ = verify(source, root)
    assert code == 0 and "it is checked by itself" in out and "not compared, checksums of" in out
    path = next((root / "optimizer").glob("*tp-1*.pt"))
    edit(path, lambda values: values["gradient_accumulator"].popitem())
    differs(source, root, [path.name, "has a state or a master, but not both"])


def test_a_copy_of_weights_alone(tmp_path, verify, differs):
    """A conversion that wrote weights only is meant to, by its manifest; a folder without one is not."""
    source, copy, back = make_training(tmp_path / "a"), tmp_path / "b", tmp_path / "hf"
    assert call(tmp_path / "a-source", copy, "--quiet", "--tp", "2") == 0
    code, out, _ = verify(source, copy)
    assert code == 0 and "it was converted as weights only" in out
    (copy / "stream_reshard.json").unlink()
    differs(source, copy, ["the source has a training state", "--allow states"])
    code, out, _ = verify(source, copy, "--allow", "states")
    assert code == 0 and "accepted states: " in out
    (tmp_path / "a-source").rename(back)
    code, out, _ = verify(source, back)
    assert code == 0 and "Hugging Face's format holds none" in out


def test_weights_are_verified_though_a_part_of_the_state_of_the_source_was_deleted(tmp_path, verify):
    source, copy = make_training(tmp_path / "a"), make_training(tmp_path / "b", tp=2)
    next((source / "optimizer").glob("*.pt")).unlink()
    assert verify(source, tmp_path / "a-source")[0] == 0
    code, _, problems = verify(source, copy)
    assert code == 3 and any("is missing: optimizer/optimizer_config.json is of TP=1" in line for line in problems)


def test_weights_alone_beside_states_that_cannot_be_read(tmp_path, verify, differs):
    """Release 0.4 has one group for all parameters."""
    source, copy = make_training(tmp_path / "a"), make_training(tmp_path / "b", tp=2)
    for path in (*source.glob("optimizer/*.pt"), *copy.glob("optimizer/*.pt")):
        edit(path, lambda values: values.update(param_groups=values["param_groups"][:1]))
    code, _, problems = verify(source, copy)
    assert code == 3 and any("it has 1 param_groups, one for each of" in line for line in problems)
    code, out, _ = verify(source, copy, "--allow", "states")
    assert code == 0 and "accepted states: the training state is not compared" in out
    poke(path := every(copy, "o_proj")[0], -1)
    differs(source, copy, ["o_proj"], "--allow", "states")


def test_a_schedule_that_is_written_exactly_is_the_same(tmp_path, verify, differs):
    source, copy = make_training(tmp_path / "a"), make_training(tmp_path / "b", **CUT)

    def exact(values):
        for group in values["param_groups"]:
            group["lr"] = group["initial_lr"]

    for path in copy.glob("optimizer/*.pt"):
        edit(path, exact)
    differs(source, copy, ["lr is "])
    for path in copy.glob("lr_scheduler/*.pt"):
        edit(path, lambda values: values.update(last_epoch=3))
    for pair in ((source, copy), (copy, source)):
        code, out, _ = verify(*pair)
        assert code == 0 and "goes on exactly where it stopped" in out


def test_rows_of_padding_are_states_and_are_compared(tmp_path, verify, differs):
    """13 rows are 14 at TP=2: the last of them is trained too, and only a user can say that it was padding."""
    config = {"config": {"vocab_size": 13}}
    whole, cut, other = (make_training(tmp_path / name, **config | sizes) for name, sizes in (
        ("a", {}), ("b", {"tp": 2}), ("c", CUT)))
    assert verify(cut, other)[0] == 0
    differs(whole, cut, ["exp_avg of model.embed_tokens.weight [13, 0] is", "padding, which must be zero"])
    assert verify(whole, cut, "--allow", "padding")[0] == 0
    differs(cut, whole, ["master of lm_head.weight: row 13 of the source is not zero", "--vocab-size 13"])
    assert verify(cut, whole, "--vocab-size", "13")[0] == 0


def test_trained_rows_of_padding_are_weights_too(tmp_path, verify, differs):
    """Those that both have need not be zero, but must be equal."""
    one, other = (make_training(tmp_path / name, masters=False, config={"vocab_size": 13}, tp=2, pp=pp) for name, pp in (
        ("a", 1), ("b", 2)))
    for root in (one, other):
        poke(last := every(root, "lm_head", "tp-rank-1")[0], -1)
    assert verify(one, other)[0] == 0
    poke(last, -1)
    differs(one, other, ["lm_head.weight [13, 15] is", "the source has"])


def test_a_training_as_its_trainer_saved_it_need_not_resume_from_itself(tmp_path, verify, differs):
    source = make_training(tmp_path / "a")
    edit_yaml(source, f"resume_checkpoint_path: {json.dumps(str(source))}", "resume_checkpoint_path: null")
    code, out, _ = verify(source, source)
    assert code == 0 and f"set it to '{source}' to resume" in out
    edit_yaml(source, "zero_stage: 0", "zero_stage: 1")
    differs(source, source, ["zero_stage is '1', the weights beside it need '0'"])


def test_tokens_of_a_dummy_dataset_are_told(tmp_path, verify, differs):
    source, copy = make_training(tmp_path / "a"), make_training(tmp_path / "b")
    metas = json.loads((copy / "checkpoint_metadata.json").read_text())["metas"]
    metas["data_stages"][0]["consumed_tokens_per_dataset_folder"] = {}
    edit_json(copy, "checkpoint_metadata.json", metas=metas)
    differs(source, copy, ["data_stages is", "add up to 0: Nanotron refuses to load it"])
    edit_json(source, "checkpoint_metadata.json", metas=metas)
    code, out, _ = verify(source, copy)
    assert code == 0 and "add up to 0" in out


@pytest.mark.heavy
def test_states_are_compared_in_little_memory(tmp_path):
    """58 MB of moments and masters on each side; the limit is kept, without torch."""
    source, roots = tmp_path / "hf", [tmp_path / "a", tmp_path / "b"]
    write_random_source(source, CONFIG)
    for root, sizes in zip(roots, ((1, 1, 1, 0), (2, 2, 3, 1))):
        tp, pp, dp, zero = sizes
        assert call(source, root, "--quiet", "--tp", tp, "--pp", pp, "--dp", dp) == 0
        write_states(root, *sizes)
        (root / "stream_reshard.json").unlink()
        start_here(root)
    code, peak, err = measured("verify", *roots, "--max-memory", "64MiB", "--allow", "padding")
    assert code == 0 and peak < 64 * 2**20, (peak, err)
    path = next((roots[1] / "optimizer").glob("*dp-2*tp-1*.pt"))
    edit(path, lambda values: values["state"][0]["exp_avg"].__setitem__(-1, 1))
    code, peak, err = measured("verify", *roots, "--max-memory", "64MiB", "--allow", "padding")
    assert code == 5 and peak < 64 * 2**20 and "exp_avg of" in err


def test_weights_that_were_made_from_masters(tmp_path, verify, differs):
    """They are compared with the masters, by the manifest; without it they are other weights."""
    source, copy = make_training(tmp_path / "a", **CUT), tmp_path / "b"
    assert call(source, copy, "--quiet", "--to", "hf", "--from-masters", "--vocab-size", "12", "--verify") == 0
    assert verify(source, copy)[0] == 0
    poke(path := every(copy, ".safetensors")[0], raw_of(path)[1])
    differs(source, copy, ["model.embed_tokens.weight [0, 0] is", "optimizer/optimizer_pp-0-of-2_dp-0"])
    (copy / "stream_reshard.json").unlink()
    differs(source, copy, ["model.embed_tokens.weight has the dtype F32, in the source BF16"])


@pytest.mark.parametrize("sizes, flags", [
    (CUT, ["--pp", "2"]), ({}, ["--tp", "2", "--dp", "2", "--zero", "1"]), (CUT, ["--schedule", "exact"]),
    ({"family": "qwen2_moe", "tp": 2}, ["--dp", "3", "--zero", "1"]), ({"tied": True}, ["--tp", "2", "--pp", "2"])])
def test_a_training_that_moved_is_the_same(tmp_path, verify, sizes, flags):
    source, copy = make_training(tmp_path / "a", **sizes), tmp_path / "b"
    assert call(source, copy, "--quiet", "--to", "nanotron", "--verify", *flags) == 0
    code, out, _ = verify(source, copy)
    assert code == 0 and "state    of step 4" in out and "not compared" not in out
