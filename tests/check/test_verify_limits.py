"""Verify keeps the limit on memory, whatever a checkpoint and its documents hold."""
import json
import math
import re
import shutil

import pytest
from damage import bare, edit_json, forge
from running import call, measured
from sources import CONFIG, FAMILY, INDEX, make_source, shapes_of
from trees import write_sparse_source

from stream_reshard.machine.memory import parse_nbytes
from stream_reshard.storage.header import pack_header


def test_a_big_checkpoint_is_verified_in_64_mib(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=60_000)
    assert call(tmp_path / "hf", tmp_path / "nt", "--quiet", "--tp", "4", "--rope", "interleaved") == 0
    for pair in (("hf", "nt"), ("nt", "hf"), ("nt", "nt")):
        paths = [tmp_path / name for name in pair]
        code, peak, err = measured("verify", *paths, "--max-memory", "64MiB", "--workers", "1")
        assert (code, err) == (0, "") and peak <= 64 * 2**20
    code, _, err = measured("verify", *paths, "--max-memory", "24MiB")
    assert code == 6 and err.count("\n") == 1 and "--max-memory 24.0 MiB cannot be kept" in err


def test_a_big_cast_is_verified_in_64_mib(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=60_000)
    assert call(tmp_path / "hf", tmp_path / "nt", "--quiet", "--tp", "4", "--dtype", "float32") == 0
    for pair, flags in ((("hf", "nt"), ()), (("nt", "hf"), ("--dtype", "bfloat16"))):
        code, peak, err = measured("verify", *(tmp_path / name for name in pair), "--max-memory", "64MiB", "--workers",
                                   "1", *flags)
        assert (code, err) == (0, "") and peak <= 64 * 2**20


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
    change(root := copied("tp1", is_bare=False))
    code, peak, err = measured("verify", made("hf"), root, "--max-memory", "64MiB", "--workers", "1")
    assert code in (0, 5, 6) and "Traceback" not in err and peak <= 64 * 2**20, f"{peak / 2**20:.0f} MiB"


def test_a_conversion_with_a_check_keeps_64_mib(tmp_path):
    write_sparse_source(tmp_path / "hf", vocab=60_000)
    code, peak, err = measured(tmp_path / "hf", tmp_path / "nt", "--verify", "--max-memory", "64MiB", "--workers", "1")
    assert (code, err) == (0, "") and peak <= 64 * 2**20


