"""`verify` compares a truncated copy with the same layers of its source, without being told again."""
import json
import shutil

import pytest
from attempts import flip
from conversions import convert, tensors
from running import call
from sources import INDEX, edit_config, first_layers, make_source

from stream_reshard import api
from stream_reshard.errors import Refused

FOUR = {"num_hidden_layers": 4}
TP2 = ("--tp", 2, "--pp", 2)
COPIES = {"to ranks": ("hf", TP2), "to shards": ("hf", ("--to", "hf")), "ranks to shards": ("ranks", ("--to", "hf")),
          "ranks to ranks": ("ranks", ("--to", "nanotron", "--tp", 2))}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Shards and ranks of four layers; both stay as they are."""
    root = tmp_path_factory.mktemp("sources")
    convert(make_source(root / "hf", config=FOUR), root / "ranks", "--tp", 1, "--pp", 3)
    return {"hf": root / "hf", "ranks": root / "ranks"}


@pytest.fixture(scope="module")
def num_weights(sources, tmp_path_factory):
    """Number of weights of a model of two layers."""
    small = first_layers(sources["hf"], tmp_path_factory.mktemp("small") / "hf", 2)
    return sum(array.size for array in tensors(small).values())


def weight_file(root, words):
    return next(path for path in sorted(root.rglob("*.safetensors")) if all(word in str(path) for word in words))


@pytest.mark.parametrize("name", COPIES)
def test_either_source_is_compared_as_far_as_the_copy_goes(tmp_path, sources, num_weights, name):
    """And a flipped bit is found."""
    origin, flags = COPIES[name]
    copy = tmp_path / "copy"
    convert(sources[origin], copy, *flags, "--layers", 2, "--verify")
    for source in sources.values():
        report = api.verify(source, copy)
        assert "layers   first 2 of 4: a trial, not the whole model" in report.lines
        assert report.facts["num_elements_compared"] == report.facts["num_elements"] == num_weights
    words = ("decoder/1/", "down_proj") if (copy / "model").is_dir() else ("model.safetensors",)
    flip(weight_file(copy, words))
    for source in sources.values():
        with pytest.raises(Refused, match="the source has"):
            api.verify(source, copy)


def test_ranks_without_a_manifest_are_compared_too(tmp_path, sources):
    """As after a training: of padding only the user knows, of layers the config."""
    source = shutil.copytree(sources["ranks"], tmp_path / "source")
    (source / "stream_reshard.json").unlink()
    convert(source, tmp_path / "copy", "--to", "hf", "--layers", 2, "--vocab-size", 11)
    convert("verify", source, tmp_path / "copy", "--vocab-size", 11)


def test_only_what_the_copy_holds_is_read(tmp_path):
    """Of shards; of files of ranks."""
    source = make_source(tmp_path / "hf", config=FOUR, num_shards=8)
    convert(source, tmp_path / "ranks")
    convert(source, tmp_path / "copy", "--layers", 1)
    index = json.loads((source / INDEX).read_text())["weight_map"]
    for name in set(index.values()) - {name for key, name in index.items() if "layers." not in key or ".0." in key}:
        (source / name).unlink()
    shutil.rmtree(tmp_path / "ranks" / "model" / "model" / "decoder" / "2")
    for folder in (source, tmp_path / "ranks"):
        assert call("verify", folder, tmp_path / "copy", "--quiet") == 0


def test_an_unmarked_copy_is_compared_with_the_whole_model(tmp_path, sources, differs):
    convert(sources["hf"], tmp_path / "copy", "--layers", 2)
    (tmp_path / "copy" / "stream_reshard.json").unlink()
    differs(sources["hf"], tmp_path / "copy", ["num_hidden_layers: in the source: '4'", "layers.2.input_layernorm"])


def test_a_copy_of_another_number_of_layers_is_none_of_the_source(tmp_path, sources, differs):
    """Though its layers are those of the source: it says that there are others behind them."""
    longer = make_source(tmp_path / "longer", config={"num_hidden_layers": 5})
    convert(longer, tmp_path / "copy", "--layers", 2)
    differs(sources["hf"], tmp_path / "copy", ["num_hidden_layers: in the source: '4'"])
    pytest.importorskip("torch")
    assert api.plan_forward(longer, tmp_path / "copy").source.config.num_layers == 2
    assert api.plan_forward(sources["hf"], tmp_path / "copy").source.config.num_layers == 4


def test_a_copy_of_a_truncated_source_is_compared_with_all_of_it(tmp_path, sources):
    """And a smaller one with its part."""
    convert(sources["hf"], tmp_path / "three", "--layers", 3)
    convert(tmp_path / "three", tmp_path / "back", "--to", "hf")
    convert(tmp_path / "three", tmp_path / "two", "--to", "nanotron", "--layers", 2)
    for source, copy in (("three", "back"), ("three", "two"), ("back", "three"), ("back", "two")):
        assert call("verify", tmp_path / source, tmp_path / copy, "--quiet") == 0
    assert call("verify", tmp_path / "two", tmp_path / "three", "--quiet") == 5, "the copy has more than its source"


def test_layers_behind_the_copys_own_are_found(tmp_path, sources, differs):
    """A mark is no leave for files, or tensors, of layers that the config does not have."""
    convert(sources["ranks"], tmp_path / "copy", "--to", "nanotron", "--layers", 2)
    decoder = tmp_path / "copy" / "model" / "model" / "decoder"
    shutil.copytree(decoder / "1", decoder / "3")
    differs(sources["hf"], tmp_path / "copy", ["decoder/3", "is extra"])
    assert call(tmp_path / "copy", tmp_path / "no", "--to", "hf", "--quiet") == 3
    convert(sources["hf"], tmp_path / "shards", "--to", "hf", "--layers", 3)
    edit_config(tmp_path / "shards", {"num_hidden_layers": 2})
    assert call(tmp_path / "shards", tmp_path / "no", "--quiet") == 3


@pytest.mark.parametrize("mark, code", [(4, 0), (2, 0), (1, 0), (None, 0), (0, 3), ("4", 3), (True, 3), (1e400, 3)])
def test_a_mark_in_a_config_is_a_number(tmp_path, capsys, mark, code):
    """One that is not above the number of layers marks nothing."""
    source = make_source(tmp_path / "hf", config={"whole_num_hidden_layers": mark})
    assert call("plan", source) == code
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("layers ")] == [
        "layers   first 2 of 4: a trial, not the whole model"] * (mark == 4) and "not understood" not in out
    assert code == 0 or "whole_num_hidden_layers" in err


def test_a_forward_pass_runs_as_many_layers(tmp_path, transformers, capsys):
    """Of shards that are not all there, and of ranks; transformers makes the same of the layers, and loads the mark."""
    import torch
    from forwards import PLAIN, TOKENS, save_model
    whole = save_model(tmp_path / "hf", *PLAIN["qwen2_moe"])
    convert(whole, tmp_path / "ranks", *TP2)
    convert(whole, tmp_path / "nt", "--tp", 2, "--layers", 2)
    convert(whole, tmp_path / "shards", "--to", "hf", "--layers", 2)
    loaded = [transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
              for folder in (whole, tmp_path / "shards")]
    del loaded[0].model.layers[2:]
    assert (loaded[1].config.num_hidden_layers, loaded[1].config.whole_num_hidden_layers) == (2, 4)
    with torch.no_grad():
        assert torch.equal(*(model(torch.tensor([TOKENS])).logits for model in loaded))
    index = json.loads((whole / INDEX).read_text())["weight_map"]
    needed = {name for key, name in index.items() if ".layers.2." not in key and ".layers.3." not in key}
    assert (others := set(index.values()) - needed)
    for name in others:
        (whole / name).unlink()
    for source in (whole, tmp_path / "ranks"):
        for copy in ("nt", "shards"):
            assert call("verify", source, tmp_path / copy, "--forward") == 0
            assert "layer 1 " in (told := capsys.readouterr().out) and "layer 2 " not in told
    path = weight_file(tmp_path / "nt", ("decoder/1/", "o_proj"))
    flip(path)  # A bit of an exponent.
    assert call("verify", whole, tmp_path / "nt", "--forward") == 5
