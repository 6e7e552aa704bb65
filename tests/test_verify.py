"""Verify finds every difference between two checkpoints, names it, and takes nothing else for one.

A row of a table is a remark, what is done to the copy, and the words the message must hold. With the manifest gone it
is not the digest that finds a change.
"""
import json
import os
import pickle
import random
import shutil
from functools import cache, partial

import numpy as np
import pytest
from sources import edit_config, make_source
from test_golden import GOLDEN
from test_memory import write_sparse_source
from trees import (KINDS, Oracle, call, deadline, edit_header, edit_json, edit_yaml, every, forge, make, measured, opened,
                   poke, raw_of, rename, replace, swap, unshard)

from stream_reshard import execute, memory, tensor_file, verify as package
from stream_reshard.errors import ResourceError

MANIFEST, EMBEDDING, NORM = "stream_reshard.json", "token_embedding", "final_layer_norm"


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """Looking for the children of the test process takes a third of a run here. Limits are tested in other processes."""
    monkeypatch.setattr(memory, "resident", lambda: 2**28)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind): a checkpoint that stays as it is."""
    root = tmp_path_factory.mktemp("made")
    return cache(partial(make, root))


@pytest.fixture
def copied(made, tmp_path):
    """copied(kind, bare): one that a test may break, without its manifest where it is bare."""
    def copy(kind, bare=True):
        shutil.copytree(made(kind), tmp_path / "copy")
        if bare:
            (tmp_path / "copy" / MANIFEST).unlink(missing_ok=True)
        return tmp_path / "copy"
    return copy


@pytest.fixture
def verify(capsys):
    """verify(source, copy, *flags): (exit code, stdout, problems). Whatever is wrong is told in printable lines, soon."""
    def run(*arguments, command="verify"):
        with deadline(2):
            code = call(command, *arguments)
        out, err = capsys.readouterr()
        assert all(line.isprintable() and line.isascii() for line in err.splitlines()), err
        assert (code in (0, 2)) or all(line.startswith("error: ") for line in err.splitlines()), err
        return code, out, [line.removeprefix("error: ") for line in err.splitlines()]
    return run


@pytest.fixture
def differs(verify):
    """The copy is refused with exit code 5, in words that hold all of these."""
    def run(source, copy, words, *flags):
        code, out, problems = verify(source, copy, *flags)
        assert (code, out) == (5, ""), (code, out, problems)
        assert problems and all(word in "\n".join(problems) for word in words), problems
        return problems
    return run


PAIRS = [
    ("hf", "tp2pp2"), ("tp2pp2", "hf"), ("hf3", "tp1"), ("hf", "hf3"), ("hf3", "hf"), ("tp1", "tp2pp2"),
    ("tp2pp2", "tp1"), ("tp2pp2", "interleaved"), ("interleaved", "padded"), ("padded", "hf3"), ("hf", "interleaved"),
    ("old_hf", "1.2"), ("1.4", "1.2"), ("1.2", "1.4"), ("1.2", "old_hf"), ("tied_hf", "tied_tp2"),
    ("tied_tp2", "tied_padded"), ("tied_padded", "tied_hf3"), ("tied_hf3", "tied_hf"), ("qwen2_hf", "qwen2_tp2"),
    ("qwen2_tp2", "qwen2_interleaved"), ("qwen2_interleaved", "qwen2_hf"), ("float_hf", "float_cast"),
    ("float_hf", "rounded_hf", "--dtype", "bfloat16"), ("rounded_tp2", "raised_hf", "--dtype", "float32")]

pairs = pytest.mark.parametrize("source, copy, flags", [
    pytest.param(*pair[:2], pair[2:], id=" ".join(pair)) for pair in PAIRS])


@pairs
def test_one_model_is_equal_in_whatever_form(made, verify, source, copy, flags):
    code, out, problems = verify(made(source), made(copy), *flags, "--json")
    assert (code, problems) == (0, [])
    facts, here, there = json.loads(out), Oracle(made(copy)), Oracle(made(source))
    assert facts["has_manifest"] == (KINDS[copy][1] is not None)
    assert facts["num_elements_compared"] == facts["num_elements"] == sum(map(np.size, here.places.values()))
    for key in here.places.keys() | there.places.keys():
        assert np.array_equal(*(oracle.values(key, here.bits.itemsize) for oracle in (here, there))), key


@pairs
def test_one_changed_weight_is_named_with_its_place_and_values(made, copied, verify, differs, monkeypatch, source, copy,
                                                               flags):
    """First in one parameter, then in each: one line for each, and no other. There is no manifest; rows come in bands."""
    monkeypatch.setattr(memory, "MAX_BLOCK_NBYTES", 256)
    flags = ("--dtype", "bfloat16") if copy == "float_cast" else flags
    root, chooser, theirs = copied(copy), random.Random(f"{source} {copy}"), Oracle(made(source))
    before = Oracle(root)
    assert verify(made(source), root, *flags)[0] == 0
    keys = chooser.sample(sorted(before.places), len(before.places))
    for number, key in enumerate(keys):
        file, _, byte = before.spot(chooser.choice(before.places[key].ravel()))
        poke(root / file, byte + chooser.randrange(before.bits.itemsize), chooser.randrange(8))
        if number in (0, len(keys) - 1):
            now = Oracle(root)
            assert sorted(differs(made(source), root, [], "--workers", "3", *flags)) == sorted(
                now.first_difference(name, theirs) for name in keys[:number + 1])


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden checkpoints are not beside this checkout")
def test_two_topologies_that_nanotron_itself_saved_are_equal(verify):
    trees = [GOLDEN / f"llama_gqa_{name}" for name in ("tp1_pp1_dp1", "tp2_pp2_dp2")]
    assert verify(*trees)[0] == verify(*reversed(trees))[0] == 0


def test_a_file_of_a_rank_past_ten_is_named_whole(tmp_path, differs):
    """Nanotron's paths are long; without the number of the rank the name would be of no use."""
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 32, "intermediate_size": 16}
    source, copy = make_source(tmp_path / "hf", config=sizes), tmp_path / "nt"
    assert call(source, copy, "--tp", "16", "--quiet") == 0
    victim = every(copy, EMBEDDING, "tp-rank-10-of-16")[0]
    poke(victim, -1)
    differs(source, copy, [victim.relative_to(copy).as_posix()])


