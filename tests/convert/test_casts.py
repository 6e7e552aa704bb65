"""Casts on the way: as torch rounds, and what does not fit is counted."""
import json

import pytest
from conversions import convert
from sources import make_source

from stream_reshard.cli import main

pytestmark = pytest.mark.usefixtures("torch")
SHAPE = (20, 16)


def source_of(root, values):
    """A source in float32 but for what `values` say of gate_proj."""
    make_source(root / "bits")
    import torch
    from safetensors.torch import load_file, save_file
    random = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(tensor.shape, generator=random)
               for key, tensor in load_file(root / "bits" / "model.safetensors").items()}
    tensors["model.layers.0.mlp.gate_proj.weight"] = values
    (root / "hf").mkdir()
    (root / "hf" / "config.json").write_bytes((root / "bits" / "config.json").read_bytes())
    save_file(tensors, root / "hf" / "model.safetensors", {"format": "pt"})
    return root / "hf", tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_weight_is_rounded_as_torch_rounds_it(tmp_path, torch, dtype):
    """Ties go to even, subnormals and infinities and NaN stay what they are."""
    from safetensors.torch import load_file
    edges = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2**-133, -0.0, float("inf"), float("nan"), 2049.0, 2051.0])
    values = edges.repeat(40).reshape(SHAPE)
    source, tensors = source_of(tmp_path, values)
    convert(source, tmp_path / "nt", "--tp", 2, "--dtype", dtype)
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf")
    for key, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        want = tensors[key].to(getattr(torch, dtype))
        assert torch.equal(tensor.view(torch.int16), want.view(torch.int16)), key
    convert("verify", source, tmp_path / "nt")


def test_what_is_too_large_for_float16_is_counted(tmp_path, torch, capsys):
    values = torch.zeros(SHAPE)
    values[3, :5] = torch.tensor([65504.0, 65519.9, 65520.0, -1e30, float("inf")])
    source, _ = source_of(tmp_path, values)
    assert main([str(source), str(tmp_path / "nt"), "--tp", "2", "--dtype", "float16"]) == 0
    assert "overflow 2 weights were too large for float16" in capsys.readouterr().out
    assert main([str(source), str(tmp_path / "other"), "--dtype", "float16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_overflowed"] == 2 and told["casts"] == {"float32 to float16": 21}
    assert main([str(source), str(tmp_path / "bf16"), "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_overflowed"] == 0
