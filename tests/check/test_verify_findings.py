"""Verify finds what is wrong in a copy, and names it.

A row of a table is a remark, what is done to the copy, and the words the message must hold. With the manifest gone it
is not the digest that finds a change.
"""
import json
import os
import shutil
from functools import partial

import pytest
from damage import edit_header, edit_json, edit_yaml, every, poke, rename, replace, swap, unshard
from trees import EMBEDDING, MANIFEST, NORM

from stream_reshard.cli import main
from stream_reshard.cli.demo import CONFIG, write_random_source
from stream_reshard.convert.conversion import Options, plan_conversion, run_conversion

WITH_MANIFEST = [
    ("tensor file missing", lambda c: every(c, "o_proj", "tp-rank-1")[0].unlink(), ["decoder/0", "is missing: "]),
    ("companion missing", lambda c: (c / "tokenizer.json").unlink(), ["'tokenizer.json' is missing"]),
    ("companion changed", lambda c: poke(c / "tokenizer.json", 3), ["'tokenizer.json'", MANIFEST]),
    ("companion longer", lambda c: (c / "tokenizer.json").write_text(" " * 99), ["'tokenizer.json' has 99 bytes"]),
    ("extra in model", lambda c: (c / "model" / "x").touch(), ["'model/x' is extra"]),
    ("extra weights", lambda c: shutil.copy(every(c, NORM)[0], c / "model" / "model" / "model_x.safetensors"),
     ["model_x"]),
    ("extra beside model", lambda c: (c / "notes.txt").touch(), ["'notes.txt' is extra"]),
    ("extra folder", lambda c: shutil.copytree(c / "model", c / "old"), ["'old/model/", "is extra"]),
    ("config.yaml edited", lambda c: edit_yaml(c, "3.0e-05", "1.0e-05"), ["'config.yaml'", "--edited"]),
    ("a link to nothing", lambda c: replace(c / "tokenizer.json", partial(os.symlink, "gone")), ["tokenizer.json"]),
    ("config.yaml a link to nothing", lambda c: replace(c / "config.yaml", partial(os.symlink, "gone")),
     ["config.yaml"]),
    ("a pipe", lambda c: replace(c / "checkpoint_metadata.json", os.mkfifo), ["checkpoint_metadata.json"]),
    ("a folder", lambda c: replace(c / "tokenizer.json", os.mkdir), ["tokenizer.json"]),
    ("padding not zero", lambda c: poke(every(c, EMBEDDING, "tp-rank-1")[0], -1), ["digest", "padding", "[11, 15]"])]

