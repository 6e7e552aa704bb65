"""`--template` fills the files of a checkpoint that is there; `diff` compares layouts."""
import json

import pytest
from conversions import convert, tree
from sources import make_source
from trees import GOLDEN

from stream_reshard.cli import main


def random_model(root, *flags, **how):
    """A checkpoint of a model of the same shape and other weights, and nothing but what Nanotron saves."""
    source = make_source(root / "other", **how)
    raw = (source / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    (source / "model.safetensors").write_bytes(raw[:begin] + raw[begin:][::-1])
    convert(source, root / "template", *flags)
    (root / "template" / "stream_reshard.json").unlink()
    return root / "template"


@pytest.mark.parametrize("flags", [["--tp", 2, "--pp", 2], ["--tp", 2, "--vocab-multiple", 8], [
    "--tp", 2, "--rope", "interleaved"], ["--checkpoint-version", "1.2"], ["--nanotron-config", "Qwen2Config"]],
    ids=lambda flags: " ".join(map(str, flags)))
def test_a_template_is_filled(tmp_path, capsys, flags):
    template, source = random_model(tmp_path, *flags), make_source(tmp_path / "hf")
    convert(source, tmp_path / "filled", "--template", template)
    convert(source, tmp_path / "direct", *flags)
    assert tree(tmp_path / "filled") == tree(tmp_path / "direct") != tree(template)
    for name in ("model_config.json", "checkpoint_metadata.json"):
        assert (tmp_path / "filled" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    convert("verify", source, tmp_path / "filled")
    assert main(["diff", str(template), str(tmp_path / "filled")]) == 0
    assert "the same layout" in capsys.readouterr().out


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden checkpoints are not beside this checkout")
@pytest.mark.parametrize("source, saved", [("llama_gqa_hf", "llama_gqa_tp2_pp2_dp2"),
                                           ("llama_tied_hf", "llama_tied_tp2_pp2_dp1"),
                                           ("qwen2_hf", "qwen2_tp2_pp2_dp1")])
def test_what_nanotron_saved_is_a_template(tmp_path, source, saved):
    convert(GOLDEN / source, tmp_path / "filled", "--template", GOLDEN / saved)
    found, wanted = tree(tmp_path / "filled"), tree(GOLDEN / saved)
    assert {path: data for path, (_, data) in found.items()} == {path: data for path, (_, data) in wanted.items()}
    assert main(["diff", str(GOLDEN / saved), str(tmp_path / "filled"), "--quiet"]) == 0


def test_what_a_template_does_otherwise_is_told(tmp_path, capsys):
    """Another stage, more rows, another dtype: taken over, and explained."""
    template, source = random_model(tmp_path, "--pp", 2, "--vocab-multiple", 8), make_source(tmp_path / "hf")
    for path in sorted((template / "model").rglob("*decoder/0/**/*pp-rank-0-of-2*")):
        path.rename(path.with_name(path.name.replace("pp-rank-0", "pp-rank-1")))
    assert main([str(source), str(tmp_path / "filled"), "--template", str(template)]) == 0
    told = capsys.readouterr().out
    assert "own choice and template differ in vocab_rows: '11' and '16'" in told
    assert "own choice and template differ in layers.0.attention.o: in 'model/model/decoder/0/" in told
    assert tree(tmp_path / "filled").keys() == tree(template).keys()
    convert("verify", source, tmp_path / "filled")
    (tmp_path / "filled" / "stream_reshard.json").rename(tmp_path / "manifest")
    assert main(["verify", str(source), str(tmp_path / "filled")]) == 5
    assert "Nanotron's balancing looks for it" in capsys.readouterr().err
    convert("verify", source, tmp_path / "filled", "--allow", "stages")
    (tmp_path / "manifest").rename(tmp_path / "filled" / "stream_reshard.json")
    convert(tmp_path / "filled", tmp_path / "back", "--to", "hf")
    convert("verify", source, tmp_path / "back")


def test_a_template_without_moved_blocks_accepts_none(tmp_path, capsys):
    """Blocks that have no files of their own stages, such as the final norm, are moved nowhere."""
    template, source = random_model(tmp_path, "--pp", 2), make_source(tmp_path / "hf")
    convert(source, tmp_path / "filled", "--template", template)
    assert json.loads((tmp_path / "filled" / "stream_reshard.json").read_text())["facts"]["allowed"] == []
    for path in sorted((tmp_path / "filled" / "model").rglob("*decoder/0/**/*pp-rank-0-of-2*")):
        path.rename(path.with_name(path.name.replace("pp-rank-0", "pp-rank-1")))
    assert main(["verify", str(source), str(tmp_path / "filled")]) == 5
    assert "Nanotron's balancing looks for it" in capsys.readouterr().err


def test_a_template_of_another_dtype_casts(tmp_path, capsys):
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "template", "--tp", 2, "--dtype", "float32")
    assert main([str(source), str(tmp_path / "filled"), "--template", str(tmp_path / "template"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["casts"] == {"bfloat16 to float32": 21}
    assert "own choice and template differ in final_norm: BF16 and F32" in told["notes"]
    assert tree(tmp_path / "filled") == tree(tmp_path / "template")
    convert("verify", source, tmp_path / "filled")


@pytest.mark.parametrize("how, flags, code, message", [
    ({"config": {"hidden_size": 32}}, [], 3, "hidden_size is '32', in the source '16'"),
    ({"config": {"rope_theta": 500.0}}, [], 3, "rope_theta is '500.0', in the source '10000.0'"),
    ({"config": {"vocab_size": 9}}, [], 3, "its embedding has 9 rows, the source needs 11"),
    ({"family": "qwen2"}, [], 3, "holds a qwen2 model, the source is llama"),
    ({}, ["--tp", "2"], 2, "error: --tp with --template"),
    ({}, ["--rope", "neox"], 2, "--rope with --template")])
def test_a_template_that_does_not_fit_is_refused(tmp_path, capsys, how, flags, code, message):
    template, source = random_model(tmp_path, **how), make_source(tmp_path / "hf")
    assert main([str(source), str(tmp_path / "filled"), "--template", str(template), *flags]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "filled").exists()


@pytest.mark.parametrize("one, other, words", [
    (["--tp", 2], ["--tp", 1], ["tp: '2' and '1'", "vocab_rows: '12' and '11'"]),
    (["--tp", 2], ["--tp", 2, "--rope", "interleaved"],
     ["rope_interleaved: 'False' and 'True'", "layers.1.attention.k: ", "holds other elements, or in"]),
    (["--tp", 2], ["--tp", 2, "--checkpoint-version", "1.4"], ["version: '1.5' and '1.4'"])])
def test_diff_names_what_differs(tmp_path, capsys, one, other, words):
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "a", *one)
    convert(source, tmp_path / "b", *other)
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 5
    told = capsys.readouterr()
    assert all(word in told.out for word in words) and "attention.v" not in told.out
    assert main(["diff", str(source), str(tmp_path / "a"), "--json"]) == 5
    assert "format: 'Hugging Face' and 'Nanotron'" in json.loads(capsys.readouterr().out)["differences"]
