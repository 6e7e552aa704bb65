"""The cause comes first: of a source that cannot be read one line is told, which names what it is and what to do."""
import os
import shutil

import numpy as np
import pytest
from conversions import convert
from refusals import told
from running import call
from sources import INDEX, ONE, TWO, make_source, raw_file

from stream_reshard.storage.stand_ins import stand_in

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4949453792\n"
HTML = "<!doctype html>\n<html><head><title>Sign in</title></head></html>\n"
SINGLE = "model.safetensors"


def written(name, content):
    return lambda root: (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def linked(name, target):
    return lambda root: ((root / name).unlink(missing_ok=True), (root / name).symlink_to(target))


def instead(*files):
    """Other files in place of the weights."""
    def change(root):
        (root / SINGLE).unlink()
        for name, content in files:
            written(name, content)(root)
    return change


def instead_linked(name, target):
    return lambda root: (instead()(root), linked(name, target)(root))


def without_config(*files):
    return lambda root: (instead(*files)(root), (root / "config.json").unlink())


IN_PLACE = [
    ("pointer", written(SINGLE, POINTER), ["is a Git LFS pointer", "4949453792 bytes", "git lfs pull"]),
    ("pointer for config", written("config.json", POINTER), ["'config.json'", "git lfs pull"]),
    ("pointer for a tokenizer", written("tokenizer.json", POINTER), ["'tokenizer.json'", "git lfs pull"]),
    ("pointer for a vocabulary", written("tokenizer.model", POINTER), ["'tokenizer.model'", "git lfs pull"]),
    ("pointers for all", lambda root: [written(name, POINTER)(root) for name in (SINGLE, "tokenizer.json")],
     [SINGLE, "git lfs pull"]),
    ("page", written(SINGLE, HTML), ["is a page of HTML", "download it again"]),
    ("page for config", written("config.json", HTML), ["'config.json'", "is a page of HTML"]),
    ("page for a tokenizer", written("tokenizer_config.json", HTML), ["'tokenizer_config.json'", "is a page of HTML"]),
    ("XML", written(SINGLE, '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'), ["is a page of XML", "Acc"]),
    ("JSON", written(SINGLE, '{"error": "Invalid username or password."}'), ["is JSON", "Invalid username"]),
    ("JSON for config", written("config.json", '{"error": "Repository not found"}'),
     ["'config.json'", "answer of a server", "Repository not found"]),
    ("text", written(SINGLE, "Entry not found"), ["is text", "'Entry not found'"]),
    ("text for config", written("config.json", "Entry not found"), ["'config.json'", "is text, not JSON"]),
    ("zip", written(SINGLE, b"PK\x03\x04" + bytes(99)), ["a zip file, as torch.save writes", "safetensors"]),
    ("pickle", written(SINGLE, b"\x80\x02}q\x00X\x05\x00\x00" + bytes(99)), ["a pickle", "can run code"]),
    ("GGUF", written(SINGLE, b"GGUF\x03\x00\x00\x00" + bytes(99)), ["a GGUF file"]),
    ("HDF5", written(SINGLE, b"\x89HDF\r\n\x1a\n" + bytes(99)), ["HDF5"]),
    ("gzip", written(SINGLE, b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(99)), ["a gzip file"]),
    ("nothing", written(SINGLE, b""), ["is empty (0 bytes)"]),
    ("no config", written("config.json", b""), ["'config.json'", "is empty (0 bytes)"]),
    ("half", lambda root: os.truncate(root / SINGLE, 4000), ["cut off", "the file has 4000", "bytes are missing"]),
    ("a header cut", lambda root: os.truncate(root / SINGLE, 500), ["cut off", "the file has 500", "bytes are missing"]),
    ("link to nothing", linked(SINGLE, "../blobs/" + "0" * 64), [SINGLE, "is a link to '../blobs/000", "does not exist"]),
    ("config a link to nothing", linked("config.json", "../b"), ["'config.json'", "is a link to '../b'"]),
    ("adapter", instead(("adapter_config.json", '{"base_model_name_or_path": "org/base"}'), ("adapter_model.safetensors", "")),
     ["LoRA adapter of 'org/base'", "merge_and_unload()"]),
    ("adapter without config", without_config(("adapter_config.json", "{"), ("adapter_model.bin", "")), ["LoRA adapter"]),
    ("Meta", without_config(("consolidated.00.pth", "PK"), ("params.json", "{}")),
     ["'consolidated.00.pth' in ", "is text, not weights ('PK')"]),
    ("Mistral", without_config(("consolidated.safetensors", ""), ("params.json", "{}")), ["original format of Mistral"]),
    ("GGUF alone", without_config(("llama-Q4_K_M.gguf", "GGUF")), ["GGUF", "gguf_file"]),
    ("TensorFlow", instead(("tf_model.h5", "")), ["TensorFlow", "from_tf"]),
    ("Flax", instead(("flax_model-00001-of-00002.msgpack", "")), ["Flax", "from_flax"]),
    ("PyTorch", instead(("pytorch_model-00001-of-00002.bin", "")), ["1 shards", "no pytorch_model.bin.index.json"]),
    ("PyTorch under another name", instead(("model.pt", "")), ["pickled weights", "save_pretrained"]),
    ("PyTorch, a link to nothing", instead_linked("pytorch_model.bin", "../b"), ["is a link to '../b'"]),
    ("PyTorch, a pointer", instead(("pytorch_model.bin", POINTER)), ["'pytorch_model.bin'", "git lfs pull"]),
    ("PyTorch, nothing", instead(("pytorch_model.bin", "")), ["'pytorch_model.bin'", "is empty (0 bytes)"]),
    ("PyTorch, safetensors", lambda root: (root / SINGLE).rename(root / "pytorch_model.bin"), ["no zip file"]),
    ("not finished by aria2", written(f"{SINGLE}.aria2", "x"), [f"'{SINGLE}' is not downloaded whole", "aria2"]),
    ("not finished", instead(("model.safetensors.incomplete", "")), ["was not finished", "incomplete"])]


@pytest.mark.parametrize("change, words", [pytest.param(*row[1:], id=row[0]) for row in IN_PLACE])
def test_what_stands_in_place_of_a_file(tmp_path, capsys, change, words):
    change(make_source(tmp_path / "hf"))
    line = told(capsys, "plan", tmp_path / "hf")
    assert all(word in line for word in words), line


INDEXES = [
    ("page", lambda root: written(INDEX, HTML)(root), "is a page of HTML, not JSON"),
    ("answer", written(INDEX, '{"error": "Entry not found"}'), "is the answer of a server, not the file ('Entry not found')"),
    ("nothing", written(INDEX, ""), "is empty (0 bytes)"), ("zip", written(INDEX, b"PK\x03\x04"), "a zip file"),
    ("cut off", lambda root: os.truncate(root / INDEX, 500), "in line 11, column 45, after the key 'model.layers.0.self_attn.o_proj.weight'; it is cut off, download it again"),
    ("link to nothing", linked(INDEX, "../b"), "is a link to '../b'"),
    ("a shard is a link to nothing", linked(TWO, "../b"), f"'{TWO}' in "),
    ("shards not finished", lambda root: ((root / ONE).unlink(), (root / TWO).rename(root / f"{TWO}.incomplete")),
     "was not finished; run the download again (and 1 more shards are missing)"),
    ("shards not finished in a cache", lambda root: ((root / ONE).unlink(), (root / ".cache/huggingface/download").mkdir(
        parents=True), (root / ".cache/huggingface/download/xyz.incomplete").touch()), "was not finished")]


@pytest.mark.parametrize("change, word", [pytest.param(*row[1:], id=row[0]) for row in INDEXES])
def test_what_stands_in_place_of_an_index(tmp_path, capsys, change, word):
    change(make_source(tmp_path / "hf", num_shards=2))
    assert word in told(capsys, "plan", tmp_path / "hf")


def test_a_cause_in_several_files_is_one_line(tmp_path, capsys):
    root = make_source(tmp_path / "hf", num_shards=2)
    for name in (ONE, TWO):
        (root / name).write_text(POINTER)
    assert "(and 1 more files are Git LFS pointers)" in told(capsys, "plan", root)
    (root / INDEX).write_text(POINTER)
    assert f"'{INDEX}'" in told(capsys, "plan", root)


def test_pointers_in_a_nanotron_folder(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    for path in (tmp_path / "nt" / "model").rglob("*.safetensors"):
        path.write_text(POINTER)
    assert "git lfs pull (and 24 more files are" in told(capsys, tmp_path / "nt", tmp_path / "back", "--to", "hf")
    assert "git lfs pull (and 24 more files are" in told(capsys, "verify", tmp_path / "nt", tmp_path / "hf")
    capsys.readouterr()
    assert call("inspect", tmp_path / "nt") == 0 and "git lfs pull" in capsys.readouterr().out


def test_a_header_may_have_the_length_of_a_magic_number(tmp_path):
    """0x280 bytes of header begin as a pickle does."""
    for length in (0x280, 0x380, 0x480, 0x580, 0x88b1f):
        assert stand_in(length.to_bytes(8, "little") + b'{"a":', "weights") is None


def test_faults_of_a_kind_are_ten_lines_and_their_number(tmp_path, capsys):
    keys = [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(6) for name in ("up", "down", "gate")]
    make_source(tmp_path / "hf", config={"num_hidden_layers": 6, "vocab_size": 7, "mlp_bias": True}, drop=keys,
                extra={f"x{i}": np.ones(1, np.uint16) for i in range(13)})
    assert call(tmp_path / "hf", tmp_path / "nt", "--tp", 4) == 3
    lines = capsys.readouterr().err.splitlines()
    assert sum(" is missing" in line for line in lines) == 10 and "error: and 8 more tensors are missing" in lines
    assert sum("unexpected tensor" in line for line in lines) == 10 and "error: and 3 more tensors are unexpected" in lines
    assert sum("mlp_bias" in line for line in lines) == 1 and "--tp 4" in lines[-1]


def test_headers_that_cannot_be_read_are_counted(tmp_path, capsys):
    """Nothing is said of tensors then: nobody knows which are missing."""
    root = make_source(tmp_path / "hf", num_shards=14)
    for path in root.glob("*.safetensors"):
        path.write_bytes(raw_file('{"a":1}'))
    assert call("plan", root) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[-1] == "error: and 4 more files have no header that can be read"


def test_thousands_of_faults_are_counted(tmp_path, capsys):
    extra = {f"x{i}": np.ones(1, np.uint16) for i in range(3000)}
    make_source(tmp_path / "hf", extra=extra)
    assert call("plan", tmp_path / "hf") == 3
    assert "error: and 2990 more tensors are unexpected" in capsys.readouterr().err.splitlines()


PATHS = [
    ("a hub id", "meta-llama/Llama-2-7b-hf", ["is not a folder", "hf download meta-llama/Llama-2-7b-hf --local-dir"]),
    ("a page of the hub", "https://huggingface.co/org/name/tree/main", ["hf download org/name --local-dir name"]),
    ("nothing", "/nowhere/at/all", ["'/nowhere/at/all' is not a folder"]),
    ("an unfinished conversion", "{}/nt", ["/nt' does not exist; ", "/nt.partial' is what a stopped run to it has"]),
    ("a file", "{}/hf/config.json", ["is not a folder but a file", "/hf'"]),
    ("a GGUF file", "{}/x.gguf", ["GGUF", "gguf_file"]),
    ("the folder above", "{}/one", ["its folder 'hf' is one: give ", "/one/hf'"]),
    ("a folder of several", "{}/steps", ["its folders '9', '10' are: give one of them"]),
    ("the cache", "{}/models--org--name", ["Hugging Face cache", "models--org--name/snapshots/abc'"]),
    ("its snapshots", "{}/models--org--name/snapshots", ["give ", "snapshots/abc'"]),
    ("its blobs", "{}/models--org--name/blobs", ["models--org--name/snapshots/abc'"]),
    ("original", "{}/hf/original", ["is a part of a checkpoint, not the whole: give ", "/hf'"]),
    ("a part of Nanotron's", "{}/steps/10/model", ["is a part of a checkpoint, not the whole: give ", "/steps/10'"]),
    ("a link to nothing", "{}/broken", ["is a link to 'gone'"]), ("a link to itself", "{}/loop", ["leads to itself"]),
    ("an empty folder", "{}/empty", ["holds neither config.json nor model_config.json"])]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    make_source(root / "hf")
    (root / "hf" / "original").mkdir()
    (root / "hf" / "original" / "consolidated.00.pth").touch()
    shutil.copytree(root / "hf", root / "one" / "hf")
    for step in ("9", "10"):
        convert(root / "hf", root / "steps" / step)
    for commit in ("aaa", "abc", "xyz"):
        shutil.copytree(root / "hf", root / "models--org--name" / "snapshots" / commit)
    for name in ("blobs", "refs"):
        (root / "models--org--name" / name).mkdir()
    (root / "models--org--name" / "refs" / "main").write_text("abc")
    (root / "empty").mkdir()
    (root / "nt.partial").mkdir()
    (root / "broken").symlink_to("gone")
    (root / "loop").symlink_to("loop")
    (root / "x.gguf").touch()
    return root


@pytest.mark.parametrize("path, words", [pytest.param(*row[1:], id=row[0]) for row in PATHS])
def test_a_path_that_is_no_checkpoint(places, capsys, path, words):
    path = path.format(places)
    for command in (["plan", path], ["inspect", path], ["verify", path, places / "hf"],
                    ["plan", path, "--vocab-size", 7], ["verify", places / "hf", path]):
        line = told(capsys, *command, code=5 if command[1] == places / "hf" else 3)
        assert all(word in line for word in words), line