BARE = [
    ("tensor file missing", lambda c: every(c, "o_proj", "tp-rank-1")[0].unlink(), ["o_proj", "of 2", "[0]"]),
    ("every rank missing", lambda c: [path.unlink() for path in every(c, "1", "o_proj")], ["o_proj", "is missing"]),
    ("unsharded file missing", lambda c: every(c, NORM)[0].unlink(), ["final_layer_norm.pp_block.weight is missing"]),
    ("extra in model", lambda c: (c / "model" / "x").touch(), ["'model/x'"]),
    ("extra layer", lambda c: shutil.copytree(c / "model/model/decoder/1", c / "model/model/decoder/2"), ["decoder/2"]),
    ("stale file of TP=4", lambda c: shutil.copy(path := every(c, "o_proj")[0], str(path).replace("of-2.", "of-4.")),
     ["several values of tp", "2, 4"]),
    ("stale file of PP=1",
     lambda c: shutil.copy(path := every(c, "o_proj")[0], str(path).replace("0-of-2_", "0-of-1_")),
     ["several values of pp", "1, 2"]),
    *[(f"ranks exchanged: {word}", partial(swap, word=word), [word, "tensor-parallel rank 0 of 2"])
      for word in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", EMBEDDING, "lm_head")],
    *[(f"data exchanged: {word}", partial(swap, word=word, data_only=True), [word, "the source has"])
      for word in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", EMBEDDING, "lm_head")],
    ("ranks numbered from 1", lambda c: [rename(c, "o_proj", f"tp-rank-{n}-", f"tp-rank-{n + 1}-") for n in (1, 0)],
     ["rank past the number of ranks"]),
    ("a rank with a zero before it", lambda c: rename(c, "", "tp-rank-1-", "tp-rank-01-"), ["tp-rank-01-of-2"]),
    ("a layer on another stage", lambda c: rename(c, "decoder/1", "pp-rank-0", "pp-rank-1"), ["decoder/1", "stage 0"]),
    ("one file on another stage", lambda c: rename(c, "lm_head", "pp-rank-1", "pp-rank-0"), ["lm_head", "stage 1"]),
    ("layers exchanged", lambda c: [rename(c, f"decoder/{a}/", f"decoder/{a}/", f"decoder/{b}/") for a, b in (
        (0, 9), (1, 0), (9, 1))], ["model.layers.0.mlp.down_proj.weight", "the source has"]),
    ("a folder with a dot", lambda c: (c / "model/model/decoder/0").rename(c / "model/model/decoder.0"), ["decoder.0"]),
    ("no ranks in the name", lambda c: rename(c, "o_proj", "_pp-rank-0-of-2_tp-rank-0-of-2", ""), ["o_proj"]),
    ("a whole where parts belong", partial(unshard, word="lm_head"), ["lm_head", "has no ranks in its name"]),
    ("shape of one rank", lambda c: edit_header(c, "(32, 16)", "(48, 16)", "qkv", count=1), ["qkv_proj"]),
    ("shape of all ranks", lambda c: edit_header(c, "(32, 16)", "(48, 16)", "/0/", "qkv"), ["(48, 16)", "(32, 16)"]),
    ("slices of one rank", lambda c: edit_header(c, "#0,8,", "#8,16,", "qkv", count=1), ["qkv_proj"]),
    ("slices overlap", lambda c: edit_header(c, "#None,None,None|8,16", "#None,None,None|0,8", "o_proj", "rank-1"),
     ["overlap"]),
    ("version of one rank", lambda c: edit_header(c, '"1.5"', '"1.4"', "qkv", count=1), ["version", "1.4, 1.5"]),
    ("version of all", lambda c: edit_header(c, '"1.5"', '"1.4"', "-rank-"), ["version '1.5'", "'1.4'"]),
    ("one more header field", lambda c: edit_header(c, '"version"', '"x":"y","version"', "qkv", count=1), ["'x'"]),
    *[(f"dtype of rank {n}", lambda c, n=n: edit_header(c, '"BF16"', '"F16"', "/0/", "o_proj", f"tp-rank-{n}"),
       ["o_proj", "dtype"])
      for n in (0, 1)],
    ("dtype of one parameter", lambda c: edit_header(c, '"BF16"', '"F16"', NORM), ["norm", "F16", "BF16"]),
    ("dtype of all", lambda c: edit_header(c, '"BF16"', '"I16"'), ["lm_head", "I16", "BF16"]),
    ("metadata's version", lambda c: edit_json(c, "checkpoint_metadata.json", version="1.4"),
     ["version '1.4'", "'1.5'"]),
    *[(f"metadata's tp {tp}", partial(edit_json, name="checkpoint_metadata.json", tp=tp),
       ["checkpoint_metadata.json has tp", str(tp)])
      for tp in (1, "2", None, [2], {"2": 2})],
    ("metadata is a list", lambda c: (c / "checkpoint_metadata.json").write_text("[]"), ["list"]),
    ("padding not zero", lambda c: poke(every(c, EMBEDDING, "tp-rank-1")[0], -1), ["padding", "[11, 15]", EMBEDDING]),
    ("not committed", lambda c: (c / "model_config.json").unlink(), ["not a committed checkpoint"]),
    ("no weights", lambda c: replace(c / "model", os.mkdir), ["weight"]),
    ("empty", lambda c: [shutil.rmtree(c), c.mkdir()], ["not a committed checkpoint"]),
    ("absent", shutil.rmtree, ["is not a folder"]),
    *[(f"model_config.json: {key} {value}", partial(edit_json, name="model_config.json", **{key: value}), [key])
      for key, value in [
          ("intermediate_size", 40), ("num_hidden_layers", 3), ("num_attention_heads", 2),
          ("num_key_value_heads", 4), ("tie_word_embeddings", True), ("max_position_embeddings", 128),
          ("rms_norm_eps", 1e-6), ("rope_theta", 1e4), ("rope_theta", ...), ("initializer_range", 0.02),
          ("hidden_act", "gelu"), ("bos_token_id", 5), ("eos_token_id", 5), ("pad_token_id", 5),
          ("attention_bias", True), ("rope_scaling", {"type": "linear", "factor": 2.0}), ("sliding_window_size", 8),
          ("no_rope_layer", 4), ("moe_config", {}), ("rope_seq_len_interpolation_factor", 2)]],
    *[(f"model_config.json: {key} {value}", partial(edit_json, name="model_config.json", **{key: value}), [word])
      for key, value, word in [("hidden_size", 32, "asks for"), ("vocab_size", 14, EMBEDDING),
                               ("vocab_size", 8, EMBEDDING), ("is_qwen2_config", True, "is_"),
                               ("rope_interleaved", True, "q_proj")]],
    *[(f"config.yaml: {new}", partial(edit_yaml, old=old, new=new), ["config.yaml", old.split(":")[0].strip()])
      for old, new in [
          ("hidden_size: 16", "hidden_size: 32"), ("intermediate_size: 20", "intermediate_size: 40"),
          ("num_hidden_layers: 2", "num_hidden_layers: 3"), ("num_attention_heads: 4", "num_attention_heads: 2"),
          ("num_key_value_heads: 2", "num_key_value_heads: 4"), ("rope_theta: 500000.0", "rope_theta: 10000.0"),
          ("rms_norm_eps: 1.0e-05", "rms_norm_eps: 1.0e-06"),
          ("tie_word_embeddings: false", "tie_word_embeddings: true"),
          ("max_position_embeddings: 64", "max_position_embeddings: 128"), ('hidden_act: "silu"', 'hidden_act: "gelu"'),
          ("initializer_range: 0.01", "initializer_range: 0.02"), ("vocab_size: 11", "vocab_size: 7"),
          (" tp: 2", " tp: 4"), (" pp: 2", " pp: 1"), ("rope_interleaved: false", "rope_interleaved: true"),
          ("rope_scaling: null", "rope_scaling: {type: linear, factor: 2.0}"),
          ("size_divisible_by: 1", "size_divisible_by: 64"), ("dtype: bfloat16", "dtype: float16"),
          ("rope_theta: 500000.0", "# rope_theta: of Nanotron's own"), ("model_config:", "model_setup:")]],
    ("config.yaml is empty", lambda c: (c / "config.yaml").write_text(""), ["config.yaml"])]


@pytest.mark.parametrize("bare, change, words", [
    *[pytest.param(False, *row[1:], id=row[0]) for row in WITH_MANIFEST],
    *[pytest.param(True, *row[1:], id=f"bare {row[0]}") for row in BARE]])
def test_what_is_wrong_is_found_and_named(made, copied, differs, bare, change, words):
    root = copied("tp2pp2", bare)
    change(root)
    differs(made("hf"), root, words)


@pytest.mark.parametrize("rope, says, equal", [
    ("neox", "rope_interleaved: false", True), ("neox", "# nothing", True), ("neox", "rope_interleaved: true", False),
    ("interleaved", "rope_interleaved: true", True), ("interleaved", "# nothing", False)])
def test_a_config_yaml_that_does_not_say_the_order_of_a_head(tmp_path, capsys, rope, says, equal):
    """Nanotron's main then takes the one of Hugging Face."""
    source, destination = converted(tmp_path, rope=rope)
    path = destination / "config.yaml"
    told = f"rope_interleaved: {'true' if rope == 'interleaved' else 'false'}"
    path.write_text(path.read_text().replace(told, says))
    code = main(["verify", str(source), str(destination), "--edited", "config.yaml", "--max-memory", "4GiB"])
    assert code == (0 if equal else 5)
    assert equal or "config.yaml: rope_interleaved is" in capsys.readouterr().err


def test_padding_that_nanotron_left_to_chance_can_be_allowed(tmp_path, capsys):
    source, destination = converted(tmp_path, vocab_multiple=8)
    (destination / MANIFEST).unlink()
    poke(next((destination / "model").rglob("*token_embedding/*tp-rank-1*")), -1)
    command = ["verify", str(source), str(destination), "--max-memory", "4GiB"]
    assert main(command) == 5 and "padding" in capsys.readouterr().err
    assert main([*command, "--allow", "padding"]) == 0


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in BARE if row[0] in (
    "every rank missing", "ranks exchanged: qkv_proj", "shape of all ranks", "version of one rank", "not committed",
    "absent")])
