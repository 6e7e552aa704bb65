"""--layers N gives what a model of only N layers with these weights gives, reads nothing else, and says so."""
import json
import shutil

import pytest
from conversions import convert, tensors, tree
from refusals import refuse
from running import call, opened
from sources import INDEX, first_layers, make_source, read

from stream_reshard import api
from stream_reshard.convert.conversion import Options, plan_conversion, run_conversion
from stream_reshard.errors import Interrupted

FOUR = {"num_hidden_layers": 4}
MODELS = {"llama": {}, "tied": {"tied": True}, "mistral": {"family": "mistral"}, "qwen2": {"family": "qwen2"},
          "qwen2_moe": {"family": "qwen2_moe"},
          "smollm3": {"family": "smollm3", "tied": True, "config": {"no_rope_layers": [1, 0, 1, 0]}}}
TP2 = ("--tp", 2, "--pp", 2)


def make(root, name="llama", **more):
    """A source of four layers."""
    told = MODELS[name] | more
    return make_source(root, **told | {"config": FOUR | told.get("config", {})})


@pytest.fixture
def source(tmp_path):
    return make(tmp_path / "hf")


def documents(root):
    """The documents of a checkpoint, without what marks it as truncated, and without its own name."""
    found = {path.name: path.read_text().replace(f"/{root.name}", "/DST") for path in root.iterdir()
             if path.suffix in (".json", ".yaml") and path.name != "stream_reshard.json"}
    if "config.json" in found:
        config = json.loads(found["config.json"])
        found["config.json"] = {key: value for key, value in config.items() if key != "whole_num_hidden_layers"}
    if "config.yaml" in found:
        found["config.yaml"] = [line for line in found["config.yaml"].splitlines() if "not a whole model" not in line]
    return found


def assert_alike(one, other):
    """The same weights in the same files, and the same documents."""
    assert tree(one) == tree(other) if (one / "model").is_dir() else read(one / "model.safetensors").keys() == read(
        other / "model.safetensors").keys()
    assert {key: array.tobytes() for key, array in tensors(one).items()} == {
        key: array.tobytes() for key, array in tensors(other).items()}
    assert documents(one) == documents(other)


@pytest.mark.parametrize("name", MODELS)
def test_the_output_is_that_of_a_model_of_so_many_layers(tmp_path, name):
    """From shards to ranks and shards; from ranks to shards and other ranks, where the checkpoint is cut or the way."""
    whole = make(tmp_path / "hf", name)
    small = first_layers(whole, tmp_path / "small", 2)
    for source, flags in ((whole, ("--layers", 2)), (small, ())):
        convert(source, tmp_path / f"nt_{source.name}", *TP2, *flags)
        convert(source, tmp_path / f"shards_{source.name}", "--to", "hf", *flags)
    convert(whole, tmp_path / "ranks", "--tp", 2, "--pp", 3, "--vocab-multiple", 8)
    convert(tmp_path / "ranks", tmp_path / "nt_across", "--to", "nanotron", *TP2, "--layers", 2)
    convert(tmp_path / "ranks", tmp_path / "shards_across", "--to", "hf", "--layers", 2)
    convert(tmp_path / "nt_hf", tmp_path / "shards_back", "--to", "hf")
    for made in ("nt_hf", "nt_across"):
        assert_alike(tmp_path / made, tmp_path / "nt_small")
        convert("verify", small, tmp_path / made)
    convert(tmp_path / "nt_small", tmp_path / "shards_small_back", "--to", "hf")
    assert_alike(tmp_path / "shards_hf", tmp_path / "shards_small")
    assert api.diff(tmp_path / "shards_hf", tmp_path / "shards_small").facts["same"]
    for made in ("shards_across", "shards_back"):
        assert_alike(tmp_path / made, tmp_path / "shards_small_back")


@pytest.mark.parametrize("num_shards", [1, 4])
def test_pickled_shards_are_cut_too(tmp_path, num_shards):
    pytest.importorskip("torch")
    from pickles import pickle_shards
    whole = make(tmp_path / "hf", num_shards=num_shards)
    pickled = pickle_shards(shutil.copytree(whole, tmp_path / "bin"))
    for source in (whole, pickled):
        convert(source, tmp_path / f"nt_{source.name}", *TP2, "--layers", 1)
    assert tree(tmp_path / "nt_bin") == tree(tmp_path / "nt_hf")
    convert("verify", pickled, tmp_path / "nt_bin")


def test_a_template_of_so_many_layers_is_filled(tmp_path, source):
    convert(first_layers(source, tmp_path / "small", 2), tmp_path / "template", *TP2)
    convert(source, tmp_path / "nt", "--layers", 2, "--template", tmp_path / "template")
    assert tree(tmp_path / "nt") == tree(tmp_path / "template")


