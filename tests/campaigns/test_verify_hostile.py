"""Verify refuses hostile copies, configs and manifests in plain words, and opens no pickle."""
import json
import os
import pickle
import shutil
from functools import partial

import pytest
from damage import bare, edit_header, edit_json, every, forge, rename, replace
from running import opened
from trees import EMBEDDING, MANIFEST, NORM


def first(content):
    """Writes this to the first of the weight files."""
    return lambda c: every(c, "/0/", "down_proj")[0].write_bytes(content)


HOSTILE = [
    ("newline and escapes in a name", lambda c: (c / "model" / "a\n\x1b[2Jb").touch(), ["a\\n\\x1b[2Jb"]),
    ("no UTF-8 in a name", lambda c: open(os.fsencode(c / "model") + b"/\xff\xfe.safetensors", "w").close(),
     ["\\udcff"]),
    ("escapes in a folder", lambda c: shutil.copytree(c / "model/model/decoder", c / "model/model/\x1b[2J\n"),
     ["\\x1b[2J"]),
    ("escapes beside model", lambda c: (c / "\x1b]0;x\x07.safetensors").touch(), ["\\x1b]0;x"]),
    ("a link to itself", lambda c: (c / "model/loop").symlink_to("loop"), ["model/loop"]),
    ("a link upwards", lambda c: (c / "model/model/up").symlink_to("../.."), ["model/model/up"]),
    ("weights a link to themselves",
     lambda c: replace(every(c, NORM)[0], partial(os.symlink, "model_weight.safetensors")), [NORM]),
    ("weights without end", lambda c: replace(every(c, NORM)[0], partial(os.symlink, "/dev/zero")), [NORM]),
    *[(f"{name} is a pipe", lambda c, name=name: replace(c / name, os.mkfifo), [name]) for name in (
        "model_config.json", "config.yaml", MANIFEST, "model/model/x.safetensors")],
    *[(f"{name} is a folder", lambda c, name=name: replace(c / name, os.mkdir), [name]) for name in (
        "model_config.json", "config.yaml", "checkpoint_metadata.json", MANIFEST)],
    *[(f"{name} is a link to itself", lambda c, name=name: replace(c / name, partial(os.symlink, name)), [name])
      for name in ("model_config.json", "config.yaml", "checkpoint_metadata.json", MANIFEST)],
    *[(f"{name}: {text[:9]}", lambda c, name=name, text=text: (c / name).write_bytes(os.fsencode(text)), [name])
      for name in ("model_config.json", "checkpoint_metadata.json", MANIFEST) for text in (
          "", "{", "[]", "1", "null", '"x"', "[" * 10**5, '{"a":' * 10**5, '{"a":1,"a":2}', '{"tp":NaN}', "9" * 5000,
          "\udcff")],
    *[(f"config.yaml: {text[:12]}", lambda c, text=text: (c / "config.yaml").write_text(text), ["config.yaml"])
      for text in (
          "[" * 10**4, "{a: 1", "\0", "tp: !!timestamp x", "tp: !!bool x", "tp: !!int ''", "? {a: 1}: 2",
          "tp: !!python/object/apply:os.abort []", "parallelism: {tp: &a [*a]}", "tp: 2001-99-99", "9" * 5000 + ": 1")],
    ("a million layers", lambda c: edit_json(c, "model_config.json", num_hidden_layers=10**6), ["num_hidden_layers"]),
    ("a vast vocabulary", lambda c: edit_json(c, "model_config.json", vocab_size=2**47), [EMBEDDING]),
    ("a rank of a million",
     lambda c: rename(c, "o_proj", "rank-0-of-1_tp-rank-0-of-1", "rank-0-of-999999_tp-rank-0-of-999999"), ["o_proj"]),
    ("a header of 2**63 bytes", first(b"\xff" * 64), ["down_proj"]), ("an empty file", first(b""), ["down_proj"]),
    ("a million pairs",
     lambda c: edit_header(c, "None,None,None|", "0,0,None|0,0,None#0,0,None|0,0,None;" * 10**4, "down", count=1),
     ["down_proj"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=ascii(row[0])) for row in HOSTILE])
def test_a_hostile_copy_is_refused_in_plain_words(made, copied, differs, change, words):
    change(root := copied("tp1"))
    differs(made("hf"), root, words)


WRONG = ["\x1b[2J\n", [1], {"a": []}, True, None, 0, -1, 1.5, 10**30, float("inf")]
KEYS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps", "rope_theta",
        "initializer_range", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id"]


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
    "documents": [lambda m, key=key, value=value: m.update({key: value})
                  for key in ("run", "facts", "files") for value in (
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
    root = copied("tp1", is_bare=False)
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
    root = copied("tp1", is_bare=False)
    text = (root / MANIFEST).read_text()
    for content in (text[:cut], text.replace('"vocab_size": 11', '"vocab_size": 10'), text.replace("\n", "\r\n"),
                    text + "\n"):
        (root / MANIFEST).write_text(content)
        differs(made("hf"), root, [MANIFEST, "damaged or edited"])


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_never_opened(made, copied, tmp_path, verify, differs):
    canary, root = tmp_path / "canary", copied("tp2pp2", is_bare=False)
    bomb = pickle.dumps(Canary(str(canary)))
    names = ["optimizer/optimizer_pp-0-of-2_tp-0-of-2_exp-0-of-1.pt", "random/tp-0-of-2_dp-0-of-1_pp-0-of-2.pt",
             "pytorch_model.bin"]
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(bomb)
    with opened() as paths:
        differs(made("hf"), root, [f"'{name}' is extra" for name in names])
        bare(root)
        differs(made("hf"), root, [f"'{names[-1]}' is extra: transformers may take the weights from there"])
        assert verify(root, made("hf"))[0] == verify(root, command="inspect")[0] == 0
    assert not canary.exists() and not {str(root / name) for name in names} & set(paths)
    pickle.loads(bomb)
    assert canary.exists(), "it would have shown itself"
