"""Verify finds what is wrong in the training state of a copy, and names it.

A row of a table is a remark, what is done to the copy, and the words the message must hold. Files are written anew, with
right checksums: it is the content that is found.
"""
import json
import shutil

import numpy as np
import pytest
from damage import edit_json, every, poke
from trees import raw_of
from training import edit, load, make_training, save

OPTIMIZER, SCHEDULE = "optimizer/optimizer_", "lr_scheduler/lr_scheduler_"


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """(a source, and copies of its state at two topologies, by their names)."""
    root = tmp_path_factory.mktemp("states")
    return {name: make_training(root / name, tied=True, config={"num_hidden_layers": 4}, **sizes) for name, sizes in {
        "source": {}, "plain": {"tp": 2, "pp": 2, "dp": 2}, "cut": {"tp": 2, "pp": 2, "dp": 2, "zero": 1}}.items()}


@pytest.fixture
def broken(states, tmp_path, differs):
    """broken(kind, damage, words): a copy with a damage is refused, in these words; returns the problems."""
    def run(kind, damage, words):
        shutil.copytree(states[kind], root := tmp_path / "copy")
        damage(root)
        problems = differs(states["source"], root, words)
        assert not any("resume_checkpoint_path" in problem for problem in problems)
        return problems
    return run


def rank(root, *words):
    """The optimizer's file whose name holds these words."""
    return every(root, OPTIMIZER, *words)[0]


def change(*words, where=OPTIMIZER, all=False):
    """A damage: `what` is done to the values of the file whose name holds these words, or of all such files."""
    def of(what):
        def damage(root):
            for path in every(root, where, ".pt", *words)[:None if all else 1]:
                edit(path, what)
        return damage
    return of


def raised(values, kind, number, place=-1):
    """One bit more in a tensor."""
    array = values["gradient_accumulator"][values["names"][number]] if kind == "master" else values["state"][number][kind]
    array.view(np.uint32).reshape(-1)[place] ^= 1


def exchanged(values, key, one, other):
    values[key][one], values[key][other] = values[key][other], values[key][one]


def exchange(root, one, other, where=OPTIMIZER):
    """Two files change places."""
    first, second = every(root, where, *one)[0], every(root, where, *other)[0]
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1])
    second.write_bytes(content[0])


def exchange_values(root, one, other):
    """The same with the values alone, under the folders of their files."""
    first, second = rank(root, *one), rank(root, *other)
    values = load(first), load(second)
    save(first, values[1])
    save(second, values[0])


def reword(name, text, other):
    def damage(root):
        path = root / name
        assert text in path.read_text()
        path.write_text(path.read_text().replace(text, other, 1))
    return damage


def config(**changes):
    return lambda root: edit_json(root, "optimizer/optimizer_config.json", **changes)


def metas(root, **changes):
    document = json.loads((root / "checkpoint_metadata.json").read_text())
    edit_json(root, "checkpoint_metadata.json", metas=document["metas"] | changes)


def groups(**settings):
    """A setting of the fourth parameter of each file."""
    return lambda values: values["param_groups"][3].update(settings)


ONE, OTHER, LAST = ("pp-0", "tp-0"), ("pp-0", "tp-1"), ("pp-1", "tp-0")
SIZES = {"tp_size": "2", "pp_size": "2", "dp_size": "2", "expert_parallel_size": "1"}

