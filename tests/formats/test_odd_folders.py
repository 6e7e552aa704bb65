"""Folders that look odd and are good: transformers loads them, so they are converted like any other, and what is odd is
said."""
import json
import shutil

import numpy as np
import pytest
from conversions import assert_same, convert, tensors, tree
from running import call
from sources import INDEX, ONE, TWO, edit_config, edit_text, make_source, read, renamed, tensor_bytes

from stream_reshard import api
from stream_reshard.errors import SourceError

SINGLE = "model.safetensors"
INV_FREQ = "model.layers.1.self_attn.rotary_emb.inv_freq"


def index_of(root, change):
    index = json.loads((root / INDEX).read_text())
    change(index)
    (root / INDEX).write_text(json.dumps(index, indent=2))


def named(key, shard):
    return lambda root: index_of(root, lambda index: index["weight_map"].update({key: shard}))


def moved(name, to):
    def change(root):
        (root / to).parent.mkdir(exist_ok=True, parents=True)
        (root / name).rename(root / to)
        edit_text(root / INDEX, f'"{name}"', json.dumps(to))
    return change


def with_buffer(root):
    (root / TWO).write_bytes(tensor_bytes(read(root / TWO) | {INV_FREQ: np.ones(2, np.float32)}))


def single_with_index(root):
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(read(root / SINGLE), SINGLE)}))


def with_head(root):
    """The tied head in a shard of its own, which the index does not name."""
    parts = read(root / ONE) | read(root / TWO)
    (root / TWO).write_bytes(tensor_bytes(read(root / TWO) | {"lm_head.weight": parts["model.embed_tokens.weight"]}))


def bare(key):
    return key.removeprefix("model.")


def text(old, new):
    return lambda root: edit_text(root / "config.json", old, new)


def in_front(root):
    (root / "config.json").write_bytes(b"\xef\xbb\xbf" + (root / "config.json").read_bytes())


