"""Names and templates: every name leads back to its parameter, and nothing else does."""
import pytest
import yaml

from stream_reshard.formats.nanotron.documents import yaml_string
from stream_reshard.model.architectures import FAMILIES
from stream_reshard.model.names import Templates, indices_of
from stream_reshard.model.parameters import Experts, Model, ModelConfig

EXTENTS = {"layer": 3, "expert": 5}
TEMPLATES = ["embedding", "layers.{layer}.norm", "layers.{layer}.experts.{expert}.up", "layers.{layer}.up"]

CONFIG = ModelConfig("llama", 16, 20, 11, 4, 2, 13, False, 64, 1e-5, 1e4, 0.02, "silu", 1, 2, None)


def test_there_and_back():
    templates, seen = Templates(TEMPLATES, EXTENTS), []
    for i, (template, count) in enumerate(zip(TEMPLATES, (1, 3, 15, 3))):
        for instance in range(count):
            seen.append(template.format(**indices_of(template, EXTENTS, instance)))
            assert templates.find(seen[-1]) == (i, instance)
    assert len(set(seen)) == len(seen) and seen[5:8] == [f"layers.0.experts.{j}.up" for j in (1, 2, 3)]


@pytest.mark.parametrize("name", [
    "", ".", "layers", "layers.3.norm", "layers.0.experts.5.up", "layers.00.norm", "layers.01.norm", "layers.-1.norm",
    "layers.+1.norm", "layers. 1.norm", "layers.1_0.norm", "layers.1.0.norm", "layers.\u0661.norm", "layers.\u00b2.norm",
    "layers.1.norm ", "layers.1.norm\n", "layers.1.norm.", ".layers.1.norm", "layers..norm", "layers.{layer}.norm",
    "layers.norm", "embedding.0", "0.embedding", "layers.1.Norm", "layers.1.norm.0", "layers." + "9" * 5000 + ".norm",
    "layers.1e0.norm", "layers.1.experts.up", "layers.1.experts.1.1.up"], ids=lambda name: ascii(name)[:30])
def test_what_is_no_name(name):
    assert Templates(TEMPLATES, EXTENTS).find(name) is None


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
@pytest.mark.parametrize("tied", [False, True])
def test_numbers_of_a_model(family, tied):
    """Every parameter has a number of its own, by either name; the order is that of the forward pass."""
    experts = Experts(3, 2, 8, 12, 0.01) if "moe" in family.name else None
    config = CONFIG.__class__(**CONFIG.__dict__ | {"family": family.name, "tie_word_embeddings": tied,
                                                   "experts": experts})
    model = Model(config, family.rows)
    parameters = list(model.parameters)
    numbers = [model.number_of(parameter.name) for parameter in parameters]
    assert sorted(numbers) == list(range(len(parameters))) == list(range(model.firsts[-1]))
    assert numbers == [model.number_of_tensor(parameter.hugging_face) for parameter in parameters]
    assert [model.parameter(number) for number in numbers] == parameters
    layers = [int(parameter.name.split(".")[1]) for parameter in parameters if parameter.name.startswith("layers.")]
    assert layers == sorted(layers) and set(layers) == set(range(11))
    stored = list(model.stored())
    assert len(stored) == model.num_stored == len(parameters) - tied
    assert model.num_elements == sum(parameter.num_elements for parameter in stored)
    with pytest.raises(KeyError):
        model.number_of("layers.11.attention.q")


SPECIAL = {*range(0x300), 0x61C, 0xD7FF, *range(0x2000, 0x2070), *range(0xE000, 0xE004), *range(0xFDD0, 0xFDF0), 0xFEFF,
           *range(0xFFF0, 0x10000), *range(0x10000, 0x10FFFF, 7919), 0x1F600, 0x1FFFE, 0x1FFFF, 0x10FFFE, 0x10FFFF,
           *range(0x300, 0xD800, 97), *range(0xE000, 0xFFFF, 97)}
"""Controls, spaces of all kinds, ends of lines, marks of direction, what is no character, and some of everything else."""


def test_strings_in_a_config_yaml_are_read_as_what_was_meant():
    """By PyYAML, each alone, at either end, doubled, and all in a row; the text is ASCII in one line."""
    characters = [chr(code) for code in sorted(SPECIAL)] + [chr(code) for code in range(0xDC80, 0xDD00)]
    texts = [f"{c}{middle}{c}" for c in characters for middle in ("", "a", c)] + ["".join(characters), "", " ", "null", "1", "~"]
    texts = [text for text in texts if _is_path(text)]
    written = [yaml_string(text) for text in texts]
    assert all(line.isascii() and line.isprintable() for line in written)
    assert yaml.safe_load("".join(f"- {line}   # a comment\n" for line in written)) == texts


def _is_path(text):
    """Whether the text is what Python makes of the bytes that it stands for."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == text


def test_names_that_an_ascii_locale_took_apart_are_put_together():
    for name in ("é", "\U0001f600 x", "a\u2028b"):
        assert yaml_string(name.encode().decode("ascii", "surrogateescape")) == yaml_string(name)
    assert yaml_string("\udce9") == '"\\udce9"' and yaml_string("\ud83d") == '"\\ud83d"'
