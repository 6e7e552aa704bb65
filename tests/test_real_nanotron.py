"""What the real Nanotron says about converted checkpoints: release 0.4 (format 1.2), a checkout of main (format 1.5).

Each test converts with the command line, then starts Nanotron once and asks everything in that start. For main set
NANOTRON_REPO to a checkout of github.com/huggingface/nanotron, and install `datasets` and `einops`.
"""
import pytest

from real import launch, trees

release = pytest.mark.skipif(bool(launch.missing_release()), reason=launch.missing_release() or "-")
main = pytest.mark.skipif(bool(launch.missing_repo()), reason=launch.missing_repo() or "-")
LOGITS_TOLERANCE = 1e-4
SPLIT = ("--tp", 2, "--pp", 2)
OTHER = ("--tp", 4)  # with four processes: pp 1, dp 1


def assert_right(result, vocab_size):
    """A step of check.py went well; the file of logits, where there was one, holds the same numbers."""
    assert result["ok"], str(result)
    assert result.get("wrong", []) == []
    if "max_difference" in result:
        assert result["max_difference"] < LOGITS_TOLERANCE, str(result)
        assert result["same_argmax"] == 1.0, str(result)
    if result["step"] == "config":
        assert result["init_method"] == "ExistingCheckpointInit"
        assert result["vocab_size"] == vocab_size, "config.yaml holds the vocabulary without padding"


def judge(tmp_path, save, flags, vocab_size, repo=None, class_name="LlamaConfig"):
    """Converts a model at tp=2 pp=2 and asks Nanotron, in one start of four processes, everything it can tell."""
    from real import models
    hf = save(tmp_path / "hf")
    converted = launch.convert(hf, tmp_path / "converted", *SPLIT, *flags)
    logits = models.save_logits(hf, tmp_path / "logits.safetensors")
    *_, config = results = launch.nanotron(
        ["save", hf, tmp_path / "saved", *SPLIT, "--model-config", class_name],
        ["load", hf, converted, *SPLIT],
        ["load", hf, converted, "--pp", 4],
        ["load", hf, converted, *OTHER, "--logits", logits],
        ["config", converted], ranks=4, repo=repo)
    for result in results:
        assert_right(result, vocab_size)
    assert config["class"] == class_name
    assert (config["tp"], config["pp"], config["dp"], config["path"]) == (2, 2, 1, str(converted))
    assert trees.differences(converted, tmp_path / "saved", vocab_size) == []
    return results


@release
def test_release_loads_llama(tmp_path):
    from real import models
    results = judge(tmp_path, models.save_llama, ["--checkpoint-version", "1.2"], vocab_size=320)
    assert {result["nanotron_format"] for result in results} == {"1.2"}


@release
def test_release_loads_tied_llama_with_padded_vocabulary(tmp_path):
    from real import models
    judge(tmp_path, models.save_tied_llama, ["--checkpoint-version", "1.2"], vocab_size=323)


@main
@pytest.mark.parametrize("save, class_name, vocab_size", [
    ("save_llama", "LlamaConfig", 320),
    ("save_tied_llama", "LlamaConfig", 323),
    ("save_llama", "Qwen2Config", 320),  # Nanotron's maintained class takes plain Llama weights too
    ("save_qwen2", "Qwen2Config", 320),
])
def test_main_loads(tmp_path, save, class_name, vocab_size):
    from real import models
    results = judge(tmp_path, getattr(models, save), ["--nanotron-config", class_name], vocab_size,
                    repo=launch.NANOTRON_REPO, class_name=class_name)
    assert {result["nanotron_format"] for result in results} == {"1.5"}