TWO_SHARDS, TIED = {"num_shards": 2}, {"num_shards": 2, "tied": True}
FOLDERS = [
    ("single and its index", {}, single_with_index, None),
    ("index names the tied head", TIED, named("lm_head.weight", TWO), "names 'lm_head.weight', which is in no shard"),
    ("index does not name the tied head", TIED, with_head, "does not name 'lm_head.weight', which is in"),
    ("index names inv_freq", TWO_SHARDS, named(INV_FREQ, ONE), f"names '{INV_FREQ}', which is in no shard"),
    ("index does not name inv_freq", TWO_SHARDS, with_buffer, f"does not name '{INV_FREQ}'"),
    ("in a folder", TWO_SHARDS, moved(ONE, f"a b/c/{ONE}"), None), ("a space", TWO_SHARDS, moved(TWO, "part 2 (b).safetensors"), None),
    ("no model. in front", TWO_SHARDS, lambda root: [renamed(root, bare, name) for name in (ONE, TWO)],
     "no 'model.' in front, such as 'embed_tokens"),
    ("twice model. in front", {}, lambda root: renamed(root, lambda key: f"model.{key}"), "one more 'model.' in front"),
    ("twice, but for the head", {}, lambda root: renamed(root, lambda key: f"model.{key}" if "lm_head" not in key else key),
     "20 tensors have names with one more 'model.' in front"),
    ("some of both", {"tied": True}, lambda root: renamed(root, lambda key: bare(key) if "proj" in key else key), "14 tensors have names with no 'model.' in front"),
    ("quantisation left over", {}, lambda root: edit_config(root, {"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True}}), "names a quantisation ('bitsandbytes')"),
    ("another left over", TIED, lambda root: edit_config(root, {"quantization": {"bits": 4}}), "names a quantisation"),
    ("Infinity that nobody reads", {}, text('"hidden_act"', '"time_step_limit": [0.0, Infinity], "hidden_act"'), None),
    ("NaN that nobody reads", {}, text('"hidden_act"', '"x": {"y": NaN}, "hidden_act"'), None),
    ("a key twice with one value", {}, text('"vocab_size": 11', '"vocab_size": 11, "vocab_size": 11'), None),
    ("a key twice that nobody reads", {}, text('"vocab_size"', '"x": 1, "x": 2, "vocab_size"'), "'x' in lines 7 and 7 occurs"),
    ("a mark in front", {}, in_front, None),
    ("a mark in front of an index", TWO_SHARDS, lambda root: (root / INDEX).write_bytes(
        b"\xef\xbb\xbf" + (root / INDEX).read_bytes()), None),
    ("Infinity in an index", TWO_SHARDS, lambda root: edit_text(root / INDEX, '"metadata": {', '"metadata": {"x": Infinity, '),
     None),
    ("a key twice in an index", TWO_SHARDS, lambda root: edit_text(root / INDEX, f'"model.norm.weight": "{TWO}"', (
        f'"model.norm.weight": "{TWO}", "model.norm.weight": "{TWO}"')), None),
    ("no width of random weights", {}, lambda root: edit_config(root, {"initializer_range": 0.0}), None),
    ("litter", TWO_SHARDS, lambda root: [(root / name).write_bytes(b"\0\5\x16\7") for name in (".DS_Store", f"._{ONE}")], None),
]
ROWS = [pytest.param(*row[1:], id=row[0]) for row in FOLDERS]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """plain(made): a folder in which nothing is odd, of the same tensors, beside its conversion `nt`."""
    made_before = {}

    def make(made):
        if (key := tuple(made.items())) not in made_before:
            root = make_source(tmp_path_factory.mktemp("plain") / "hf", **made)
            convert(root, root.with_name("nt"), "--tp", 2)
            made_before[key] = root
        return made_before[key]
    return make


@pytest.mark.parametrize("made, change, note", ROWS)
def test_it_is_converted_like_any_other(tmp_path, capsys, plain, made, change, note):
    root, other = make_source(tmp_path / "hf", **made), plain(made)
    change(root)
    if note is None:
        assert call(root, tmp_path / "nt", "--tp", 2) == 0
    else:
        assert call(root, tmp_path / "nt", "--tp", 2) == 0 and note in capsys.readouterr().out
    assert tree(tmp_path / "nt") == tree(other.with_name("nt"))
    convert("verify", root, tmp_path / "nt")
    assert call("inspect", root) == 0
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf")
    assert_same(tensors(tmp_path / "back"), tensors(other))
    assert "quantization" not in (tmp_path / "back" / "config.json").read_text()
    convert("verify", root, tmp_path / "back")


LOADED = [row for row in FOLDERS if row[0] not in {
    "quantisation left over", "a mark in front", "a mark in front of an index"}]
"""For the first transformers wants a library; the others it does not load."""


@pytest.mark.parametrize("made, change, note", [pytest.param(*row[1:], id=row[0]) for row in LOADED])
def test_transformers_loads_the_same(tmp_path, plain, made, change, note):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    root = make_source(tmp_path / "hf", **made)
    change(root)
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
              for folder in (root, plain(made))]
    assert not any(info["missing_keys"] or info["mismatched_keys"] for _, info in models)
    (one, _), (other, _) = models
    assert all(torch.equal(one.state_dict()[key].view(torch.int16), tensor.view(torch.int16))
               for key, tensor in other.state_dict().items())


@pytest.mark.parametrize("change", [
    lambda root: renamed(root, lambda key: f"_orig_mod.{key}"), lambda root: renamed(root, lambda key: f"model.model.{key}"),
    lambda root: edit_config(root, {"model_type": "Llama"})], ids=["wrapped", "twice too much", "other letters"])
def test_what_transformers_does_not_load_is_refused(tmp_path, change):
    transformers = pytest.importorskip("transformers")
    root = make_source(tmp_path / "hf")
    change(root)
    assert call("plan", root) == 3
    try:
        _, info = transformers.AutoModelForCausalLM.from_pretrained(root, output_loading_info=True)
    except ValueError:
        return
    assert len(info["missing_keys"]) > 15


@pytest.mark.parametrize("extra, message", [
    ({"embed_tokens.weight": np.ones((11, 16), np.uint16)}, "'embed_tokens.weight' is in model.safetensors under two names"),
    ({"model.lm_head.weight": np.ones((11, 16), np.uint16)}, "'model.lm_head.weight' is in model.safetensors under two")])
def test_one_tensor_under_two_names_is_refused(tmp_path, capsys, extra, message):
    assert call("plan", make_source(tmp_path / "hf", extra=extra)) == 3
    assert message in capsys.readouterr().err


def test_an_index_of_others_beside_a_single_file_is_stale(tmp_path, capsys):
    root, other = make_source(tmp_path / "hf"), make_source(tmp_path / "other", num_shards=2)
    for name in (INDEX, ONE, TWO):
        shutil.copy(other / name, root / name)
    assert call("plan", root) == 3
    assert "is invalid or names other shards; remove the stale one" in capsys.readouterr().err


def test_a_copy_that_asks_for_quantisation_is_found(tmp_path, capsys):
    """transformers would quantise it when it loads it."""
    source = make_source(tmp_path / "hf")
    copy = make_source(tmp_path / "copy", config={"quantization_config": {"quant_method": "fp8"}})
    assert call("verify", source, copy) == 5
    assert "quantised ('fp8')" in capsys.readouterr().err
    assert call("verify", copy, source) == 0


def test_a_shard_in_a_folder_that_changes_is_noticed(tmp_path):
    root = make_source(tmp_path / "hf", num_shards=2)
    moved(ONE, f"sub/{ONE}")(root)
    conversion = api.plan(root, tmp_path / "nt", max_memory="8GiB")
    assert f"sub/{ONE}" in conversion.identities
    (root / "sub" / ONE).touch()
    with pytest.raises(SourceError, match="changed"):
        api.run(conversion)