def test_shards_that_hold_nothing_needed_need_not_exist(tmp_path, capsys):
    """Nor are they opened, or called strange, where they do exist."""
    source = make(tmp_path / "hf", num_shards=8)
    index = json.loads((source / INDEX).read_text())["weight_map"]
    needed = {name for key, name in index.items() if not key.startswith(("model.layers.2", "model.layers.3"))}
    others = set(index.values()) - needed
    with opened() as paths:
        convert(source, tmp_path / "nt", *TP2, "--layers", 2)
    assert others and not {str(source / name) for name in others} & set(paths)
    assert {str(source / name) for name in needed} <= set(paths)
    assert not [note for note in api.plan(source, layers=2).notes if "safetensors" in note]
    for name in others:
        (source / name).unlink()
    convert(source, tmp_path / "again", *TP2, "--layers", 2, "--verify")
    assert tree(tmp_path / "again") == tree(tmp_path / "nt")
    convert("verify", source, tmp_path / "nt")
    (source / min(needed)).unlink()
    told = refuse(capsys, tmp_path, 3, [f"names '{min(needed)}', which is missing"], ("--layers", 2), destination="no")
    assert not any(name in "\n".join(told) for name in others)


def test_a_shard_is_read_only_where_needed(tmp_path, capsys):
    source = make(tmp_path / "hf", config={"hidden_size": 32, "vocab_size": 11, "intermediate_size": 96})
    convert(source, tmp_path / "nt", "--layers", 1, "--digests", "none", "--json")
    told = json.loads(capsys.readouterr().out)
    size = (source / "model.safetensors").stat().st_size
    assert 2 * told["num_parameters"] <= told["io"]["rchar"] < 2 * told["num_parameters"] + size / 4


def test_files_of_other_layers_need_not_exist(tmp_path, source):
    """Nor are they opened; as many files as the ranks that they name are not asked for."""
    convert(source, tmp_path / "ranks", "--tp", 2, "--pp", 4)
    with opened() as paths:
        convert(tmp_path / "ranks", tmp_path / "one", "--to", "hf", "--layers", 1)
    assert not [path for path in paths if f"{tmp_path}/ranks/model/model/decoder/" in path and "/decoder/0/" not in path]
    for layer in (1, 2, 3):
        shutil.rmtree(tmp_path / "ranks" / "model" / "model" / "decoder" / str(layer))
    convert(tmp_path / "ranks", tmp_path / "again", "--to", "hf", "--layers", 1)
    assert_alike(tmp_path / "again", tmp_path / "one")
    assert call(tmp_path / "ranks", tmp_path / "no", "--to", "hf", "--layers", 2, "--quiet") == 3


def test_few_layers_of_many_stages(tmp_path):
    """One layer has fewer files than the model has stages; its blocks stand where the whole model's balancing puts them."""
    source = make_source(tmp_path / "hf", config={"num_hidden_layers": 16, "hidden_size": 8, "intermediate_size": 12})
    convert(source, tmp_path / "ranks", "--pp", 16)
    assert api.plan(tmp_path / "ranks", to="hf", layers=1).notes == ()
    convert(tmp_path / "ranks", tmp_path / "back", "--to", "hf", "--layers", 1, "--verify")
    convert("verify", source, tmp_path / "back")


@pytest.mark.parametrize("key, layers, code", [
    ("model.layers.3.self_attn.q_norm.weight", 2, 0), ("model.layers.3.self_attn.rotary_emb.inv_freq", 2, 0),
    ("layers.3.odd", 2, 0), ("model.layers.1.self_attn.q_norm.weight", 2, 3), ("model.layers.4.odd", 2, 3),
    ("odd", 2, 3)])
def test_strange_tensors_count_in_the_layers_that_are_taken(tmp_path, key, layers, code):
    """And past the layers of the whole model."""
    source = make(tmp_path / "hf", extra={key: read(make(tmp_path / "other") / "model.safetensors")["lm_head.weight"]})
    assert call(source, tmp_path / "nt", "--layers", layers, "--quiet") == code
    assert call(source, tmp_path / "whole", "--quiet") == (0 if "inv_freq" in key else 3)


def test_tensors_of_other_layers_are_no_cause(tmp_path, capsys):
    """A setting of quantised weights, and a weight that is missing: what is left out is not taken for the quantised."""
    make(tmp_path / "hf", drop=["model.norm.weight"], config={"quantization_config": {"quant_method": "gptq"}})
    assert refuse(capsys, tmp_path, 3, ["model.norm.weight is missing"], ("--layers", 2)) == [
        "model.norm.weight is missing"]


