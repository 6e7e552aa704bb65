"""Both forward passes against transformers' own: every layer and the logits, in float32."""
import pytest
from conversions import convert
from forwards import OTHERS, PLAIN, assert_close, run, save_model, told_by_transformers

pytestmark = pytest.mark.usefixtures("transformers")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(name): (folder, what transformers says of it)."""
    made = {}

    def model(name):
        if name not in made:
            folder = save_model(tmp_path_factory.mktemp("model") / "hf", *(PLAIN | OTHERS)[name])
            made[name] = folder, told_by_transformers(folder)
        return made[name]
    return model


def assert_as_transformers(folder, told):
    hidden, logits = run(folder)
    assert len(hidden) == len(told[0])
    for got, want in zip([*hidden, logits], [*told[0], told[1]]):
        assert_close(got, want)


@pytest.mark.parametrize("name", [*PLAIN, *OTHERS])
def test_the_hugging_face_pass_is_that_of_transformers(models, name):
    assert_as_transformers(*models(name))


WAYS = [("--tp", 2, "--pp", 2), ("--tp", 4, "--pp", 3, "--vocab-multiple", 8), ("--tp", 2, "--rope", "interleaved")]


def every_way():
    """Each family on ranks; most of the other ways are left to the heavy tests."""
    for name in PLAIN:
        for flags in WAYS:
            is_quick = name in ("llama", "qwen2") or flags is WAYS[0]
            yield pytest.param(name, flags, id=" ".join(map(str, [name, *flags])),
                               marks=() if is_quick else pytest.mark.heavy)


@pytest.mark.parametrize("name, flags", list(every_way()))
def test_the_pass_of_nanotrons_ranks_is_that_of_transformers(models, tmp_path, name, flags):
    folder, told = models(name)
    convert(folder, tmp_path / "nt", *flags)
    assert_as_transformers(tmp_path / "nt", told)


@pytest.mark.parametrize("name, flags", [
    ("llama", ()), ("qwen2_moe", ()),
    ("llama", ("--checkpoint-version", "1.2", "--tp", 2)), ("llama", ("--checkpoint-version", "1.4", "--pp", 2)),
    ("llama", ("--nanotron-config", "Qwen2Config", "--tp", 2)), ("theta", ("--checkpoint-version", "1.4")),
    ("gelu", ("--allow", "hidden_act", "--tp", 2))])
def test_other_formats_and_classes(models, tmp_path, name, flags):
    folder, told = models(name)
    convert(folder, tmp_path / "nt", *flags)
    assert_as_transformers(tmp_path / "nt", told)
