"""Casts on the way: as torch rounds, without torch; and what does not fit is counted."""
import json
import subprocess
import sys

import numpy as np
import pytest
from conversions import convert
from running import ROOT
from sources import make_source, read, tensor_bytes

from stream_reshard.cli import main

SHAPE = (20, 16)
GATE = "model.layers.0.mlp.gate_proj.weight"


def source_of(root, values):
    """(a source in float32, its tensors): noise but for what `values` say of gate_proj."""
    source, random = make_source(root / "hf"), np.random.default_rng(0)
    path = source / "model.safetensors"
    tensors = {key: random.standard_normal(array.shape).astype(np.float32) for key, array in read(path).items()}
    tensors[GATE] = np.asarray(values, np.float32).reshape(SHAPE)
    path.write_bytes(tensor_bytes(tensors))
    return source, tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_weight_is_rounded_as_torch_rounds_it(tmp_path, torch, dtype):
    """Ties go to even, subnormals and infinities stay what they are, and NaN is quiet."""
    edges = [1 + 2**-8, 1 + 3 * 2**-8, 2**-133, -0.0, float("inf"), float("nan"), 2049.0, 2051.0]
    source, tensors = source_of(tmp_path, edges * 40)
    convert(source, tmp_path / "nt", "--tp", 2, "--dtype", dtype)
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf")
    for key, bits in read(tmp_path / "back" / "model.safetensors").items():
        want = torch.from_numpy(tensors[key]).to(getattr(torch, dtype))
        want[want.isnan()] = float("nan")  # Its bits depend on the processor.
        assert np.array_equal(bits.view(np.int16), want.view(torch.int16).numpy()), key
    convert("verify", source, tmp_path / "nt")


def test_what_is_too_large_is_counted(tmp_path, capsys):
    """Also for bfloat16: the smallest float32 is a usual value of a mask."""
    values = np.zeros(SHAPE)
    values[3, :6] = 65504.0, 65519.9, 65520.0, -1e30, float("inf"), np.finfo(np.float32).min
    source, _ = source_of(tmp_path, values)
    assert main([str(source), str(tmp_path / "nt"), "--tp", "2", "--dtype", "float16"]) == 0
    assert "overflow 3 weights were too large for float16" in capsys.readouterr().out
    for dtype, number in (("float16", 3), ("bfloat16", 1)):
        assert main([str(source), str(tmp_path / dtype), "--dtype", dtype, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["num_overflowed"] == number and told["casts"] == {f"float32 to {dtype}": 21}


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # Its import fails.
from stream_reshard.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("family, flags", [("llama", ("--dtype", "float32")), ("llama", ("--dtype", "float16")),
                                           ("qwen2_moe", ())], ids=["wider", "narrower", "routers"])
def test_a_cast_needs_no_torch(tmp_path, family, flags):
    """Nor does the comparison after it, nor a router, which Nanotron keeps in float32."""
    source = make_source(tmp_path / "hf", family=family)
    for words in ((source, tmp_path / "nt", "--tp", "2", "--verify", *flags),
                  (tmp_path / "nt", tmp_path / "back", "--to", "hf", "--dtype", "bfloat16"),
                  ("verify", tmp_path / "nt", tmp_path / "back")):
        subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, words), "--quiet"], check=True, cwd=ROOT)


def test_what_is_read_in_passing_is_counted_once(tmp_path, capsys):
    """Beside a row of an expert's gate Nanotron keeps one of its up, so both are read with either."""
    source = make_source(tmp_path / "hf", family="qwen2_moe")
    path = source / "model.safetensors"
    tensors = {key: np.zeros(array.shape, np.float32) for key, array in read(path).items()}
    for key, column in (("gate_proj", 0), ("up_proj", 1)):
        tensors[f"model.layers.1.mlp.experts.1.{key}.weight"][:, column] = 1e6
    path.write_bytes(tensor_bytes(tensors))
    num_large = sum(int((array == 1e6).sum()) for array in tensors.values())
    convert(source, tmp_path / "nt", "--tp", 2)
    capsys.readouterr()
    for kind, flags in (("hf", ()), ("nanotron", ("--tp", "1"))):
        words = (tmp_path / "nt", tmp_path / f"to_{kind}", "--to", kind, *flags, "--dtype", "float16", "--json")
        assert main(list(map(str, words))) == 0
        assert json.loads(capsys.readouterr().out)["num_overflowed"] == num_large