WITH_MANIFEST = [
    ("tensor file missing", lambda c: every(c, "o_proj", "tp-rank-1")[0].unlink(), ["decoder/0", "is missing: "]),
    ("companion missing", lambda c: (c / "tokenizer.json").unlink(), ["'tokenizer.json' is missing"]),
    ("companion changed", lambda c: poke(c / "tokenizer.json", 3), ["'tokenizer.json'", MANIFEST]),
    ("companion longer", lambda c: (c / "tokenizer.json").write_text(" " * 99), ["'tokenizer.json' has 99 bytes"]),
    ("extra in model", lambda c: (c / "model" / "x").touch(), ["'model/x' is extra"]),
    ("extra weights", lambda c: shutil.copy(every(c, NORM)[0], c / "model" / "model" / "model_x.safetensors"), ["model_x"]),
    ("extra beside model", lambda c: (c / "notes.txt").touch(), ["'notes.txt' is extra"]),
    ("extra folder", lambda c: shutil.copytree(c / "model", c / "old"), ["'old/model/", "is extra"]),
    ("config.yaml edited", lambda c: edit_yaml(c, "3.0e-05", "1.0e-05"), ["'config.yaml'", "--edited"]),
    ("a link to nothing", lambda c: replace(c / "tokenizer.json", partial(os.symlink, "gone")), ["tokenizer.json"]),
    ("config.yaml a link to nothing", lambda c: replace(c / "config.yaml", partial(os.symlink, "gone")), ["config.yaml"]),
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
    ("stale file of PP=1", lambda c: shutil.copy(path := every(c, "o_proj")[0], str(path).replace("0-of-2_", "0-of-1_")),
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
    ("slices overlap", lambda c: edit_header(c, "#None,None,None|8,16", "#None,None,None|0,8", "o_proj", "rank-1"), ["overlap"]),
    ("version of one rank", lambda c: edit_header(c, '"1.5"', '"1.4"', "qkv", count=1), ["version", "1.4, 1.5"]),
    ("version of all", lambda c: edit_header(c, '"1.5"', '"1.4"', "-rank-"), ["version '1.5'", "'1.4'"]),
    ("one more header field", lambda c: edit_header(c, '"version"', '"x":"y","version"', "qkv", count=1), ["'x'"]),
    *[(f"dtype of rank {n}", lambda c, n=n: edit_header(c, '"BF16"', '"F16"', "/0/", "o_proj", f"tp-rank-{n}"), ["o_proj", "dtype"])
      for n in (0, 1)],
    ("dtype of one parameter", lambda c: edit_header(c, '"BF16"', '"F16"', NORM), ["norm", "F16", "BF16"]),
    ("dtype of all", lambda c: edit_header(c, '"BF16"', '"I16"'), ["lm_head", "I16", "BF16"]),
    ("metadata's version", lambda c: edit_json(c, "checkpoint_metadata.json", version="1.4"), ["version '1.4'", "'1.5'"]),
    *[(f"metadata's tp {tp}", partial(edit_json, name="checkpoint_metadata.json", tp=tp), ["checkpoint_metadata.json says tp", str(tp)])
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
          ("hidden_act", "gelu"), ("bos_token_id", 5), ("eos_token_id", 5), ("pad_token_id", 5), ("attention_bias", True),
          ("rope_scaling", {"type": "linear", "factor": 2.0}), ("sliding_window_size", 8), ("no_rope_layer", 4),
          ("moe_config", {}), ("rope_seq_len_interpolation_factor", 2)]],
    *[(f"model_config.json: {key} {value}", partial(edit_json, name="model_config.json", **{key: value}), [word])
      for key, value, word in [("hidden_size", 32, "asks for"), ("vocab_size", 14, EMBEDDING), ("vocab_size", 8, EMBEDDING), ("is_qwen2_config", True, "is_"),
                               ("rope_interleaved", True, "q_proj"), ("rope_interleaved", ..., "k_proj")]],
    *[(f"config.yaml: {new}", partial(edit_yaml, old=old, new=new), ["config.yaml", old.split(":")[0].strip()]) for old, new in [
        ("hidden_size: 16", "hidden_size: 32"), ("intermediate_size: 20", "intermediate_size: 40"),
        ("num_hidden_layers: 2", "num_hidden_layers: 3"), ("num_attention_heads: 4", "num_attention_heads: 2"),
        ("num_key_value_heads: 2", "num_key_value_heads: 4"), ("rope_theta: 500000.0", "rope_theta: 10000.0"),
        ("rms_norm_eps: 1.0e-05", "rms_norm_eps: 1.0e-06"), ("tie_word_embeddings: false", "tie_word_embeddings: true"),
        ("max_position_embeddings: 64", "max_position_embeddings: 128"), ('hidden_act: "silu"', 'hidden_act: "gelu"'),
        ("initializer_range: 0.01", "initializer_range: 0.02"), ("vocab_size: 11", "vocab_size: 7"), (" tp: 2", " tp: 4"),
        (" pp: 2", " pp: 1"), ("rope_interleaved: false", "rope_interleaved: true"),
        ("rope_scaling: null", "rope_scaling: {type: linear, factor: 2.0}"), ("size_divisible_by: 1", "size_divisible_by: 64"),
        ("rope_theta: 500000.0", "# rope_theta: of Nanotron's own"), ("model_config:", "model_setup:")]],
    ("config.yaml is empty", lambda c: (c / "config.yaml").write_text(""), ["config.yaml"])]


