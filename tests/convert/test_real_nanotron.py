"""What the real Nanotron says about converted checkpoints: release 0.4 (format 1.2), a checkout of main (format 1.5).

All models of one Nanotron are converted with the command line and then judged in one start of four processes, because a
start takes longer than everything in it. For main set NANOTRON_REPO to a checkout of github.com/huggingface/nanotron,
and install `datasets` and `einops`.
"""
from dataclasses import dataclass

import pytest
from conversions import convert

from real import launch, trees

LOGITS_TOLERANCE = 1e-4
TOPOLOGY = ("--tp", 2, "--pp", 2)


@dataclass(frozen=True)
class Case:
    """One conversion."""

    save: str
    """Which function of real.models makes the model."""
    flags: tuple = ()
    """For the command line, beside the topology."""
    through: tuple = ()
    """Flags of a Nanotron checkpoint that is made first, and from which this one is made."""
    vocab_size: int = 320
    class_name: str = "LlamaConfig"
    checkpoint_version: str = "1.5"
    layers: int | None = None
    """How many layers are taken of the model; None for all."""
    as_saved: bool = True
    """Whether Nanotron itself would save the same files."""


OLD = ("--checkpoint-version", "1.2")
RELEASE = {
    "llama": Case("save_llama", OLD, checkpoint_version="1.2"),
    "tied": Case("save_tied_llama", OLD, vocab_size=323, checkpoint_version="1.2"),
    "pad token": Case("save_padded_llama", OLD, checkpoint_version="1.2"),
    "across": Case("save_tied_llama", OLD, ("--tp", 4, "--vocab-multiple", 3), vocab_size=323,
                   checkpoint_version="1.2"),
    "first layers": Case("save_llama", OLD, checkpoint_version="1.2", layers=3),
}
MAIN = {
    "llama": Case("save_llama"),
    "tied": Case("save_tied_llama", vocab_size=323),
    "pad token": Case("save_padded_llama"),
    "llama as qwen2": Case("save_llama", ("--nanotron-config", "Qwen2Config"), class_name="Qwen2Config"),
    "qwen2": Case("save_qwen2", class_name="Qwen2Config"),
    "interleaved": Case("save_llama", ("--rope", "interleaved"), as_saved=False),
    "across": Case("save_tied_llama", ("--rope", "neox"), ("--pp", 3, *OLD), vocab_size=323),
    "format 1.4": Case("save_llama", ("--checkpoint-version", "1.4"), checkpoint_version="1.4", as_saved=False),
}


def judge(cases, folder, repo=None):
    """Converts every case at tp=2 pp=2 and asks Nanotron everything it can tell; its answers per case."""
    from real import models
    steps = []
    for name, case in cases.items():
        source = hf = getattr(models, case.save)(folder / name / "hf")
        to, layers, converted = (), (), folder / name / "converted"
        if case.layers:
            hf, layers = models.save_first_layers(hf, folder / name / "layers", case.layers), ("--layers", case.layers)
        logits = folder / name / "logits.safetensors"
        models.save_logits(hf, logits)
        if case.through:
            convert(source, first := folder / name / "first", *case.through)
            source, to = first, ("--to", "nanotron")
        convert(source, converted, *TOPOLOGY, *to, *layers, *case.flags)
        steps += [("save", hf, folder / name / "saved", *TOPOLOGY, "--model-config", case.class_name),
                  ("load", hf, converted, *TOPOLOGY),
                  ("load", hf, converted, "--pp", 4),
                  ("load", hf, converted, "--tp", 2, "--logits", logits),  # dp 2
                  ("load", hf, converted, "--tp", 4),
                  ("config", converted)]
    results = launch.nanotron(*steps, ranks=4, repo=repo)
    each = len(steps) // len(cases)
    return {name: (folder / name, results[each * i:each * (i + 1)]) for i, name in enumerate(cases)}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    if launch.missing_release():
        pytest.skip(launch.missing_release())
    return judge(RELEASE, tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def main(tmp_path_factory):
    if launch.missing_repo():
        pytest.skip(launch.missing_repo())
    return judge(MAIN, tmp_path_factory.mktemp("main"), repo=launch.NANOTRON_REPO)


def assert_judged_right(case, folder, results):
    """Nanotron loaded every parameter at every topology, agrees with transformers, and takes config.yaml."""
    save, *loads, config = results
    for result in (save, *loads, config):
        assert result["ok"], str(result)
    for load in loads:
        assert (load["wrong"], load["class"]) == ([], case.class_name)
        assert load["checkpoint_version"] == case.checkpoint_version
    with_logits, = (load for load in loads if "max_difference" in load)
    assert with_logits["max_difference"] < LOGITS_TOLERANCE
    assert with_logits["same_argmax"] == 1.0
    assert with_logits["unmoved_rows"] == [], "every row of the embedding learns"
    assert config["class"] == case.class_name
    assert config["vocab_size"] == case.vocab_size, "config.yaml holds the vocabulary without padding"
    assert (config["tp"], config["pp"], config["dp"]) == (2, 2, 1)
    assert (config["init_method"], config["path"]) == ("ExistingCheckpointInit", str(folder / "converted"))
    if case.as_saved:
        assert trees.differences(folder / "converted", folder / "saved", case.vocab_size) == []


@pytest.mark.parametrize("name", RELEASE)
def test_release_0_4_takes_the_folder(release, name):
    assert_judged_right(RELEASE[name], *release[name])


@pytest.mark.heavy
@pytest.mark.parametrize("name", MAIN)
def test_main_takes_the_folder(main, name):
    assert_judged_right(MAIN[name], *main[name])


def assert_forward_is_nanotrons_own(case, folder):
    """The pass that `verify --forward` makes of the folder is what Nanotron itself computed from it."""
    from forwards import assert_close, run
    from safetensors.torch import load_file
    told = load_file(folder / "logits.safetensors.nanotron")
    for tokens, want in zip(told["input_ids"].tolist(), told["logits"]):
        assert_close(run(folder / "converted", tokens, case.vocab_size)[1], want)


@pytest.mark.parametrize("name", RELEASE)
def test_a_forward_pass_is_that_of_release_0_4(release, name):
    assert_forward_is_nanotrons_own(RELEASE[name], release[name][0])


@pytest.mark.heavy
@pytest.mark.parametrize("name", MAIN)
def test_a_forward_pass_is_that_of_main(main, name):
    assert_forward_is_nanotrons_own(MAIN[name], main[name][0])


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["llama", "pad token", "tied", "qwen2"])
def test_main_trains_on_the_folder(main, name):
    """Three steps of its own trainer, from config.yaml, at tp 2 dp 2."""
    folder, _ = main[name]
    result, = launch.nanotron((folder / "hf", folder / "converted"), ranks=4, repo=launch.NANOTRON_REPO,
                              script="train.py")
    assert result["ok"], str(result)
    assert len(result["losses"]) == 3
