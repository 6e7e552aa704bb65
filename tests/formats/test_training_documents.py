"""The documents of a training at another topology are what Nanotron saves there; what cannot go on is refused in words."""
import json
import re
from pathlib import Path

import pytest
import yaml
from golden_training import GOLDEN_TRAINING, HERE, PAIRS, TREES, by_name, documents_of, names_of, optimizer_files, rows_of

from stream_reshard.errors import Refused, ResourceError, SourceError, UsageError
from stream_reshard.formats.nanotron.training.documents import optimizer_config, read_training_documents
from stream_reshard.formats.nanotron.training.fitness import fitness_notes, fitness_problems
from stream_reshard.model.topology import Topology

PLACES = re.compile(r"^  (checkpoints_path|resume_checkpoint_path|ignore_sanity_checks|train_steps): .*$", re.M)
"""Lines of config.yaml in which the golden trees differ by how they were made."""

UNEVEN = re.compile(PLACES.pattern + r"|^  batch_accumulation_per_replica: .*$", re.M)


@HERE
@pytest.mark.parametrize("tree, other", PAIRS, **by_name)
def test_documents_are_those_that_nanotron_saves(tree, other):
    wanted = documents_of(other)
    made = documents_of(tree).moved(wanted.topology, wanted.zero, rows_of(other), 1, Path("/new/place"))
    assert set(made) == {"config.yaml", "checkpoint_metadata.json", "model_config.json"}
    # Its makers let three replicas take 3 samples a step in place of 4.
    masked = UNEVEN if "dp3" in tree.name + other.name else PLACES
    for name, content in made.items():
        ours, theirs = content.decode(), (other / name).read_text()
        assert masked.sub("", ours) == masked.sub("", theirs)
    checkpoints = yaml.safe_load(made["config.yaml"])["checkpoints"]
    assert checkpoints["resume_checkpoint_path"] == "/new/place"
    assert checkpoints["checkpoints_path"] == "/new/place-training"


@HERE
@pytest.mark.parametrize("tree", [*TREES, GOLDEN_TRAINING / "wide_dp40_zero1"], **by_name)
def test_the_optimizer_s_config_is_that_which_nanotron_saves(tree):
    """Shapes are those in the files of a training of the same state without ZeRO."""
    path = tree / "optimizer" / "optimizer_config.json"
    saved = json.loads(path.read_text())
    tp, pp, dp = (int(saved["parallelism"][f"{axis}_size"]) for axis in ("tp", "pp", "dp"))
    zero = int(saved["type"] == "ZeroDistributedOptimizer")
    family = "tied" if tree.name.startswith("tied") else "moe" if tree.name.startswith("moe") else "untied"
    whole = {"tied": {1: "tied_tp1_pp1_dp1_zero0", 2: "tied_tp2_pp2_dp1_zero0"},
             "moe": {1: "moe_tp1_pp1_dp1_zero0", 2: "moe_tp2_pp1_dp1_zero0"},
             "untied": {1: "untied_tp1_pp1_dp1_zero0", 2: "untied_tp2_pp1_dp2_zero0"}}[family][tp]
    shapes = {file.contents["names"][i]: state["exp_avg"].shape for stage in range(len(names_of(GOLDEN_TRAINING / whole)))
              for file in optimizer_files(GOLDEN_TRAINING / whole, stage)[:1]
              for i, state in file.contents["state"].items()}
    has_masters = "gradient_accumulator" in optimizer_files(tree, 0)[0].contents
    made = optimizer_config(Topology(tp, pp, dp), zero, has_masters, [(name, shapes[name]) for name in names_of(tree)[0]])
    assert made == path.read_bytes()


def test_the_optimizer_s_class_is_that_of_its_files():
    """Without ZeRO masters make another class; with ZeRO they do not."""
    types = {(zero, masters): json.loads(optimizer_config(Topology(), zero, masters, [("a", (3,))]))["type"]
             for zero in (0, 1) for masters in (False, True)}
    assert types == {(0, False): "NamedOptimizer", (0, True): "OptimizerFromGradientAccumulator",
                     (1, False): "ZeroDistributedOptimizer", (1, True): "ZeroDistributedOptimizer"}


