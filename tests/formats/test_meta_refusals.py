"""Folders of Meta's parts that are refused: by name, in one line, and nothing in them is ever run."""
import json
import os
import shutil

import pytest
from meta_parts import EMBEDDING, HEAD, NORM, Q, pair
from refusals import told
from running import call

torch = pytest.importorskip("torch")

ONE, TWO = "consolidated.00.pth", "consolidated.01.pth"


def moved(old, new):
    return lambda root: (root / old).rename(root / new)


def saved_again(root):
    path = root / TWO
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)


def told_params(**keys):
    """Edits params.json; `...` takes a key out."""
    def change(root):
        params = json.loads((root / "params.json").read_text()) | keys
        (root / "params.json").write_text(json.dumps({key: value for key, value in params.items() if value is not ...}))
    return change


FOLDERS = [
    ("a hole", moved(TWO, "consolidated.02.pth"), ["holds 'consolidated.02.pth', but no consolidated.01.pth", "a hole"]),
    ("no first part", moved(ONE, "consolidated.03.pth"), ["no consolidated.00.pth"]),
    ("another name", moved(ONE, "consolidated.pth"), ["holds 'consolidated.pth', but no consolidated.00.pth"]),
    ("twice", lambda root: shutil.copy(root / ONE, root / "consolidated.00 (1).pth"), ["(1).pth', but no consolidated.02.pth"]),
    ("not finished", lambda root: (root / TWO).rename(root / f"{TWO}.aria2"), ["holds 1 parts, but consolidated.00.pth is "
                                                                                "one of 2", "(16, 32)", "the others"]),
    ("too few", lambda root: (root / TWO).unlink(), ["holds 1 parts, but consolidated.00.pth is one of 2"]),
    ("too many", lambda root: shutil.copy(root / ONE, root / "consolidated.02.pth"),
     ["holds 3 parts, but consolidated.00.pth is one of 2", "remove those of another model"]),
    ("no settings", lambda root: (root / "params.json").unlink(), ["neither params.json nor config.json", "download"]),
    ("old format", saved_again, [TWO, "before 1.6"]),
    ("cut off", lambda root: os.truncate(root / TWO, 4000), [TWO, "cut off", "download"]),
    ("empty", lambda root: os.truncate(root / ONE, 0), [ONE, "is empty"]),
    ("a pointer", lambda root: (root / ONE).write_text("version https://git-lfs.github.com/spec/v1\n"), [ONE, "git lfs pull"]),
    ("a page for params", lambda root: (root / "params.json").write_text("<html></html>"), ["'params.json'", "page of HTML"]),
    ("an answer for params", lambda root: (root / "params.json").write_text('{"error": "gone"}'),
     ["'params.json'", "answer of a server"]),
    ("config.json of another family", lambda root: (root / "config.json").write_text(json.dumps(
        {"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 12,
         "num_hidden_layers": 2, "intermediate_size": 88})), ["config.json: qwen2 has parameters", "without a name in Meta's format"]),
    ("no dim", told_params(dim=...), ["params.json: dim is missing"]),
    ("no norm_eps", told_params(norm_eps=...), ["params.json: norm_eps is missing"]),
    ("layers of another type", told_params(n_layers="2"), ["params.json: n_layers is '2', not a positive int"]),
    ("odd heads", told_params(n_heads=3, n_kv_heads=3), ["params.json: hidden_size 32 is not a multiple of"]),
    ("vast layers", told_params(n_layers=90000), ["the model has 90000 layers, but each part holds 22 tensors"]),
    ("fewer KV heads than parts", told_params(n_kv_heads=1), ["params.json: 1 kv_heads cannot be split evenly by the 2 parts"]),
    ("a window", told_params(sliding_window=9), ["params.json: sliding_window is '9'"]),
    ("scaled RoPE", told_params(use_scaled_rope=True), ["params.json: rope_type is 'llama3'", "--allow rope_scaling"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in FOLDERS])
def test_folders(tmp_path, capsys, change, words):
    root, meta = pair(tmp_path, 2)
    change(meta)
    commands = [["plan", meta], ["verify", meta, root], ["inspect", meta]]
    for command in commands[:1] if any("allow" in word or "window" in word for word in words) else commands:
        line = told(capsys, *command)
        assert all(word in line for word in words), line


def test_another_hidden_size_is_told_tensor_by_tensor(tmp_path, capsys):
    _, meta = pair(tmp_path, 2)
    told_params(multiple_of=64)(meta)
    assert call("plan", meta) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and "in each of 2 parts" in lines[0] and "and 2 more tensors have other shapes" in lines[-1]


TENSORS = [
    ("missing in a part", lambda parts: parts[1].pop(Q), [f"{Q} is missing in {TWO}"]),
    ("missing in all", lambda parts: [part.pop(NORM) for part in parts], [f"{NORM} is missing in {ONE}"]),
    ("no embedding", lambda parts: parts[0].pop(EMBEDDING), [f"'{ONE}' has no matrix {EMBEDDING}"]),
    ("unexpected", lambda parts: parts[1].update(more=torch.zeros(2)), ["unexpected tensor 'more'", TWO]),
    ("a bias", lambda parts: parts[0].update({"layers.0.attention.wq.bias": torch.zeros(2)}), ["wq.bias'"]),
    ("of another size", lambda parts: parts[1].update({HEAD: parts[1][HEAD][:5].clone()}), [HEAD, "(5, 32)", TWO, "(6, 32)"]),
    ("quantised", lambda parts: [part.update({Q: torch.zeros(16, 32, dtype=torch.int8)}) for part in parts],
     [Q, "I8", "quantised"]),
    ("of another dtype", lambda parts: parts[1].update({HEAD: parts[1][HEAD].float()}), [HEAD, "F32", "BF16", TWO]),
    ("transposed", lambda parts: parts[1].update({Q: torch.zeros(32, 16, dtype=torch.bfloat16).t()}),
     [Q, TWO, "(1, 16)", ".contiguous()"]),
    ("of another model", lambda parts: parts[1].update({NORM: parts[1][NORM].flip(0)}),
     [f"{NORM} in {ONE} differs from {NORM} in {TWO}", "of several models"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in TENSORS])
def test_tensors(tmp_path, capsys, change, words):
    root, meta = pair(tmp_path, 2, change=change)
    for command in (["plan", meta], ["inspect", meta], ["verify", meta, root]):
        assert call(*command) == 3
        line = capsys.readouterr().err.splitlines()[0]
        assert all(word in line for word in words), line


def test_a_tied_head_of_its_own_is_refused(tmp_path, capsys):
    """Where config.json ties it; in two parts it may be compared too."""
    root, meta = pair(tmp_path, 2, embedding_dim=0)
    config = json.loads((root / "config.json").read_text()) | {"tie_word_embeddings": True}
    (meta / "config.json").write_text(json.dumps(config))
    assert f"{HEAD} in {ONE} differs from {EMBEDDING} in {ONE}: set tie_word_embeddings in config.json" in told(
        capsys, "plan", meta)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("part", [0, 1])
def test_a_pickle_is_never_run(tmp_path, capsys, part):
    canary = tmp_path / "canary"
    _, meta = pair(tmp_path, 2, change=lambda parts: parts[part].update(trap=Trap(canary)))
    for command in (["plan", meta], [meta, tmp_path / "nt"], ["inspect", meta], ["verify", meta, meta]):
        assert call(*command) == 3
        assert "system" in capsys.readouterr().err
    assert not canary.exists() and not (tmp_path / "nt").exists()
    torch.load(meta / f"consolidated.0{part}.pth", weights_only=False)
    assert canary.exists(), "the canary cannot sing"


def test_options_that_do_not_fit(tmp_path, capsys):
    root, meta = pair(tmp_path, 2)
    assert "--vocab-size is for a Nanotron source only" in told(capsys, "plan", meta, "--vocab-size", 12, code=2)
    assert "whose forward pass is not run" in told(capsys, "verify", "--forward", meta, root)


def test_the_folder_above(tmp_path, capsys):
    """As the hub keeps the parts: in a folder `original`."""
    _, meta = pair(tmp_path / "x", 2)
    (tmp_path / "llama").mkdir()
    meta.rename(tmp_path / "llama" / "original")
    assert "its folder 'original' is one: give " in told(capsys, "plan", tmp_path / "llama")
    assert call("plan", tmp_path / "llama" / "original") == 0
