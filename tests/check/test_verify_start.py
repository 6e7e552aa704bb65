"""A config.yaml that does not start from the weights beside it is found, with a manifest and without; a folder that was
moved or copied is told apart. Nanotron's own rules: parse_ckpt_path (nanotron/serialize/main.py), trainer.py."""
import json
import os
import shutil

import pytest
from damage import bare, edit_json, edit_yaml, poke
from running import call
from sources import make_source
from trees import GOLDEN, MANIFEST

EDITED = ("--edited", "config.yaml")


def starts(root, text):
    """Have config.yaml start like this; `{here}` is the folder."""
    bare_path = root / "config.yaml"
    lines = bare_path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("    path: "))
    lines[at - 1:at + 1] = [text.replace("{here}", json.dumps(str(root))) + "\n"]
    bare_path.write_text("".join(lines))


@pytest.mark.parametrize("is_bare", [True, False], ids=["bare", "edited"])
@pytest.mark.parametrize("text, words", [
    ("  init_method: {std: 0.02}", ["init_method holds 'std'"]),
    ("  init_method: {std: 0.02, path: {here}}", ["init_method holds 'path, std'"]),
    ("  init_method: {use_mup: true}", ["init_method holds 'use_mup'"]), ("  init_method: null", ["holds 'nothing'"]),
    ("  x: 0", ["holds 'nothing'"]), ("  init_method: {path: null}", ["init_method.path is 'None', not a path"]),
    ("  init_method: {path: [a]}", ["init_method.path is a list, not a path"]),
    ("  init_method: {path: /nowhere/at/all}", ["'/nowhere/at/all'", "does not start from"]),
    ("  init_method: {path: /}", ["does not start from"]), ("  init_method: {path: .}", ["does not start from"]),
    ("  init_method: {path: s3://bucket/nt}", ["does not start from"]),
    ('  init_method: {path: "a\\0b"}', ["not a path"])])
def test_a_training_that_starts_from_something_else(made, copied, differs, is_bare, text, words):
    starts(root := copied("tp2pp2", is_bare), text)
    problems = differs(made("hf"), root, [*words, f"'{root}'"], *(() if is_bare else EDITED))
    assert len(problems) == 1


def test_the_ways_to_name_this_folder(made, copied, verify, tmp_path, monkeypatch):
    root = copied("tp1")
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for path in (root, tmp_path / "link", f"{root}/", f"{root}/../copy", "copy", "./link/"):
        bare(root)
        edit_yaml(root, json.dumps(str(root)), json.dumps(str(path)))
        code, out, _ = verify(made("hf"), root)
        assert code == 0 and ("is relative" in out) == (not str(path).startswith("/")), path


def test_a_folder_that_was_moved_or_copied_is_told_apart(tmp_path, verify, differs):
    source, old, new = make_source(tmp_path / "hf"), tmp_path / "old", tmp_path / "new"
    assert call(source, old, "--quiet", "--tp", "2") == 0
    assert "note " not in verify(source, old)[1]
    shutil.copytree(old, new)
    code, out, _ = verify(source, new)
    assert code == 0 and "where the same checkpoint stands" in out
    weights = next((old / "model").rglob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-2])
    differs(source, new, [f"init_method.path is '{old}'", f"set model.init_method.path to '{new}'"])
    shutil.rmtree(old)
    code, out, _ = verify(source, new)
    assert code == 0 and f"'{new}' was moved; set model.init_method.path to '{new}'" in out
    facts = json.loads(verify(source, new, "--json")[1])
    assert len(facts["notes"]) == 1
    edit_yaml(new, "seed: 42", "seed: 43")
    differs(source, new, [f"init_method.path is '{old}'"], *EDITED)
    assert call(make_source(tmp_path / "hf2", config={"rms_norm_eps": 1e-6}), old, "--quiet") == 0
    differs(source, new, [f"init_method.path is '{old}'"], *EDITED)


def test_what_starts_elsewhere_can_be_accepted(made, copied, verify):
    starts(root := copied("tp1"), "  init_method: {std: 0.02}")
    code, out, _ = verify(made("hf"), root, "--allow", "config.yaml")
    assert code == 0 and "init_method holds 'std'" in out and "--allow config.yaml" in out