CONFIG = {"parallelism": {"tp": 1, "pp": 1, "dp": 2, "pp_engine": "1f1b"}, "optimizer": {"zero_stage": 1, "weight_decay": 0.01},
          "model": {"model_config": {"vocab_size": 128, "hidden_size": 32}}, "checkpoints": {"checkpoints_path": "/old"},
          "tokens": {"micro_batch_size": 2, "batch_accumulation_per_replica": 6, "train_steps": 100},
          "general": {"run": "yes", "step": 10, "seed": 42},
          "data_stages": [{"name": "stable", "data": {"dataset": None}}]}
STAGE = {"name": "stable", "consumed_train_samples": 240, "consumed_tokens_per_dataset_folder": {"/a": 1000, "/b": 2840}}
METADATA = {"version": "1.5", "tp": 1, "dp": 2, "cp": 1,
            "metas": {"last_train_step": 10, "consumed_train_samples": 240, "consumed_tokens_total": 3840,
                      "last_stage_idx": 0, "data_stages": [STAGE]}}
OPTIMIZER = {"type": "ZeroDistributedOptimizer", "parallelism": {"tp_size": "1", "dp_size": "2", "pp_size": "1"}}


def changed(value, path, new):
    """The value with another one at a path of keys, or without it."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    key, *below = path
    if new is None and not below:
        del copy[key]
    else:
        copy[key] = changed(copy[key], below, new) if below else new
    return copy


@pytest.fixture
def saved(tmp_path):
    """saved(document, path, value): the documents of a training, one of them changed, in a folder."""
    def write(*changes):
        documents = {"config.yaml": CONFIG, "checkpoint_metadata.json": METADATA, "model_config.json": {"vocab_size": 128},
                     "optimizer/optimizer_config.json": OPTIMIZER}
        for name, path, value in changes:
            documents[name] = changed(documents[name], path, value)
        (tmp_path / "optimizer").mkdir(exist_ok=True)
        for name, document in documents.items():
            (tmp_path / name).write_text(yaml.dump(document) if name.endswith("yaml") else json.dumps(document))
        return tmp_path
    return write


def yaml_at(*path, value):
    return "config.yaml", path, value


def metas_at(*path, value):
    return "checkpoint_metadata.json", ("metas", *path), value


def faults(saved, topology, *changes):
    return list(map(str, fitness_problems(read_training_documents(saved(*changes)), topology)))


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 6, 12])
def test_a_step_has_as_many_samples_at_any_number_of_replicas(saved, dp):
    documents = read_training_documents(saved())
    assert not fitness_problems(documents, Topology(dp=dp))
    config = yaml.safe_load(documents.moved(Topology(dp=dp), 1, 128, 1, Path("/new"))["config.yaml"])
    tokens = config["tokens"]
    assert tokens["micro_batch_size"] * tokens["batch_accumulation_per_replica"] * config["parallelism"]["dp"] == 24
    assert (config["general"], config["data_stages"]) == (CONFIG["general"], CONFIG["data_stages"])


def test_metadata_keep_all_but_the_topology(saved):
    """Sorted, as Nanotron writes them."""
    made = read_training_documents(saved()).moved(Topology(2, 1, 4), 1, 128, 1, Path("/new"))["checkpoint_metadata.json"]
    assert made.decode() == json.dumps(METADATA | {"tp": 2, "dp": 4}, indent=2, sort_keys=True)


def test_settings_that_an_older_trainer_does_not_know_are_not_added(saved):
    """And those that leave a part of the state behind are not kept."""
    def checkpoints(documents):
        return yaml.safe_load(documents.moved(Topology(), 0, 128, 1, Path("/new"))["config.yaml"])["checkpoints"]

    assert set(checkpoints(read_training_documents(saved()))) == {"checkpoints_path", "resume_checkpoint_path"}
    documents = read_training_documents(saved(yaml_at("checkpoints", "load_optimizer", value=False)))
    assert checkpoints(documents)["load_optimizer"] is True
    assert list(fitness_notes(documents, 128)) == ["config.yaml: load_optimizer was 'False', and is true now"]


@pytest.mark.parametrize("place", ["/a: b #c", "/\u00e9\u4e2d", "/caf\udce9", "/" + "long words " * 20, "/yes\n"])
def test_every_path_is_read_back(saved, place):
    """Also one that is not UTF-8, or that YAML could take for something else."""
    made = read_training_documents(saved()).moved(Topology(), 1, 128, 1, Path(place))["config.yaml"]
    assert made.isascii() and yaml.safe_load(made)["checkpoints"]["resume_checkpoint_path"] == place


@pytest.mark.parametrize("topology, changes, words", [
    (Topology(dp=5), [], "--dp 5: a step takes 24 samples, 2 at once (micro_batch_size), and 5 replicas cannot share them "
                         "evenly; --dp can be 1, 2, 3, 4, 6, 12"),
    (Topology(dp=24), [], "12 micro batches, which leaves some of 24 replicas without one"),
    (Topology(pp=4, dp=6), [], "--dp 6: each replica has 2 micro batches in a step, and pp_engine 1f1b needs at least 3 for "
                               "4 stages; --dp can be 1, 2, 3, 4"),
    (Topology(pp=16, dp=1), [], "needs at least 15 for 16 stages; at --pp 16 no --dp can; choose a smaller one"),
    (Topology(dp=6), [metas_at("data_stages", 0, "consumed_train_samples", value=244)],
     "--dp 6: 244 samples are consumed, which 6 replicas cannot skip evenly; --dp can be 1, 2, 4"),
    (Topology(), [yaml_at("parallelism", "context_parallel_size", value=2)],
     "config.yaml: context_parallel_size is 2: several ranks save"),
    (Topology(), [yaml_at("parallelism", "expert_parallel_size", value=4)], "expert_parallel_size is 4: Nanotron's trainer")])
def test_what_cannot_go_on_is_refused(saved, topology, changes, words):
    problem, = faults(saved, topology, *changes)
    assert words in problem


def test_the_kind_of_a_refusal_is_of_who_can_change_it(saved):
    problems = fitness_problems(read_training_documents(saved(yaml_at("parallelism", "context_parallel_size", value=2))),
                                Topology(dp=5))
    assert [type(problem) for problem in problems] == [SourceError, UsageError]


def test_another_engine_takes_fewer_micro_batches(saved):
    assert faults(saved, Topology(pp=4, dp=6), yaml_at("parallelism", "pp_engine", value="afab")) == []


def test_formats_without_data_stages_count_all_samples(saved):
    older = [metas_at("data_stages", value=None), metas_at("last_stage_idx", value=None)]
    assert faults(saved, Topology(dp=12), *older) == []
    assert "244 samples" in faults(saved, Topology(dp=12), *older, metas_at("consumed_train_samples", value=244))[0]


@pytest.mark.parametrize("changes, words", [
    ([metas_at("data_stages", 0, "consumed_tokens_per_dataset_folder", value={})],
     "consumed_tokens_total is 3840, its data stages name 0; Nanotron will not load it"),
    ([metas_at("consumed_train_samples", value=250)], "consumed_train_samples is 250, its data stages name 240"),
    ([yaml_at("tokens", "train_steps", value=10)], "train_steps is 10, and 10 steps are done"),
    ([yaml_at("data_stages", 0, "data", "dataset", value={"dataset_folder": "/d", "vocab_size": 126})],
     "data stage 'stable' has vocab_size '126', the model 128 with padding")])
def test_what_nanotron_will_refuse_is_told(saved, changes, words):
    assert list(fitness_notes(read_training_documents(saved()), 128)) == []
    note, = fitness_notes(read_training_documents(saved(*changes)), 128)
    assert words in note


def test_random_data_leave_no_note_once_the_total_is_null(saved):
    """The cure that the note gives."""
    changes = [metas_at("data_stages", 0, "consumed_tokens_per_dataset_folder", value={}), metas_at("consumed_tokens_total", value=None)]
    assert list(fitness_notes(read_training_documents(saved(*changes)), 128)) == []


@pytest.mark.parametrize("change, words", [
    (yaml_at("tokens", value=None), "config.yaml: tokens is 'None', not an object"),
    (yaml_at("tokens", "micro_batch_size", value=0), "tokens: micro_batch_size is '0', not a positive int"),
    (yaml_at("parallelism", "dp", value=True), "parallelism: dp is 'True', not a positive int"),
    (yaml_at("parallelism", "context_parallel_size", value="2"), "context_parallel_size is '2', not a positive int"),
    (yaml_at("model", "model_config", value=None), "model: model_config is 'None', not an object"),
    (yaml_at("optimizer", "zero_stage", value=None), "optimizer: zero_stage is missing"),
    (yaml_at("parallelism", "tp", value=2), "config.yaml states TP=2 PP=1 DP=2 and zero_stage 1, "
                                            "optimizer/optimizer_config.json TP=1 PP=1 DP=2 and zero_stage 1"),
    (yaml_at("optimizer", "zero_stage", value=0), "and zero_stage 0, optimizer/"),
    (("checkpoint_metadata.json", ("metas",), []), "metas is '[]', not an object"),
    (metas_at("last_train_step", value=-1), "last_train_step is '-1'"),
    (metas_at("last_train_step", value=False), "last_train_step is 'False'"),
    (metas_at("consumed_tokens_total", value="many"), "consumed_tokens_total is 'many'"),
    (metas_at("last_stage_idx", value=1), "last_stage_idx is '1', which is none of the data_stages"),
    (metas_at("data_stages", value=7), "last_stage_idx is '0', which is none of the data_stages '7'"),
    (metas_at("data_stages", 0, value=[]), "metas: data_stages is '[]', not an object"),
    (metas_at("data_stages", 0, "consumed_train_samples", value=None), "data_stages: consumed_train_samples is missing"),
    (("optimizer/optimizer_config.json", ("type",), "SGD"), "type is 'SGD', not one of Nanotron's optimizers"),
    (("optimizer/optimizer_config.json", ("parallelism", "dp_size"), "-2"), "dp_size is '-2', not a positive int"),
    (("optimizer/optimizer_config.json", ("parallelism",), None), "parallelism is 'None', not an object")])
def test_documents_that_no_trainer_saved_are_refused(saved, change, words):
    with pytest.raises(Refused) as refused:
        read_training_documents(saved(change))
    assert words in str(refused.value) and refused.value.exit_code == 3


def test_all_problems_are_told_at_once(saved):
    root = saved(yaml_at("tokens", value=None), metas_at("last_train_step", value=None))
    (root / "model_config.json").write_text("{")
    with pytest.raises(Refused) as refused:
        read_training_documents(root)
    assert len(refused.value.problems) == 3


def test_every_stage_of_zero_beyond_0_is_the_same_to_nanotron(saved):
    assert read_training_documents(saved(yaml_at("optimizer", "zero_stage", value=2))).zero == 1


def test_documents_larger_than_the_room_in_memory_are_not_parsed(saved):
    with pytest.raises(Refused) as refused:
        read_training_documents(saved(), 100)
    assert any(isinstance(problem, ResourceError) for problem in refused.value.problems)


@pytest.mark.parametrize("name", ["config.yaml", "checkpoint_metadata.json", "model_config.json", "optimizer/optimizer_config.json"])
def test_every_document_is_needed(saved, name):
    root = saved()
    (root / name).unlink()
    with pytest.raises(Refused, match=re.escape(name)):
        read_training_documents(root)
