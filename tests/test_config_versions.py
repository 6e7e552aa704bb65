"""One model described in the words of transformers 4 and in those of 5 gives one destination, byte for byte."""
import json

import pytest
from sources import CONFIG, FAMILY, make_source

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

TOPOLOGIES = [["--tp", "2", "--pp", "2"], ["--checkpoint-version", "1.2", "--allow", "rope_theta"],
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
            content = {key: manifest[key] for key in ("files", "plan_sha256", "ignored_tensors")}
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


@pytest.mark.parametrize("flags", TOPOLOGIES, ids=" ".join)
@pytest.mark.parametrize("saying", [pytest.param(row[1], id=row[0]) for row in SAYINGS])
def test_same_destination(tmp_path, saying, flags):
    if saying.get("family") == "qwen2" and "1.2" in flags:
        pytest.skip("release 0.4 has no Qwen2")
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


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_transformers_itself_writes(tmp_path, family):
    """The config.json of the transformers that is installed gives what the one written by hand gives."""
    transformers = pytest.importorskip("transformers")
    config_class = {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}[family]
    sizes = {key: value for key, value in CONFIG.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    saved = getattr(transformers, config_class)(**sizes, tie_word_embeddings=False, architectures=FAMILY[family][
        "architectures"], dtype="bfloat16")
    four, five = make_source(tmp_path / "four", family=family), make_source(tmp_path / "five", family=family)
    saved.save_pretrained(five)
    assert "rope_parameters" in json.loads((five / "config.json").read_text()) or transformers.__version__ < "5"
    assert convert(four, tmp_path / "four_nt", []) == convert(five, tmp_path / "five_nt", [])
