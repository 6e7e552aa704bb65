"""Hostile Nanotron folders: verify and inspect end soon, in few words, and open nothing outside."""
import os
import shutil
from pathlib import Path

import pytest
from damage import edit_json, forge, replace, start_here
from running import call, in_child, outside
from sources import edit_text, make_source


def bomb(copy):
    """An anchor of an anchor of an anchor: ten to the eighth words, if somebody prints them."""
    text = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    text += "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8))
    text += (copy / "config.yaml").read_text().replace("hidden_size: 16", "hidden_size: *a7")
    (copy / "config.yaml").write_text(text)


def twins(copy):
    """Good files beside a damaged one, in folders that no loader of Nanotron looks into."""
    path = copy / "model/model/decoder/0/pp_block/input_layernorm/model_weight.safetensors"
    for folder in ("decoder/0/pp_block.input_layernorm", "decoder/0.pp_block/input_layernorm",
                   "decoder.0/pp_block/input_layernorm", "decoder.0.pp_block/input_layernorm",
                   "decoder/0.pp_block.input_layernorm"):
        (copy / "model/model" / folder).mkdir(parents=True)
        shutil.copy(path, copy / "model/model" / folder)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def lists(copy, *paths):
    """The manifest lists more files than there are."""
    forge(copy, lambda value: value["files"].extend(
        {"path": path, "nbytes": 6, "xxh3_128": "0" * 32} for path in paths))


COPIES = [
    ("a pipe among the weights", lambda copy: os.mkfifo(copy / "model/model/model_x.safetensors")),
    *[(f"{name} a pipe", lambda copy, name=name: replace(copy / name, os.mkfifo)) for name in (
        "stream_reshard.json", "config.yaml", "checkpoint_metadata.json", "model_config.json")],
    ("a dangling link", lambda copy: replace(copy / "checkpoint_metadata.json", os.symlink, "nowhere")),
    *[(f"{key} is {value!r:.9}",
       lambda copy, key=key, value=value: edit_json(copy, "model_config.json", **{key: value}))
      for key, value in [
          ("num_hidden_layers", 2**47), ("vocab_size", "x" * 10**4), ("vocab_size", 2**47),
          ("is_\x1b[2J\n_config", True), ("rope_interleaved", "\ud800"), ("tie_word_embeddings", "\x1b[2J"),
          ("rope_scaling", ["\ud800\n"]), ("eos_token_id", 10**4000)]],
    ("lists for a version", lambda copy: edit_json(copy, "checkpoint_metadata.json", version=[], tp={})),
    ("a bomb in config.yaml", bomb),
    ("an object in config.yaml", lambda copy: edit_text(copy / "config.yaml", " 16", " !!python/name:os.system")),
    ("twins of a damaged file", twins),
    ("files outside", lambda copy: lists(copy, "../bait", f"{copy.parent}/bait", "/etc/passwd", "model/../../bait"))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A source and its conversion, verified and inspected once, so that children have everything imported."""
    root = make_source(tmp_path_factory.mktemp("pair") / "hf")
    copy = root.with_name("nt")
    assert call(root, copy, "--quiet") == call("verify", root, copy, "--quiet") == call("inspect", copy, "--quiet") == 0
    return root, copy


@pytest.mark.parametrize("keep", [True, False], ids=["manifest", "bare"])
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in COPIES])
def test_hostile_copy(tmp_path, pair, change, keep):
    """Verify and inspect end soon, with a screen of printable words at most, and open nothing but the two folders, and
    the manifest where config.yaml starts from: this is a copy of that."""
    root, copy = pair[0], Path(shutil.copytree(pair[1], tmp_path / "nt"))
    (tmp_path / "bait").write_text("bait!\n")
    start_here(copy)
    change(copy)
    if not keep:
        (copy / "stream_reshard.json").unlink(missing_ok=True)
    for words in (["inspect", copy], ["verify", root, copy]):
        run = in_child(*words, seconds=30)
        assert run.code in {"inspect": (0, 3), "verify": (5,) if keep or change is twins else (0, 5)}[words[0]], run
        found = outside(run, root, copy)
        assert set(found) <= {str(pair[1] / "stream_reshard.json")} and len(run.out + run.err) < 7000, run
        assert all(line.isprintable() for line in (run.out + run.err).split("\n")), run
