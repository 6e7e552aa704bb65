"""Names and templates: every name leads back to its parameter, and nothing else does."""
import pytest

from stream_reshard.architectures import FAMILIES
from stream_reshard.model import Experts, Model, ModelConfig
from stream_reshard.names import Templates, indices_of

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