def test_the_same_in_the_source_is_the_sources_fault(made, copied, verify, change, words):
    root = copied("tp2pp2")
    change(root)
    code, _, problems = verify(root, made("hf"))
    assert code == 3 and all(word in "\n".join(problems) for word in words), problems


def converted(root, **changes):
    """(a source of random weights, it converted): run as the command line does, with as many processes."""
    source, destination = root / "hf", root / "nt"
    write_random_source(source, CONFIG | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 176})
    (source / "tokenizer.json").write_text("{}")
    run_conversion(plan_conversion(Options(source, destination, tp=2, pp=2, **changes)))
    return source, destination


@pytest.mark.parametrize("place", ["header", "extra"])
def test_verify_names_what_differs(tmp_path, capsys, place):
    source, destination = converted(tmp_path, vocab_multiple=8)
    (destination / MANIFEST).unlink()  # So that not the digest finds it.
    victim = next((destination / "model").rglob("*o_proj/*tp-rank-1*"))
    if place == "extra":
        shutil.copy(victim, victim.with_name(victim.name.replace("-of-2.", "-of-3.")))
    else:
        poke(victim, victim.read_bytes().index(b"#None") + 6)
    assert main(["verify", str(source), str(destination)]) == 5
    error = capsys.readouterr().err
    assert victim.parent.name in error and "Traceback" not in error


def test_verify_finds_a_flip_by_the_digest(tmp_path):
    source, root = converted(tmp_path)
    manifest = json.loads((root / MANIFEST).read_text())
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert {file["path"] for file in manifest["files"]} == files - {MANIFEST}
    path = next(file["path"] for file in manifest["files"] if file["path"].startswith("model/"))
    poke(root / path, -1, 7)
    assert main(["verify", str(source), str(root)]) == 5