def test_the_mark_goes_along(tmp_path, capsys, source):
    """To both formats and back, where no flag says it again; a cut of a cut is one of the whole model."""
    for name in ("README.md", "LICENSE"):
        (source / name).write_text("of the whole model")
    assert call(source, tmp_path / "nt", *TP2, "--layers", 2) == 0
    plan, _, result = capsys.readouterr().out.partition("done  ")
    for said in (plan, result):
        assert "layers   first 2 of 4: a trial, not the whole model\n" in said
    assert "'README.md' is not copied, as DST is truncated" in plan
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf")
    convert(tmp_path / "back", tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "less", "--to", "hf", "--layers", 1)
    for folder, number in (("nt", 2), ("back", 2), ("again", 2), ("less", 1)):
        facts = api.inspect(tmp_path / folder).facts
        assert (facts["num_layers"], facts["whole_num_layers"], facts["faults"]) == (number, 4, [])
        assert f"first {number} of 4 layers" in str(api.inspect(tmp_path / folder))
        told = json.loads((tmp_path / folder / "stream_reshard.json").read_text())
        assert told["facts"]["whole_num_hidden_layers"] == 4
        assert (tmp_path / folder / "LICENSE").is_file()
    assert (tmp_path / "again" / "config.yaml").read_text().startswith(
        "# A trial of a conversion, not a whole model: first 2 of 4 layers.\n")
    assert "embedding, first 1 of 4 layers, final norm and head" in (tmp_path / "less" / "README.md").read_text()
    convert(source, tmp_path / "all", *TP2)
    assert api.inspect(tmp_path / "all").facts["whole_num_layers"] is None
    assert (tmp_path / "all" / "README.md").is_file()


def test_facts_of_plan_and_run(tmp_path, source):
    conversion = api.plan(source, tmp_path / "nt", layers=3)
    for facts in (conversion.facts, api.run(conversion).facts, api.verify(source, tmp_path / "nt").facts):
        assert (facts["num_layers"], facts["whole_num_layers"]) == (3, 4)
    facts = api.plan(source).facts
    assert (facts["num_layers"], facts["whole_num_layers"]) == (4, None)


@pytest.mark.parametrize("layers, words", [
    (4, "--layers 4 is the whole model of 4 layers; leave it out"), (5, "--layers 5: the model has 4 layers"),
    (10**12, "--layers 1000000000000: the model has 4 layers"), (0, "--layers 0: it is at least 1")])
@pytest.mark.parametrize("to", ["nanotron", "hf"])
def test_what_is_no_part_of_the_model_is_refused(tmp_path, capsys, source, layers, words, to):
    convert(source, tmp_path / "ranks")
    for folder in ("hf", "ranks"):
        refuse(capsys, tmp_path, 2, [words], ("--layers", layers, "--to", to), folder, "no")


def test_what_nanotron_would_refuse_is_refused(tmp_path, capsys):
    make(tmp_path / "hf", "smollm3")
    refuse(capsys, tmp_path, 2, ["--layers 3 is not a multiple of 2"], ("--layers", 3))
    refuse(capsys, tmp_path, 2, ["--pp 7 leaves stage", "balancing of 2 layers"], ("--layers", 2, "--pp", 7))


@pytest.mark.parametrize("config", [
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    {"layer_types": ["full_attention"] * 3 + ["sliding_attention"], "sliding_window": 8},
])
def test_a_model_is_judged_as_a_whole(tmp_path, capsys, config):
    """The first layers have no window, but a trial that passes must not hide that the whole model is refused."""
    make(tmp_path / "hf", "qwen2", config=config)
    refuse(capsys, tmp_path, 3, ["Nanotron would attend to everything"], ("--layers", 1))
    convert(tmp_path / "hf", tmp_path / "nt", "--layers", 1, "--allow", "sliding_window", "--verify")
    convert("verify", tmp_path / "hf", tmp_path / "nt")


def test_another_number_of_layers_is_another_plan(tmp_path, capsys, source):
    def stop(job):
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        run_conversion(plan_conversion(Options(source, tmp_path / "nt", layers=2)), stop)
    refuse(capsys, tmp_path, 4, ["was left by a run with another plan or source"], ("--layers", 3))
    assert run_conversion(plan_conversion(Options(source, tmp_path / "nt", layers=2))).num_kept
    refuse(capsys, tmp_path, 4, ["nt"], ("--layers", 3))


def test_a_config_that_is_vast_is_not_unrolled(tmp_path, capsys, source):
    convert(source, tmp_path / "ranks")
    for path in (source / "config.json", tmp_path / "ranks" / "model_config.json"):
        path.write_text(path.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 99999999999'))
    for folder in ("hf", "ranks"):
        refuse(capsys, tmp_path, 3, ["num_hidden_layers is 99999999999"], ("--layers", 2, "--to", "hf"), folder, "no")
