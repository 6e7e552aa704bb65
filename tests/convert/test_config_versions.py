"""One model described in the words of transformers 4 and in those of 5 gives one destination, byte for byte."""
import importlib.util
import json
import subprocess
import sys

import pytest
from sources import CONFIG, make_source

from stream_reshard.cli import main

FIVE = {"rope_theta": ..., "rope_scaling": ..., "torch_dtype": ..., "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
"""What transformers 5 writes in other words; `...` takes a key out."""

SAYINGS = [
    ("as transformers 5 saves it", {}),
    ("another base", {"theta": 5e5}),
    ("a base that is an int", {"theta": 500000}),
    ("head_dim said", {"both": {"head_dim": 4}}),
    ("tied", {"tied": True}),
    ("Qwen2", {"family": "qwen2"}),
    ("three shards", {"num_shards": 3}),
]

FLAGS = [["--tp", "2", "--pp", "2"], ["--checkpoint-version", "1.2", "--allow", "rope_theta"],
         ["--rope", "interleaved", "--vocab-multiple", "8"]]


def tree(root):
    """The bytes of every file below a folder, without what names the folder or the time."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name, content = path.relative_to(root).as_posix(), path.read_bytes()
        if name == "config.yaml":
            content = content.replace(str(root).encode(), b"DST")
        if name == "stream_reshard.json":
            manifest = json.loads(content)
            content = ([file for file in manifest["files"] if file["path"] != "config.yaml"],
                       manifest["run"]["plan_sha256"], manifest["facts"])
        found[name] = content
    return found


def convert(source, destination, flags):
    assert main([str(source), str(destination), "--quiet", "--max-memory", "2GiB", *flags]) == 0
    return tree(destination)


def both_versions(root, theta=10000.0, both={}, **kinds):
    """The same model twice: (described for transformers 4, for 5)."""
    four = make_source(root / "four", config={"rope_theta": theta} | both, **kinds)
    rope = FIVE["rope_parameters"] | {"rope_theta": theta}
    return four, make_source(root / "five", config=FIVE | both | {"rope_parameters": rope}, **kinds)


@pytest.mark.parametrize("saying, flags", [
    *[pytest.param(saying, [], id=remark) for remark, saying in SAYINGS],
    *[pytest.param(SAYINGS[1][1], flags, id=" ".join(flags)) for flags in FLAGS]])
def test_same_destination(tmp_path, saying, flags):
    four, five = both_versions(tmp_path, **saying)
    assert (four / "config.json").read_bytes() != (five / "config.json").read_bytes()
    trees = [convert(root, tmp_path / f"{root.name}_nt", flags) for root in (four, five)]
    assert trees[0] == trees[1]
    names = {name for name in trees[0] if not name.startswith("model/")}
    assert names == {"config.yaml", "model_config.json", "checkpoint_metadata.json", "stream_reshard.json"}


@pytest.mark.parametrize("version", ["four", "five"])
def test_the_base_arrives(tmp_path, version):
    four, five = both_versions(tmp_path, theta=5e5)
    convert({"four": four, "five": five}[version], tmp_path / "nt", [])
    assert json.loads((tmp_path / "nt" / "model_config.json").read_text())["rope_theta"] == 5e5
    assert "rope_theta: 500000.0\n" in (tmp_path / "nt" / "config.yaml").read_text()


SAVE = """
import json, sys, transformers
root, sizes, names = sys.argv[1], json.loads(sys.argv[2]), {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}
for family, name in names.items():
    getattr(transformers, name)(**sizes, architectures=[name.replace("Config", "ForCausalLM")], dtype="bfloat16",
                                tie_word_embeddings=False).save_pretrained(f"{root}/{family}")
"""
"""In a process of its own: torch would stay in this one, and count in the memory of the tests that follow."""


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_what_transformers_itself_writes(tmp_path):
    """The config.json of the transformers that is installed gives what the one written by hand gives."""
    sizes = {key: value for key, value in CONFIG.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    for family in ("llama", "qwen2"):
        make_source(tmp_path / family, family=family)
        make_source(tmp_path / f"{family}_by_hand", family=family, config={"pad_token_id": None})
    subprocess.run([sys.executable, "-c", SAVE, str(tmp_path), json.dumps(sizes)], check=True)
    for family in ("llama", "qwen2"):
        saved = json.loads((tmp_path / family / "config.json").read_text())
        assert "transformers_version" in saved
        by_hand = convert(tmp_path / f"{family}_by_hand", tmp_path / f"{family}_by_hand_nt", [])
        assert convert(tmp_path / family, tmp_path / f"{family}_nt", []) == by_hand