FINDINGS = [
    ("a moment", "plain", change(*OTHER)(lambda v: raised(v, "exp_avg", 2)),
     ["exp_avg of model.layers.0.self_attn.v_proj.weight [7, 15] is", "at [15, 15] of the shard; the source has"]),
    ("another moment", "cut", change("dp-1", *OTHER)(lambda v: raised(v, "exp_avg_sq", 3)),
     ["exp_avg_sq of model.layers.0.self_attn.o_proj.weight [15, 15]", "at [15, 7] of the shard"]),
    ("a master", "cut", change("dp-1", *LAST)(lambda v: raised(v, "master", 0)), ["master of", "of the shard"]),
    ("a replica of a norm", "plain", change(*OTHER)(lambda v: raised(v, "exp_avg", 1)),
     ["exp_avg of model.layers.0.input_layernorm.weight [15]", "another rank has"]),
    ("a replica of a master", "cut", change("dp-0", *OTHER)(lambda v: raised(v, "master", 1, 0)),
     ["master of model.layers.0.input_layernorm.weight [0]", "another rank has"]),
    ("the tied copy", "plain", change(*LAST)(lambda v: raised(v, "exp_avg", len(v["names"]) - 1)),
     ["exp_avg of model.embed_tokens.weight [5, 15]", "another rank has"]),
    ("a step", "plain", change(*ONE)(lambda v: v["state"][2]["step"].fill(5)),
     ["its parameters are of several steps: 4.0, 5.0"]),
    ("steps of a rank", "plain", change(*ONE)(lambda v: [one["step"].fill(3) for one in v["state"].values()]),
     ["is of step 4", "of 3"]),
    ("all steps", "cut", change(all=True)(lambda v: [one["step"].fill(3) for one in v["state"].values()]),
     ["has done 3.0 steps, in the source 4.0"]),
    ("a setting", "cut", change("pp-0", all=True)(groups(weight_decay=0.5)),
     ["param_groups of 'model.decoder.0.pp_block.attn.o_proj.weight': weight_decay is '0.5', in the source '0.01'"]),
    ("a setting of another type", "cut", change("pp-0", all=True)(groups(betas=[0.9, 0.95])),
     ["betas is '[0.9, 0.95]', in the source '(0.9, 0.95)'"]),
    ("a setting of the tied copy", "plain", change("pp-1", all=True)(lambda v: v["param_groups"][-1].update(eps=1.0)),
     ["param_groups of 'model.token_position_embeddings.pp_block.token_embedding.weight': eps is '1.0'"]),
    ("a setting on one rank", "cut", change("dp-1", *OTHER)(groups(lr=0.5)), ["of the same stage have other param_groups"]),
    ("ids exchanged", "plain",
     change(*ONE)(lambda v: [exchanged(v, key, 2, 3) for key in ("state", "names")]),
     ["its state 2 is that of 'model.decoder.0.pp_block.attn.o_proj.weight'", "as it goes by position"]),
    ("states exchanged", "plain", change("pp-0", all=True)(lambda v: exchanged(v, "state", 1, 4)),
     ["exp_avg of model.layers.0.input_layernorm.weight [0]"]),
    ("ids of groups exchanged", "cut", change(*ONE)(lambda v: [group.update(params=[3 - n]) for n, group in enumerate(
        v["param_groups"][:4])]), ["the params of 'model.token_position_embeddings", "are '[3]', not [0]"]),
    ("a group too many", "plain", change(*ONE)(lambda v: v["param_groups"].append(dict(v["param_groups"][-1]))),
     ["param_groups, one for each of the"]),
    ("tensor-parallel ranks exchanged", "plain", lambda c: exchange(c, ONE, OTHER), ["exp_avg of", "its master rounds to"]),
    ("data-parallel ranks exchanged", "cut", lambda c: exchange_values(c, ("dp-0", *ONE), ("dp-1", *ONE)),
     ["exp_avg of model.embed_tokens.weight [0, 0]", "its master rounds to"]),
    ("stages exchanged", "plain", lambda c: exchange(c, ONE, LAST), ["it has 8 param_groups, one for each of the 19"]),
    ("a rank missing", "cut", lambda c: rank(c, "dp-1", *OTHER).unlink(), ["dp-1-of-2_tp-1-of-2", "is missing"]),
    ("a stale rank", "plain", lambda c: shutil.copy(path := rank(c, *ONE), str(path).replace("tp-0-of-2", "tp-0-of-4")),
     ["tp-0-of-4", "is extra: optimizer/optimizer_config.json is of TP=2 PP=2 DP=2"]),
    ("a stale stage", "cut", lambda c: shutil.copy(path := rank(c, *ONE), str(path).replace("pp-0-of-2", "pp-0-of-1")),
     ["pp-0-of-1", "is extra"]),
    ("a schedule missing", "cut", lambda c: every(c, SCHEDULE, *LAST)[0].unlink(), ["lr_scheduler_pp-1", "is missing"]),
    ("a random state missing", "cut", lambda c: every(c, "random/", "dp-1")[0].unlink(), ["random/", "is missing"]),
    ("a random state of another training", "cut", lambda c: save(every(c, "random/", "dp-1")[0], {"seed": 1}),
     ["dp-1-of-2", "holds a state of the random generators that no rank of the source has"]),
    ("a random state that is no zip", "cut", lambda c: every(c, "random/", "dp-1")[0].write_text("x"), ["dp-1-of-2"]),
    ("no config", "cut", lambda c: (c / "optimizer/optimizer_config.json").unlink(), ["optimizer_config.json"]),
    ("of another dp", "cut", config(parallelism=SIZES | {"dp_size": "4"}), ["has dp '2'", "has 4"]),
    ("of another tp", "plain", config(parallelism=SIZES | {"tp_size": "4"}), ["is of TP=4 PP=2, the weights"]),
    ("no parallelism", "plain", config(parallelism={}), ["parallelism is '{}'"]),
    ("another config", "plain", config(configs=...), ["it has", "where Nanotron writes configs, parallelism, type"]),
    ("of experts", "plain", config(parallelism=SIZES | {"expert_parallel_size": "2"}), ["expert_parallel_size is '2'"]),
    ("another type", "plain", config(type="NamedOptimizer"), ["the files are those of OptimizerFromGradientAccumulator"]),
    ("offsets", "cut", reword("optimizer/optimizer_config.json", '["0", "48"]', '["0", "47"]'),
     ["param_name_to_dp_rank_offsets does not describe"]),
    ("shapes", "cut", reword("optimizer/optimizer_config.json", '["6", "16"]', '["16", "6"]'),
     ["orig_param_shapes does not describe"]),
    ("a shape", "plain", change(*ONE)(lambda v: v["state"][0].update(exp_avg=v["state"][0]["exp_avg"].T.copy())),
     ["exp_avg of 'token_position_embeddings.pp_block.token_embedding.weight' has the shape (16, 6), this rank needs"]),
    ("a dtype", "plain", change(*ONE)(lambda v: v["state"][0].update(exp_avg=np.zeros((6, 16), np.uint16))),
     ["exp_avg of", "has the dtype F32, BF16 in"]),
    ("a narrow master", "plain", change(*ONE)(lambda v: v["gradient_accumulator"].update(
        {v["names"][0]: np.zeros((6, 16), np.uint16)})), ["master of", "has the dtype BF16, where Nanotron has F32"]),
    ("no masters on a rank", "plain", change(*ONE)(lambda v: v.pop("gradient_accumulator")), ["other ranks exp_avg"]),
    ("a master too few", "plain", change(*ONE)(lambda v: v["gradient_accumulator"].popitem()), ["has a state or a master"]),
    ("no moments of one kind", "plain", change(all=True)(lambda v: [one.pop("exp_avg") for one in v["state"].values()]),
     ["keeps exp_avg_sq, master, in the source exp_avg, exp_avg_sq, master"]),
    ("a kind at one parameter", "plain", change(*ONE)(lambda v: v["state"][0].pop("exp_avg")), ["states of several kinds"]),
    ("a kind of no name", "plain", change(*ONE)(lambda v: [one.update({"\x1b": one["step"]}) for one in v["state"].values()]),
     ["it has a state of the kind '\\x1b'"]),
    ("a setting of no name", "plain", change("pp-0", all=True)(groups(**{"\x1b": 1})), ["'\\x1b' is '1', in the source"]),
    ("saved before a step", "plain", change(*ONE)(lambda v: v.update(state={}, names={}, gradient_accumulator={})),
     ["no step was done before it was saved"]),
    ("another pickle", "plain", lambda c: save(rank(c, *ONE), {"model": {}}), ["where the state of Nanotron's optimizer has"]),
    ("lists", "plain", lambda c: edit(rank(c, *ONE), lambda v: v.update(state=[])), ["are no dicts and lists"]),
    ("a rate of the schedule", "cut", change("pp-1", where=SCHEDULE, all=True)(lambda v: v["base_lrs"].__setitem__(2, 9.0)),
     ["the schedule of 'model.decoder", "base_lrs is '9.0'"]),
    ("a schedule on one rank", "cut", change(*OTHER, where=SCHEDULE)(lambda v: v.update(last_epoch=3)), ["last_epoch is"]),
    ("all schedules", "plain", change(where=SCHEDULE, all=True)(lambda v: v.update(_step_count=9)),
     ["the schedule: _step_count is '9', in the source '5'"]),
    ("a number that is equal but not the same", "plain", change(where=SCHEDULE, all=True)(lambda v: v.update(_is_initial=0)),
     ["the schedule: _is_initial is '0', in the source 'False'"]),
    ("a short schedule", "plain", change(*LAST, where=SCHEDULE)(lambda v: v["lr_lambdas"].pop()), ["lr_lambdas has"]),
    ("schedules of stages exchanged", "cut", lambda c: exchange(c, ONE, LAST, SCHEDULE), ["entries, its stage has"]),
    ("no schedule", "plain", lambda c: save(every(c, SCHEDULE)[0], {}), ["it is no state of a schedule"]),
    ("samples", "cut", lambda c: metas(c, consumed_train_samples=49), ["consumed_train_samples is '49'", "add up to 48"]),
    ("the step", "cut", lambda c: metas(c, last_train_step=5), ["last_train_step is '5', in the source '4'"]),
    ("no step", "cut", lambda c: metas(c, last_train_step=None), ["without a last_train_step"]),
    ("weights of another step", "plain", lambda c: poke(path := every(c, "input_layernorm")[0], raw_of(path)[1]),
     ["its master rounds to", "the source has"])]


@pytest.mark.parametrize("kind, damage, words", [pytest.param(*row[1:], id=row[0]) for row in FINDINGS])
def test_what_is_wrong_is_found_and_named(broken, kind, damage, words):
    broken(kind, damage, words)


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq", "master"])
def test_one_number_is_one_line(broken, kind):
    """A master of which only the last bits change still rounds to its weight."""
    assert len(broken("cut", change("dp-1", *OTHER)(lambda v: raised(v, kind, 3)), [f"{kind} of"])) == 1


def test_a_cut_of_another_rule_is_found(states, tmp_path, verify, differs):
    """The last parts are shorter by one; here one of these is as long as the others."""
    root = make_training(tmp_path / "copy", tied=True, config={"num_hidden_layers": 4}, dp=5, zero=1)
    path = rank(root, "dp-3")

    def longer(values):
        for kind in ("exp_avg", "exp_avg_sq"):
            values["state"][1][kind] = np.append(values["state"][1][kind], np.float32(1))

    assert verify(states["source"], root)[0] == 0
    edit(path, longer)
    differs(states["source"], root, ["exp_avg of", "has the shape (4,), this rank needs (3,)"])
