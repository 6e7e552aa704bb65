"""`inspect` says what a folder holds, and what is wrong with it."""
import json

import numpy as np
import pytest
from conversions import convert, damage_exchanged, damage_extra, damage_missing, damage_stale, damage_version
from sources import make_source

from stream_reshard.cli import main


def inspected(capsys, root, *flags):
    capsys.readouterr()
    assert main(["inspect", str(root), "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_both_formats_of_one_model(tmp_path, capsys):
    source = make_source(tmp_path / "hf", family="smollm3", tied=True)
    convert(source, tmp_path / "nt", "--tp", 2, "--pp", 2, "--vocab-multiple", 8)
    model = {"family": "smollm3", "num_layers": 2, "heads": 4, "kv_heads": 2, "tied": True, "no_rope_layer": 2,
             "num_parameters": 11 * 16 + 2 * (16 * 16 * 3 + 3 * 16 * 20 + 2 * 16) + 16, "faults": []}
    hugging_face, nanotron = (inspected(capsys, root) for root in (source, tmp_path / "nt"))
    assert hugging_face | model == hugging_face and nanotron | model == nanotron
    assert hugging_face["dtypes"] == {"BF16": 20} and hugging_face["vocab_size"] == nanotron["vocab_size"] == 11
    assert nanotron | {"vocab_size_padded": 16, "versions": ["1.5"], "topologies_tp_pp": [[2, 2]], "num_ranks": 2,
                       "stages": {"0": "embedding, layers 0-1"}, "has_manifest": True,
                       "config_class": "Qwen2Config", "rope_interleaved": False} == nanotron


def test_a_vocabulary_that_is_not_known_is_not_guessed(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    (tmp_path / "nt" / "stream_reshard.json").unlink()
    told = inspected(capsys, tmp_path / "nt")
    assert told | {"vocab_size": None, "vocab_size_padded": 12, "has_manifest": False, "faults": []} == told


@pytest.mark.parametrize("damage", [damage_stale, damage_missing, damage_extra, damage_exchanged, damage_version])
def test_what_is_wrong_is_listed(tmp_path, capsys, damage):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    message = damage(tmp_path / "nt")
    assert message in "\n".join(inspected(capsys, tmp_path / "nt")["faults"])


def test_many_faults_are_counted(tmp_path, capsys):
    convert(make_source(tmp_path / "hf", config={"num_hidden_layers": 6}), tmp_path / "nt", "--tp", 2)
    for path in (tmp_path / "nt" / "model").rglob("*tp-rank-1-of-2*"):
        path.unlink()
    faults = inspected(capsys, tmp_path / "nt")["faults"]
    assert len(faults) == 21 and faults[-1] == "and 6 more"


@pytest.mark.parametrize("kind, nan, infinite", [(np.float16, 0x7E01, 0xFC00), (np.float32, 0xFFC00000, 0x7F800000)])
def test_values_that_are_no_numbers_are_found(tmp_path, capsys, kind, nan, infinite):
    values = np.zeros(16, kind)
    bits = values.view(f"u{values.itemsize}")
    bits[3], bits[4], bits[9] = nan, infinite, bits.dtype.type(infinite - 1)  # The last is the largest that is finite.
    extra = {"model.norm.weight": values}
    source = make_source(tmp_path / "hf", extra=extra)
    clean = inspected(capsys, source)
    assert "num_nan" not in clean
    told = inspected(capsys, source, "--values")["nan_and_infinite"]
    assert told["model.safetensors: model.norm.weight"] == [1, 1]


def test_every_pattern_of_bfloat16_is_told_as_numpy_tells_it(tmp_path, capsys):
    source = make_source(tmp_path / "hf")
    patterns = np.fromfile(source / "model.safetensors", np.uint8)
    begin = 8 + int(patterns[:8].view(np.uint64)[0])
    values = (patterns[begin:].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    told = inspected(capsys, source, "--values")
    assert (told["num_nan"], told["num_infinite"]) == (int(np.isnan(values).sum()), int(np.isinf(values).sum()))
    convert(source, tmp_path / "nt", "--tp", 2)
    across = inspected(capsys, tmp_path / "nt", "--values")
    assert (across["num_nan"], across["num_infinite"]) == (told["num_nan"], told["num_infinite"])