@pytest.mark.parametrize("bare, change, words", [
    *[pytest.param(False, *row[1:], id=row[0]) for row in WITH_MANIFEST],
    *[pytest.param(True, *row[1:], id=f"bare {row[0]}") for row in BARE]])
def test_what_is_wrong_is_found_and_named(made, copied, differs, bare, change, words):
    root = copied("tp2pp2", bare)
    change(root)
    differs(made("hf"), root, words)


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in BARE if row[0] in (
    "every rank missing", "ranks exchanged: qkv_proj", "shape of all ranks", "version of one rank", "not committed", "absent")])
def test_the_same_in_the_source_is_the_sources_fault(made, copied, verify, change, words):
    root = copied("tp2pp2")
    change(root)
    code, _, problems = verify(root, made("hf"))
    assert code == 3 and all(word in "\n".join(problems) for word in words), problems


WINDOWS = ["full_attention", "sliding_attention"] * 20

SAYINGS = [("rms_norm_eps", 1e-6), ("rope_theta", 1e4), ("tie_word_embeddings", True), ("eos_token_id", 9), ("head_dim", 8),
           ("mlp_bias", True), ("rope_scaling", {"rope_type": "llama3", "factor": 16.0}), ("sliding_window", 9),
           ("layer_types", [*WINDOWS[:9], "full_attention", *WINDOWS[10:]])]