def test_a_resumed_training_goes_where_nanotron_goes(made, copied, tmp_path, verify, differs):
    """It comes before init_method, follows latest.txt, and loads the state of the optimizer unless told not to."""
    root, steps = copied("tp1"), tmp_path / "steps"
    steps.mkdir()

    def resumed(path, *more):
        bare(root)
        text = (root / "config.yaml").read_text().split("  resume_checkpoint_path:")
        rest = text[1].partition("data_stages:")[2]
        said = "".join(f"  {line}\n" for line in (f"resume_checkpoint_path: {json.dumps(str(path))}", *more))
        (root / "config.yaml").write_text(f"{text[0]}{said}data_stages:{rest}")

    resumed(tmp_path / "empty")
    code, out, _ = verify(made("hf"), root)
    assert code == 0 and "holds no checkpoint, so Nanotron starts from model.init_method" in out
    for path in (made("tp1"), "s3://bucket/steps"):
        resumed(path)
        differs(made("hf"), root, ["resume_checkpoint_path", "does not start from"])
    resumed(root)
    differs(made("hf"), root, ["load_optimizer is not false", "load_lr_scheduler is not false"])
    resumed(root, "load_optimizer: false", "load_lr_scheduler: false")
    assert verify(made("hf"), root)[0] == 0
    resumed(steps, "load_optimizer: false", "load_lr_scheduler: false")
    (steps / "100").symlink_to(root)
    for text, equal in (("100", True), ("100\n", True), ("200", False), ("x", False), ("9" * 5000, False)):
        (steps / "latest.txt").write_text(text)
        assert verify(made("hf"), root)[0] == (0 if equal else 5), text[:9]
    os.unlink(steps / "latest.txt")
    os.mkfifo(steps / "latest.txt")
    differs(made("hf"), root, ["latest.txt"])


@pytest.mark.parametrize("old, new, words", [
    ("expert_parallel_size: 1", "expert_parallel_size: 2", ["expert_parallel_size is '2', the weights beside it need"]),
    ("expert_parallel_size: 1", "context_parallel_size: 2", ["context_parallel_size is '2'"]),
    (" dp: 1", " dp: 0", ["dp is '0'"]), (" dp: 1", " dp: null", ["dp is 'None'"]),
    ("hidden_size: 16", "hidden_size: 16\n    flex_attention_mask: document", ["flex_attention_mask is"]),
    ("hidden_size: 16", "hidden_size: 16\n    _attn_implementation: flex_attention", ["_attn_implementation is"])])
def test_what_this_topology_cannot_train(made, copied, differs, old, new, words):
    edit_yaml(root := copied("tp1"), old, new)
    differs(made("hf"), root, words)


@pytest.mark.parametrize("name", ["flash_attention_2", "sdpa", "llama3_ring_attention"])
def test_attention_functions_that_compute_the_same(made, copied, verify, name):
    edit_json(root := copied("tp1"), "model_config.json", _attn_implementation=name)
    edit_yaml(root, "hidden_size: 16", f"hidden_size: 16\n    _attn_implementation: {name}")
    assert verify(made("hf"), root)[0] == 0


def test_sequences_longer_than_the_model_knows_are_told(made, copied, verify):
    edit_yaml(root := copied("tp1"), "sequence_length: 64", "sequence_length: 1000000")
    code, out, _ = verify(made("hf"), root)
    assert code == 0 and "sequence_length 1000000 is more than the 64 positions" in out


@pytest.mark.parametrize("text, words", [("", ["config.yaml is empty"]), ("# nothing\n", ["config.yaml is empty"]),
                                         ("[1]", ["holds a list"]), ("x", ["holds a str"])])
def test_a_config_yaml_without_settings(made, copied, differs, text, words):
    ((root := copied("tp1")) / "config.yaml").write_text(text)
    assert len(differs(made("hf"), root, words)) == 1


def test_an_overwritten_destination_is_no_other_folder(tmp_path, verify):
    """While the check runs, the old checkpoint still stands where config.yaml starts from."""
    source, root = make_source(tmp_path / "hf"), tmp_path / "nt"
    assert call(make_source(tmp_path / "old", config={"rms_norm_eps": 1e-6}), root, "--quiet") == 0
    assert call(source, root, "--quiet", "--verify", "--overwrite") == 0
    assert verify(source, root)[0] == 0


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden checkpoints are not beside this checkout")
def test_what_nanotron_saved_without_a_trainer_needs_no_config_yaml(tmp_path, verify):
    root = shutil.copytree(GOLDEN / "llama_gqa_tp1_pp1_dp1", tmp_path / "nt")
    assert not (root / MANIFEST).exists() and verify(GOLDEN / "llama_gqa_hf", root)[0] == 0
    poke(next((root / "model").rglob("*.safetensors")), -1)
    assert verify(GOLDEN / "llama_gqa_hf", root)[0] == 5