def write_deep_source(root, num_layers, hidden=16, ffn=16, heads=8):
    """A model of many small parameters, all zeros, in shards that take no disk."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(CONFIG | FAMILY["llama"] | {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": num_layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "tie_word_embeddings": False}))
    shapes = shapes_of("llama", json.loads((root / "config.json").read_text()), False)
    keys, weight_map = list(shapes), {}
    for first in range(0, len(keys), 500):
        part = keys[first:first + 500]
        header = pack_header([(key, "BF16", shapes[key]) for key in part], {})
        with open(root / f"model-{first:05}.safetensors", "wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(2 * math.prod(shapes[key]) for key in part))
        weight_map |= dict.fromkeys(part, f"model-{first:05}.safetensors")
    (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def peak_of(limit, *arguments):
    """Peak in MiB of a command that must succeed within the limit."""
    code, peak, err = measured(*arguments, "--max-memory", limit, "--workers", "1")
    assert (code, err) == (0, "") and peak <= parse_nbytes(limit), (code, peak / 2**20, err)
    return peak / 2**20


@pytest.mark.parametrize("num_layers", [16, pytest.param(80, marks=pytest.mark.heavy, id="as many as a 70B has")])
def test_many_files_are_verified_in_64_mib(tmp_path, num_layers):
    write_deep_source(source := tmp_path / "hf", num_layers)
    peak_of("64MiB", source, root := tmp_path / "nt", "--tp", "8", "--quiet")
    assert sum(1 for _ in (root / "model").rglob("*.safetensors")) == 17 + 34 * num_layers
    peak_of("64MiB", "verify", source, root)
    peak_of("64MiB", "verify", root, root)


@pytest.mark.heavy
def test_30_000_files_are_verified_and_overwritten(quick_path):
    write_deep_source(source := quick_path / "hf", 883)
    peak_of("192MiB", source, root := quick_path / "nt", "--tp", "8", "--quiet", "--verify")
    assert sum(1 for _ in (root / "model").rglob("*.safetensors")) > 30_000
    peak_of("80MiB", "verify", source, root)
    code, peak, err = measured("verify", source, root, "--max-memory", "48MiB", "--workers", "1")
    assert code == 6 and peak <= 48 * 2**20 and "too many to be compared within --max-memory" in err
    make_source(other := quick_path / "other")
    peak_of("64MiB", other, root, "--overwrite", "--quiet")


@pytest.mark.heavy
def test_13_500_parameters_are_verified_in_64_mib(quick_path):
    write_deep_source(source := quick_path / "hf", 1500)
    peak_of("256MiB", source, root := quick_path / "nt", "--quiet")
    peak_of("64MiB", "verify", source, root)
    peak_of("64MiB", "verify", root, source)


def test_rows_wider_than_a_buffer_are_compared_in_pieces(tmp_path):
    """A row of down_proj has 6 MB, and no buffer more than 2 MiB."""
    write_deep_source(source := tmp_path / "hf", 1, ffn=3_000_000)
    peak_of("56MiB", source, root := tmp_path / "nt", "--tp", "2", "--quiet", "--verify")
    peak_of("56MiB", "verify", source, root)
    peak_of("56MiB", "verify", root, source)


@pytest.mark.parametrize("place, is_bare, number", [
    *[pytest.param(place, is_bare, 500, id=f"{place or 'beside'}, {'bare' if is_bare else 'manifest'}")
      for place in ("", "model") for is_bare in (True, False)],
    pytest.param("", True, 150_000, id="150,000 beside", marks=pytest.mark.heavy),
    pytest.param("model", False, 150_000, id="150,000 in model", marks=pytest.mark.heavy)])
def test_any_number_of_extra_files_is_told_in_few_lines(made, quick_path, place, is_bare, number):
    shutil.copytree(made("tp1"), root := quick_path / "copy")
    if is_bare:
        bare(root)
    for i in range(number):
        (root / place / f"extra_{i:09}.safetensors").touch()
    code, peak, err = measured("verify", made("hf"), root, "--max-memory", "64MiB", "--workers", "1")
    assert code == 5 and peak <= 64 * 2**20
    assert len(err.splitlines()) < 25 and f"and {number - 10} more files" in err


@pytest.mark.parametrize("name", ["model_config.json", "checkpoint_metadata.json", "config.yaml"])
def test_a_limit_of_memory_is_no_difference(made, copied, name):
    """Neither in the copy nor in the source; with more memory the same is read."""
    root = copied("tp1")
    path = root / name
    path.write_text(path.read_text() + " " * 10 ** 6 if name != "config.yaml" else path.read_text() + "\n" * 10 ** 6)
    for pair in ((made("hf"), root), (root, made("hf"))):
        code, _, err = measured("verify", *pair, "--max-memory", "56MiB", "--workers", "1")
        assert code == (0 if pair[0] == root and name == "config.yaml" else 6) and (
            not code or (name in err and "--max-memory" in err))
    assert measured("verify", root, made("hf"), "--max-memory", "2GiB", "--vocab-size", "11")[0] == 0


@pytest.mark.parametrize("name", ["model_config.json", "config.yaml"])
def test_what_no_such_file_has_is_no_limit_of_memory(made, copied, differs, name):
    (root := copied("tp1")).joinpath(name).write_text(" " * (10 * 2**20 + 1))
    assert not any("--max-memory" in line for line in differs(made("hf"), root, [name, "the limit for such a file"]))


@pytest.mark.heavy
@pytest.mark.parametrize("flags", [(), ("--dtype", "float32")], ids=["as it is", "cast"])
def test_a_check_that_will_not_fit_is_refused_before_anything_is_written(tmp_path, flags):
    """With the smallest limit that the plan accepts, the check of all weights goes through."""
    write_sparse_source(source := tmp_path / "hf", vocab=60_000)
    flags = (source, tmp_path / "nt", *flags, "--verify", "--quiet")
    code, _, err = measured(*flags, "--max-memory", "30MiB", "--workers", "1")
    reached = float(re.search(r"would reach (\d+\.\d) MiB", err)[1])
    code, _, err = measured(*flags, "--max-memory", f"{int(reached) - 2}MiB", "--workers", "1")
    assert code == 6 and "cannot be kept" in err and not list(tmp_path.glob("nt*"))
    peak_of(f"{int(reached) + 2}MiB", *flags)
    assert list(tmp_path.glob("nt*")) == [tmp_path / "nt"]