@pytest.mark.parametrize("key, value", [pytest.param(*row, id=row[0]) for row in SAYINGS])
def test_two_configs_of_hugging_face_that_compute_different_things(made, tmp_path, differs, key, value):
    edit_config(source := shutil.copytree(made("hf"), tmp_path / "hf"), {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "layer_types": WINDOWS})
    edit_config(copy := shutil.copytree(source, tmp_path / "copy"), {key: value})
    differs(source, copy, [key])


def test_a_source_of_whole_numbers_is_not_cast(made, copied, verify):
    edit_header(root := copied("tp1"), '"BF16"', '"I16"')
    assert verify(root, made("hf"), "--dtype", "bfloat16")[0] in (3, 5)


def test_what_was_allowed_at_the_conversion_need_not_be_allowed_again(tmp_path, verify, differs):
    source = make_source(tmp_path / "hf", config={"rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    assert call(source, tmp_path / "nt", "--quiet", "--allow", "rope_scaling") == 0
    assert verify(source, tmp_path / "nt")[0] == 0
    (tmp_path / "nt" / MANIFEST).unlink()
    differs(source, tmp_path / "nt", ["rope_scaling", "'llama3'", "--allow rope_scaling"])
    assert verify(source, tmp_path / "nt", "--allow", "rope_scaling")[0] == 0


@pytest.mark.parametrize("old, new, code", [
    ("learning_rate: 3.0e-05", "learning_rate: 1.0e-05", 0), ("seed: 42", "seed: 43", 0), ("dp: 1", "dp: 8", 0),
    ("rms_norm_eps: 1.0e-05", "rms_norm_eps: 1.0e-06", 5), (" tp: 2", " tp: 1", 5), ("vocab_size: 11", "vocab_size: 12", 0),
    ("vocab_size: 11", "vocab_size: 13", 5), ("rope_interleaved: false", "rope_interleaved: true", 5)])
def test_an_edited_config_yaml_may_say_anything_but_another_model(made, copied, verify, differs, old, new, code):
    edit_yaml(root := copied("tp2pp2", bare=False), old, new)
    differs(made("hf"), root, ["'config.yaml' has", "--edited"])
    assert verify(made("hf"), root, "--edited", "config.yaml")[0] == code


def test_what_nfs_keeps_of_removed_files_is_not_there(made, copied, verify):
    root = copied("tp2pp2", bare=False)
    for folder in (root, root / "model" / "model" / "lm_head"):
        (folder / ".nfs000001").write_text("still open elsewhere")
    assert verify(made("hf"), root)[0] == 0


def read_by(verify, monkeypatch, *arguments):
    """({(folder, file, offset, nbytes)} that were read, what verify returned)."""
    real, read = tensor_file.SourceFile.read_into, set()

    def noted(self, view, offset):
        read.add((self.root, self.path, offset, len(view)))
        real(self, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file.SourceFile, "read_into", noted)
        return read, verify(*arguments)


def test_quick_finds_a_flip_by_the_digest_and_reads_no_weight_of_the_source(made, copied, verify, differs, monkeypatch):
    root = copied("tp2pp2", bare=False)
    read, (code, out, _) = read_by(verify, monkeypatch, made("hf"), root, "--quick")
    assert code == 0 and "no weight compared" in out
    assert {row[0] for row in read} == {root} and {row[1] for row in read} > {"config.yaml", "model_config.json"}
    poke(every(root, "o_proj")[0], -1)
    differs(made("hf"), root, ["o_proj", MANIFEST], "--quick")
    (root / MANIFEST).unlink()
    assert verify(made("hf"), root, "--quick")[0] == 0
    edit_header(root, '"BF16"', '"F16"')
    differs(made("hf"), root, ["F16"], "--quick")


def test_a_sample_is_chosen_by_the_seed_and_holds_of_every_parameter(made, copied, verify, monkeypatch):
    """A changed weight in it is found; one outside is not, not even by a digest, but by the whole."""
    monkeypatch.setattr(memory, "MAX_BLOCK_NBYTES", 256)
    source, root = made("hf"), copied("tp2pp2", bare=False)
    (bare := shutil.copytree(root, root.with_name("bare")) / MANIFEST).unlink()
    ours, theirs = {}, {}
    for name, copy, part, seed in (("one", root, "10%", 1), ("again", root, "10%", 1), ("other", root, "10%", 2),
                                   ("whole", bare.parent, "100%", 1)):
        read, _ = read_by(verify, monkeypatch, source, copy, "--sample", part, "--seed", seed)
        theirs[name] = {row[2:] for row in read if row[0] == source}
        ours[name] = {row[1:] for row in read if row[0] == copy and row[1].startswith("model/")}
    for rows in (ours, theirs):
        assert rows["one"] == rows["again"] != rows["other"] and rows["one"] | rows["other"] < rows["whole"]
    assert len(theirs["one"]) < len(theirs["whole"]) / 5
    table, begin, _ = raw_of(source / "model.safetensors")
    spans = [entry["data_offsets"] for key, entry in table.items() if key != "__metadata__"]
    assert all(any(first <= row[0] - begin < last for row in theirs["one"]) for first, last in spans)
    for rows, code in ((ours["one"], 5), (ours["whole"] - ours["one"], 0)):
        path, offset, _ = min(rows)
        poke(root / path, offset)
        assert verify(source, root, "--sample", "10%", "--seed", "1")[0] == code and verify(source, root)[0] == 5
        poke(root / path, offset)


@pytest.mark.parametrize("part", ["0%", "0", "-5%", "101%", "100.1%", "nan", "inf", "x", "", "5%%", "1e1%", "%", "10 %"])
def test_a_sample_that_is_no_part(made, capsys, part):
    assert call("verify", made("hf"), made("tp1"), f"--sample={part}") == 2
    assert "--sample" in capsys.readouterr().err


def test_a_big_checkpoint_is_verified_in_64_mib(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=60_000)
    assert call(tmp_path / "hf", tmp_path / "nt", "--quiet", "--tp", "4", "--rope", "interleaved") == 0
    for pair in (("hf", "nt"), ("nt", "hf"), ("nt", "nt")):
        paths = [tmp_path / name for name in pair]
        code, peak, err = measured("verify", *paths, "--max-memory", "64MiB", "--workers", "1")
        assert (code, err) == (0, "") and peak <= 64 * 2**20
    code, _, err = measured("verify", *paths, "--max-memory", "24MiB")
    assert code == 6 and err.count("\n") == 1 and "--max-memory 24.0 MiB cannot be kept" in err


def test_a_cast_that_only_the_manifest_tells_of_counts_in_the_limit(made):
    code, peak, err = measured("verify", made("float_hf"), made("float_cast"), "--max-memory", "128MiB")
    assert (code == 6 and "cannot be kept" in err) or (code == 0 and peak <= 128 * 2**20), f"{peak / 2**20:.0f} MiB"


LONG = [
    ("model_config.json", lambda c: edit_json(c, "model_config.json", **{f"{i}": [] for i in range(200_000)})),
    ("checkpoint_metadata.json", lambda c: edit_json(c, "checkpoint_metadata.json", x=[[]] * 500_000)),
    ("manifest", lambda c: forge(c, lambda m: m.update(x=[[]] * 500_000))),
    ("config.yaml", lambda c: (c / "config.yaml").write_text(f"[{'1,' * 50_000}]")),
    ("config.yaml of references", lambda c: (c / "config.yaml").write_text("".join(
        ["a0: &a0 x\n", *(f"a{i}: &a{i} [{f'*a{i - 1},' * 10}]\n" for i in range(1, 8)),
         (c / "config.yaml").read_text().replace("hidden_size: 16", "hidden_size: *a7")])))]


@pytest.mark.parametrize("change", [pytest.param(change, id=remark) for remark, change in LONG])
def test_no_document_breaks_the_limit(made, copied, change):
    change(root := copied("tp1", bare=False))
    code, peak, err = measured("verify", made("hf"), root, "--max-memory", "64MiB", "--workers", "1")
    assert code in (0, 5, 6) and "Traceback" not in err and peak <= 64 * 2**20, f"{peak / 2**20:.0f} MiB"


def flips(root, kinds, number, seed=0):
    """`number` random bits of files below a folder, evenly over kinds of place: (file, byte, bit)."""
    chooser, files = random.Random(seed), [path for path in every(root) if path.suffix == ".safetensors"]
    for i in range(number):
        kind = kinds[i % len(kinds)]
        path = chooser.choice(files) if kind in ("weights", "header") else root / kind
        begin = raw_of(path)[1] if path in files else 0
        first, last = (0, begin) if kind == "header" else (begin, path.stat().st_size)
        yield path, chooser.randrange(first, last), chooser.randrange(8)


@pytest.mark.parametrize("number", [60, pytest.param(1000, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("bare", [False, True], ids=["whole folder", "model without manifest"])
def test_every_bit_flip_is_found(made, copied, verify, figures, number, bare):
    """With a manifest anywhere, and the file is named; without one in every bit of header and data below model/."""
    root, missed = copied("tp2pp2", bare), []
    documents = [] if bare else sorted(path.name for path in root.iterdir() if path.is_file())
    for path, byte, bit in flips(root, ["weights", "header", *documents], number):
        poke(path, byte, bit)
        code, _, problems = verify(made("hf"), root)
        if code != 5 or not (bare or path.relative_to(root).as_posix() in "\n".join(problems)):
            missed.append((path.relative_to(root), byte, bit, code, problems))
        poke(path, byte, bit)
    assert verify(made("hf"), root)[0] == 0
    figures(f"bit flips, {'below model/ without manifest' if bare else 'anywhere'}", number, missed)


DAMAGES = [
    ("a weight", lambda c: poke(every(c, "o_proj")[0], -1), "o_proj"), ("a missing file", lambda c: every(c, NORM)[0].unlink(), NORM),
    ("a companion", lambda c: poke(c / "tokenizer.json", 0), "tokenizer.json"),
    ("an extra file", lambda c: (c / "x").touch(), "'x' is extra"), ("the manifest", lambda c: poke(c / MANIFEST, 99), MANIFEST)]


@pytest.mark.parametrize("damage, word", [pytest.param(*row[1:], id=row[0]) for row in DAMAGES])
def test_what_the_check_of_a_conversion_refuses_never_becomes_dst(made, tmp_path, capsys, monkeypatch, damage, word):
    source, destination, real = made("hf"), tmp_path / "nt", package.verify
    flags = ["--tp", "2", "--quiet", "--verify"]

    def damaged(original, copy, *rest):
        assert not destination.exists() and (copy / "model_config.json").exists()
        damage(copy)
        return real(original, copy, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(package, "verify", damaged)
        assert call(source, destination, *flags) == 5
    err = capsys.readouterr().err
    assert word in err and "was not committed" in err and "--restart" in err and not destination.exists()
    assert call(source, destination, *flags) == 4 and "--restart" in capsys.readouterr().err
    assert not destination.exists()
    assert call(source, destination, *flags, "--restart") == 0
    assert call("verify", source, destination) == 0


@pytest.mark.parametrize("place, name", [(execute, "check_identities"), (package, "verify")], ids=["before", "in the check"])
def test_a_stop_shortly_before_the_commit(made, tmp_path, capsys, monkeypatch, differs, place, name):
    """What is there then is all but the name, and still no checkpoint; the next run makes it one."""
    def failing(*arguments):
        raise ResourceError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing)
        assert call(made("hf"), tmp_path / "nt", "--quiet", "--verify") == 6
    capsys.readouterr()
    assert not (tmp_path / "nt").exists()
    differs(made("hf"), tmp_path / "nt.partial", [])
    assert call(made("hf"), tmp_path / "nt", "--quiet", "--verify") == 0


def test_a_stop_in_the_check_before_a_swap_is_not_one_in_the_swap(made, tmp_path, capsys, monkeypatch, verify):
    """The damaged checkpoint that was to be replaced must not be taken for the one that has replaced another."""
    source, root = made("hf"), tmp_path / "nt"
    assert call(source, root, "--quiet") == 0
    poke(every(root, "o_proj")[0], -1)

    def failing(*arguments):
        raise ResourceError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr(package, "verify", failing)
        assert call(source, root, "--quiet", "--overwrite", "--verify") == 6
    capsys.readouterr()
    assert call(source, root, "--quiet", "--overwrite", "--verify") == 0
    assert verify(source, root)[0] == 0


@pytest.mark.parametrize("flags", [(), ("--tp", "2", "--pp", "2"), ("--rope", "interleaved", "--dtype", "float32")], ids=str)
def test_a_conversion_with_a_check_ends_well(made, tmp_path, capsys, flags):
    assert call(made("qwen2_hf"), tmp_path / "nt", "--verify", *flags) == 0
    assert "verified every weight" in capsys.readouterr().out


def test_a_conversion_with_a_check_keeps_64_mib(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=60_000)
    code, peak, err = measured(tmp_path / "hf", tmp_path / "nt", "--verify", "--max-memory", "64MiB", "--workers", "1")
    assert (code, err) == (0, "") and peak <= 64 * 2**20


def first(content):
    """Writes this to the first of the weight files."""
    return lambda c: every(c, "/0/", "down_proj")[0].write_bytes(content)


HOSTILE = [
    ("newline and escapes in a name", lambda c: (c / "model" / "a\n\x1b[2Jb").touch(), ["a\\n\\x1b[2Jb"]),
    ("no UTF-8 in a name", lambda c: open(os.fsencode(c / "model") + b"/\xff\xfe.safetensors", "w").close(), ["\\udcff"]),
    ("escapes in a folder", lambda c: shutil.copytree(c / "model/model/decoder", c / "model/model/\x1b[2J\n"), ["\\x1b[2J"]),
    ("escapes beside model", lambda c: (c / "\x1b]0;x\x07.safetensors").touch(), ["\\x1b]0;x"]),
    ("a link to itself", lambda c: (c / "model/loop").symlink_to("loop"), ["model/loop"]),
    ("a link upwards", lambda c: (c / "model/model/up").symlink_to("../.."), ["model/model/up"]),
    ("weights a link to themselves", lambda c: replace(every(c, NORM)[0], partial(os.symlink, "model_weight.safetensors")), [NORM]),
    ("weights without end", lambda c: replace(every(c, NORM)[0], partial(os.symlink, "/dev/zero")), [NORM]),
    *[(f"{name} is a pipe", lambda c, name=name: replace(c / name, os.mkfifo), [name]) for name in (
        "model_config.json", "config.yaml", MANIFEST, "model/model/x.safetensors")],
    *[(f"{name} is a folder", lambda c, name=name: replace(c / name, os.mkdir), [name]) for name in (
        "model_config.json", "config.yaml", "checkpoint_metadata.json", MANIFEST)],
    *[(f"{name} is a link to itself", lambda c, name=name: replace(c / name, partial(os.symlink, name)), [name]) for name in (
        "model_config.json", "config.yaml", "checkpoint_metadata.json", MANIFEST)],
    *[(f"{name}: {text[:9]}", lambda c, name=name, text=text: (c / name).write_bytes(os.fsencode(text)), [name])
      for name in ("model_config.json", "checkpoint_metadata.json", MANIFEST) for text in (
          "", "{", "[]", "1", "null", '"x"', "[" * 10**5, '{"a":' * 10**5, '{"a":1,"a":2}', '{"tp":NaN}', "9" * 5000, "\udcff")],
    *[(f"config.yaml: {text[:12]}", lambda c, text=text: (c / "config.yaml").write_text(text), ["config.yaml"]) for text in (
        "[" * 10**4, "{a: 1", "\0", "tp: !!timestamp x", "tp: !!bool x", "tp: !!int ''", "? {a: 1}: 2",
        "tp: !!python/object/apply:os.abort []", "parallelism: {tp: &a [*a]}", "tp: 2001-99-99", "9" * 5000 + ": 1")],
    ("a million layers", lambda c: edit_json(c, "model_config.json", num_hidden_layers=10**6), ["num_hidden_layers"]),
    ("a vast vocabulary", lambda c: edit_json(c, "model_config.json", vocab_size=2**47), [EMBEDDING]),
    ("a rank of a million", lambda c: rename(c, "o_proj", "rank-0-of-1_tp-rank-0-of-1", "rank-0-of-999999_tp-rank-0-of-999999"),
     ["o_proj"]),
    ("a header of 2**63 bytes", first(b"\xff" * 64), ["down_proj"]), ("an empty file", first(b""), ["down_proj"]),
    ("a million pairs", lambda c: edit_header(c, "None,None,None|", "0,0,None|0,0,None#0,0,None|0,0,None;" * 10**4, "down", count=1),
     ["down_proj"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=ascii(row[0])) for row in HOSTILE])
def test_a_hostile_copy_is_refused_in_plain_words(made, copied, differs, change, words):
    change(root := copied("tp1"))
    differs(made("hf"), root, words)


WRONG = ["\x1b[2J\n", [1], {"a": []}, True, None, 0, -1, 1.5, 10**30, float("inf")]
KEYS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
        "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps", "rope_theta", "initializer_range", "hidden_act",
        "bos_token_id", "eos_token_id", "pad_token_id"]


@pytest.mark.parametrize("kind, name, key", [
    *[("tp1", "model_config.json", key) for key in [*KEYS, "rope_interleaved", "is_llama_config"]],
    *[("hf3", "config.json", key) for key in KEYS]])
def test_no_value_in_a_config_is_taken_for_another(made, copied, differs, verify, kind, name, key):
    """Refused as the copy and as the source; but a value that means the same as the right one is right."""
    root, before = copied(kind), json.loads((made(kind) / name).read_text())
    for value in WRONG:
        edit_json(root, name, **{key: value})
        if value not in (before[key], [before[key]]) and not (value is None and key.endswith("token_id")):
            differs(made("hf"), root, [])
            assert verify(root, made("hf"))[0] in (3, 5), value


FORGED = {
    "documents": [lambda m, key=key, value=value: m.update({key: value}) for key in ("run", "facts", "files") for value in (
        None, 5, "x", [5], [[1, 2]], {"a": []}, [{"path": 1}], [[[], 1]])],
    **{key: [lambda m, key=key, value=value: m["facts"].update({key: value}) for value in (
        -5, 1, 10**12, True, "x", "\x1b[2J", None, [[]], {"a": 1}, [5], 1.5, "float64")]
       for key in ("vocab_size", "allowed", "dtype")},
    **{key: [lambda m, key=key, value=value: m["files"][3].update({key: value}) for value in (
        "\x1b[2J\n", "a" * 300, "a\0", "../outside", "/etc/hostname", "", ".", "model", -1, 2**70, None, [])]
       for key in ("path", "nbytes", "xxh3_128")}}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_manifest_does_no_harm(made, copied, verify, what):
    """It may lie, as whoever can write it can write the weights; but nothing outside both folders is opened."""
    root = copied("tp1", bare=False)
    right = (root / MANIFEST).read_text()
    (root.parent / "outside").write_text("secret")
    for change in FORGED[what]:
        (root / MANIFEST).write_text(right)
        forge(root, change)
        with opened() as paths:
            code, _, problems = verify(made("hf"), root)
        assert code in (0, 5), ((root / MANIFEST).read_text(), problems)
        assert not {str(root.parent / "outside"), "/etc/hostname"} & set(paths)


@pytest.mark.parametrize("cut", [0, 1, 30, 50, -1, -40], ids=str)
def test_a_manifest_that_was_cut_or_edited(made, copied, differs, cut):
    root = copied("tp1", bare=False)
    text = (root / MANIFEST).read_text()
    for content in (text[:cut], text.replace('"vocab_size": 11', '"vocab_size": 10'), text.replace("\n", "\r\n"), text + "\n"):
        (root / MANIFEST).write_text(content)
        differs(made("hf"), root, [MANIFEST, "damaged or edited"])


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_never_opened(made, copied, tmp_path, verify, differs):
    canary, root, bomb = tmp_path / "canary", copied("tp2pp2", bare=False), pickle.dumps(Canary(str(tmp_path / "canary")))
    names = ["optimizer/optimizer_pp-0-of-2_tp-0-of-2_exp-0-of-1.pt", "random/tp-0-of-2_dp-0-of-1_pp-0-of-2.pt", "pytorch_model.bin"]
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(bomb)
    with opened() as paths:
        differs(made("hf"), root, [f"'{name}' is extra" for name in names])
        (root / MANIFEST).unlink()
        assert verify(made("hf"), root)[0] == verify(root, made("hf"))[0] == verify(root, command="inspect")[0] == 0
    assert not canary.exists() and not {str(root / name) for name in names} & set(paths)
    pickle.loads(bomb)
    assert canary.exists(), "it would have shown itself"
