"""The tree under model/ is the one that the real Nanotron saved: same files, header fields and tensor bytes."""
import json
import re

import pytest
from trees import GOLDEN

from stream_reshard.cli import main

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden checkpoints are not beside this checkout")


def read_tree(root):
    """(header, data) of every file below root/model; np.int64(128) in a header reads 128."""
    tree = {}
    for path in (root / "model").rglob("*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        text = re.sub(r"np\.int64\((\d+)\)", r"\1", raw[8:8 + length].decode())
        tree[path.relative_to(root).as_posix()] = json.loads(text), raw[8 + length:]
    return tree


@pytest.mark.parametrize("source, saved, flags", [
    ("llama_gqa_hf", "llama_gqa_tp1_pp1_dp1", []),
    ("llama_gqa_hf", "llama_gqa_tp2_pp2_dp2", ["--tp", "2", "--pp", "2", "--dp", "2"]),
    ("llama_tied_hf", "llama_tied_tp2_pp2_dp1", ["--tp", "2", "--pp", "2"]),
    ("qwen2_hf", "qwen2_tp2_pp2_dp1", ["--tp", "2", "--pp", "2"]),
])
def test_tree_equals_what_nanotron_saved(tmp_path, source, saved, flags):
    assert main([str(GOLDEN / source), str(tmp_path / "out"), "--quiet", *flags]) == 0
    assert read_tree(tmp_path / "out") == read_tree(GOLDEN / saved)
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert names == {"config.yaml", "model_config.json", "checkpoint_metadata.json", "stream_reshard.json",
                     "generation_config.json"}
    want = json.loads((GOLDEN / saved / "checkpoint_metadata.json").read_text())
    got = json.loads((tmp_path / "out" / "checkpoint_metadata.json").read_text())
    for document in (want, got):
        document["metas"]["data_stages"][0].pop("sequence_length")
    assert got == want
    nanotron = json.loads((GOLDEN / saved / "model_config.json").read_text())
    for key, value in json.loads((tmp_path / "out" / "model_config.json").read_text()).items():
        assert nanotron[key] == value or (nanotron[key] is None and key.endswith("token_id")), key


@pytest.mark.parametrize("source, saved", [("llama_tied_hf", "llama_tied_tp2_pp2_dp1"),
                                           ("qwen2_hf", "qwen2_tp2_pp2_dp1")])
def test_verify_accepts_what_nanotron_saved(source, saved, capsys):
    assert main(["verify", str(GOLDEN / source), str(GOLDEN / saved)]) == 0
    assert "all equal" in capsys.readouterr().out
