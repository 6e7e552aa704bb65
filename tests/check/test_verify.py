"""Verify finds one model equal in whatever form, and names what is another model, but nothing else."""
import json
import random
import shutil

import numpy as np
import pytest
from damage import edit_header, edit_yaml, every, poke
from running import call
from sources import edit_config, make_source
from trees import EMBEDDING, GOLDEN, KINDS, MANIFEST, Oracle

from stream_reshard.machine import memory

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


@pytest.mark.parametrize("nbytes", [pytest.param(256, id="rows"),
                                    pytest.param(32, id="parts of rows", marks=pytest.mark.heavy)])
@pairs
def test_one_changed_weight_is_named_with_its_place_and_values(made, copied, verify, differs, monkeypatch, source, copy,
                                                               flags, nbytes):
    """First in one parameter, then in each: a line for each, and no other. There is no manifest; what is compared at a
    time are a few rows, or parts of them."""
    monkeypatch.setattr(memory, "MAX_BLOCK_NBYTES", nbytes)
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


WINDOWS = ["full_attention", "sliding_attention"] * 20

SAYINGS = [("rms_norm_eps", 1e-6), ("rope_theta", 1e4), ("tie_word_embeddings", True), ("eos_token_id", 9),
           ("head_dim", 8), ("mlp_bias", True), ("rope_scaling", {"rope_type": "llama3", "factor": 16.0}),
           ("sliding_window", 9), ("layer_types", [*WINDOWS[:9], "full_attention", *WINDOWS[10:]])]


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
    ("rms_norm_eps: 1.0e-05", "rms_norm_eps: 1.0e-06", 5), (" tp: 2", " tp: 1", 5),
    ("vocab_size: 11", "vocab_size: 12", 0),
    ("vocab_size: 11", "vocab_size: 13", 5), ("rope_interleaved: false", "rope_interleaved: true", 5)])
def test_an_edited_config_yaml_may_say_anything_but_another_model(made, copied, verify, differs, old, new, code):
    edit_yaml(root := copied("tp2pp2", is_bare=False), old, new)
    differs(made("hf"), root, ["'config.yaml' has", "--edited"])
    assert verify(made("hf"), root, "--edited", "config.yaml")[0] == code


def test_what_nfs_keeps_of_removed_files_is_not_there(made, copied, verify):
    root = copied("tp2pp2", is_bare=False)
    for folder in (root, root / "model" / "model" / "lm_head"):
        (folder / ".nfs00000000a1b2c3d40000001f").write_text("still open elsewhere")
    assert verify(made("hf"), root)[0] == 0


@pytest.mark.parametrize("name", [".nfs", ".nfs_my_backup.tar", ".nfs000001", ".nfs00000000A1B2C3D40000001F",
                                  ".nfs00000000a1b2c3d40000001f0", "x.nfs00000000a1b2c3d40000001f"])
def test_what_only_begins_like_that_is_there(made, copied, verify, name):
    """NFS writes 24 digits (fs/nfs/unlink.c); all else is a file of somebody."""
    root = copied("tp2pp2", is_bare=False)
    (root / name).write_text("mine")
    code, _, problems = verify(made("hf"), root)
    assert code == 5 and f"'{name}' is extra" in "".join(problems)
