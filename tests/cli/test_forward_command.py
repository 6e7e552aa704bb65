"""`verify --forward` as its user meets it: texts, tolerance, casts, pictures, what is refused, stopping."""
import json
import shutil
import signal

import pytest
from conversions import convert
from forwards import OTHERS, PLAIN, save_model
from running import call

from stream_reshard import api
from stream_reshard.errors import Interrupted, Refused

pytestmark = pytest.mark.usefixtures("transformers")

WORDS = ["never", "half", "a", "checkpoint", "is", "left", "of", "what", "was", "whole"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(source, conversion at TP=2 PP=2 with a padded vocabulary); both stay as they are, and so does their tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    root = tmp_path_factory.mktemp("pair")
    source = save_model(root / "hf", *PLAIN["llama"])
    tokenizer = Tokenizer(models.WordLevel({word: 7 * place for place, word in enumerate(WORDS)}, unk_token="never"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    convert(source, root / "nt", "--tp", 2, "--pp", 2, "--vocab-multiple", 8, "--max-memory", "8GiB")
    return source, root / "nt"


@pytest.fixture
def forward(capsys):
    """forward(source, copy, *flags): (exit code, the document's part, last line of stderr)."""
    def run(source, copy, *flags):
        code = call("verify", source, copy, "--forward", "--json", *flags)
        out, err = capsys.readouterr()
        return code, json.loads(out)["forward"] if out else None, err.strip().rpartition("\n")[2]
    return run


def loss_of_transformers(folder, tokens):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss


def test_a_text_is_read_by_the_models_own_tokenizer(pair, tmp_path, forward):
    (tmp_path / "text").write_text(" ".join(WORDS[1:] + WORDS[4:]))
    tokens = [7 * place for place in [*range(1, 10), *range(4, 10)]]
    code, said, _ = forward(*pair, "--text", tmp_path / "text")
    assert (code, said["num_tokens"]) == (0, 15)
    for which in ("source", "copy"):
        assert said["perplexity"][which] == pytest.approx(float(loss_of_transformers(pair[0], tokens).exp()), rel=1e-4)
    code, said, _ = forward(*pair, "--text", tmp_path / "text", "--tokens", 5)
    assert said["num_tokens"] == 5
    assert said["perplexity"]["copy"] == pytest.approx(float(loss_of_transformers(pair[0], tokens[:5]).exp()), rel=1e-4)


def test_padding_counts_in_nanotrons_loss_only(pair, forward):
    """251 rows are padded to 256, of zeros: their logits are 0 and take part in what Nanotron trains on."""
    _, said, _ = forward(*pair)
    assert said["perplexity"]["copy_with_padding"] > said["perplexity"]["copy"] * 1.001
    assert said["perplexity"]["copy"] == pytest.approx(said["perplexity"]["source"], rel=1e-5)


def test_the_seed_chooses_the_tokens(pair, forward):
    perplexities = [forward(*pair, "--seed", seed)[1]["perplexity"]["source"] for seed in (1, 2, 1)]
    assert perplexities[0] == perplexities[2] != perplexities[1]


@pytest.mark.parametrize("flags", [("--to", "hf"), ("--to", "nanotron", "--tp", 4)], ids=["back", "across"])
def test_any_two_formats_are_compared(pair, tmp_path, forward, flags):
    convert(pair[1], tmp_path / "other", *flags)
    for one, other in ((pair[1], tmp_path / "other"), (tmp_path / "other", pair[1]), (pair[0], tmp_path / "other")):
        code, said, err = forward(one, other)
        assert code == 0 and said["agrees"], err


def test_a_cast_is_taken_over_or_shows_itself(pair, tmp_path, forward, torch):
    """By default the source is rounded as the conversion rounded it; --dtype float32 shows what rounding costs."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "nt", "--dtype", "bfloat16", "--tp", 2)
    code, said, _ = forward(tmp_path / "hf", tmp_path / "nt")
    assert (code, said["dtype"]) == (0, "bfloat16") and said["logits"]["relative"] < 2e-5
    code, said, _ = forward(tmp_path / "hf", tmp_path / "nt", "--dtype", "float32")
    assert code == 5 and 1e-4 < said["logits"]["relative"] < 0.1
    assert said["logits"]["kl_mean"] > 0 and said["first_difference"]["step"] == "embed_tokens"
    assert forward(tmp_path / "hf", tmp_path / "nt", "--dtype", "float32", "--tolerance", 0.5)[1]["agrees"]
    convert(tmp_path / "hf", tmp_path / "exact")
    convert(tmp_path / "exact", tmp_path / "back", "--to", "hf", "--dtype", "bfloat16")
    code, said, _ = forward(tmp_path / "exact", tmp_path / "back")
    assert (code, said["dtype"]) == (0, "bfloat16")


def test_the_router_is_not_rounded_with_the_rest(tmp_path, forward, torch):
    """Nanotron keeps it in float32, so a cast leaves it out."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "bf16", *PLAIN["qwen2_moe"]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "nt", "--dtype", "bfloat16")
    code, said, err = forward(tmp_path / "hf", tmp_path / "nt")
    assert (code, said["dtype"]) == (0, "bfloat16"), err


@pytest.mark.parametrize("name, flag, step", [
    ("llama3", "rope_scaling", "layers.0.self_attn.q_turned"),
    ("window", "sliding_window", "layers.0.self_attn.attention")])
def test_what_nanotron_will_not_honour_shows_where_it_matters(tmp_path, forward, name, flag, step):
    source = save_model(tmp_path / "hf", *OTHERS[name])
    convert(source, tmp_path / "nt", "--allow", flag)
    code, said, err = forward(source, tmp_path / "nt")
    assert (code, said["first_difference"]["step"]) == (5, step), err
    assert "; SRC has " in err


def test_the_picture_shows_where_it_begins(pair, tmp_path, forward):
    shutil.copytree(pair[1], tmp_path / "nt")
    config = tmp_path / "nt" / "model_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 77.0}))
    pictures = []
    for copy in (pair[1], tmp_path / "nt"):
        forward(pair[0], copy, "--plot", tmp_path / "new.png")
        pictures.append((tmp_path / "new.png").read_bytes())
        assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["new.png"]
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in pictures)
    assert pictures[0] != pictures[1]


def test_a_person_reads_a_plan_and_a_table(pair, capsys):
    assert call("verify", *pair, "--forward", "--tokens", 16) == 0
    out = capsys.readouterr().out
    for words in ("16 random tokens, seed 0, 4 layers", "as transformers does", "Nanotron's 2 x 2 ranks", "projected",
                  "layer 3 ", "likeliest token the same after 16 of 16", "rows of padding", "weights: all equal"):
        assert words in out
    assert call("verify", *pair, "--forward", "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_not_a_number_is_a_difference(pair, tmp_path, forward):
    shutil.copytree(pair[1], tmp_path / "nt")
    path = next((tmp_path / "nt").rglob("*decoder/1/*/attn/o_proj/*"))
    path.write_bytes(path.read_bytes()[:-2] + b"\xc0\x7f")
    code, said, err = forward(pair[0], tmp_path / "nt")
    assert code == 5 and "layers.1.self_attn.o_proj: not a number at token" in err
    assert said["first_difference"]["relative"] is None and said["logits"]["kl_mean"] is None
    assert said["logits"]["num_same_argmax"] < said["num_tokens"]


@pytest.mark.parametrize("flags, code, words", [
    (("--tokens", 1), 2, "--tokens 1: it is at least 2"), (("--tolerance", 0), 2, "--tolerance 0 is not above 0"),
    (("--tolerance", "nan"), 2, "--tolerance nan is not above 0"), (("--workers", 0), 2, "--workers 0"),
    (("--plot", "/no/such/folder/x.png"), 2, "--plot"), (("--plot", "x.jpg"), 2, "the name of a .png file"),
    (("--text", "/no/such/text"), 2, "No such file"), (("--text", "/dev/zero"), 2, "it is not a file"),
    (("--max-memory", "64MiB"), 6, "--max-memory 64.0 MiB cannot be kept")])
def test_flags_that_make_no_sense(pair, capsys, flags, code, words):
    from stream_reshard.cli import main
    limit = () if "--max-memory" in flags else ("--max-memory", "8GiB")
    assert main(["verify", *map(str, (*pair, "--forward", *flags, *limit))]) == code
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("error: ") and words in line for line in lines), lines


@pytest.mark.parametrize("flags", [("--text", "x"), ("--tokens", 5), ("--tolerance", 1), ("--plot", "x.png")], ids=str)
def test_flags_of_a_forward_pass_alone_mean_nothing(pair, capsys, flags):
    assert call("verify", *pair, *flags) == 2
    assert f"{flags[0]} has no effect without --forward" in capsys.readouterr().err


def test_a_long_text_is_cut_between_letters(pair, tmp_path, forward):
    """As much is read as so many tokens can need."""
    (tmp_path / "text").write_text("half of " + "é" * 500)
    code, said, err = forward(*pair, "--text", tmp_path / "text", "--tokens", 3)
    assert (code, said["num_tokens"]) == (0, 3), err


@pytest.mark.parametrize("content, code, words", [
    (b"", 2, "gives 0 tokens"), (b"half", 2, "gives 1 tokens"), (b"half \xff of", 2, "is not UTF-8")])
def test_texts_that_cannot_be_run(pair, tmp_path, capsys, content, code, words):
    (tmp_path / "text").write_bytes(content)
    assert call("verify", *pair, "--forward", "--text", tmp_path / "text") == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer, words", [
    (None, "neither folder holds one"), ("{", "cannot be used"),
    ('{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"half": 900, "of": 901}, '
     '"unk_token": "half"}, "pre_tokenizer": {"type": "Whitespace"}}', "gives the token 901, the vocabulary has 251")])
def test_tokenizers_that_do_not_fit(pair, tmp_path, capsys, tokenizer, words):
    for name, root in zip(("hf", "nt"), pair):
        shutil.copytree(root, tmp_path / name)
        (tmp_path / name / "tokenizer.json").unlink()
    if tokenizer:
        (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer)
    (tmp_path / "text").write_text("half of")
    assert call("verify", tmp_path / "hf", tmp_path / "nt", "--forward", "--text", tmp_path / "text") == 3
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("config, words", [
    ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not computed here"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"), ({"num_attention_heads": "8"}, "num_attention_heads"),
    ({"model_type": "opt", "architectures": ["OPTForCausalLM"]}, "a forward pass of 'opt' is not computed here"),
    ({"head_dim": 7}, "do not make heads of pairs"), ({"num_key_value_heads": 3}, "do not make heads of pairs"),
    ({"num_hidden_layers": 99_999}, "num_hidden_layers is 99999, but there are 39 tensors"),
    ({"model_type": "qwen2_moe", "num_experts": 2**30}, "num_experts is 1073741824"),
    ({"intermediate_size": 97}, "mlp.gate_proj.weight has the shape (96, 64)")])
def test_sources_that_cannot_be_run(pair, tmp_path, config, words):
    shutil.copytree(pair[0], tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(Refused, match=".") as refused:
        api.plan_forward(tmp_path / "hf", pair[1], max_memory="8GiB")
    assert refused.value.exit_code == 3 and words in str(refused.value)


@pytest.mark.parametrize("config, words", [
    ({"num_hidden_layers": 5}, "num_hidden_layers is 5, but there are 4 layers"),
    ({"num_key_value_heads": 1}, "num_key_value_heads 1 cannot be split over the 2"),
    ({"is_qwen2_config": True}, "one of is_llama_config and is_qwen2_config"),
    ({"hidden_size": 128}, "Nanotron's module has (128, 128)"), ({"rms_norm_eps": 0}, "rms_norm_eps is '0'"),
    ({"moe_config": {}}, None)])
def test_copies_that_cannot_be_run(pair, tmp_path, config, words):
    """LlamaConfig has no experts; Nanotron does not look at the key."""
    shutil.copytree(pair[1], tmp_path / "nt")
    path = tmp_path / "nt" / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if words is None:
        assert api.plan_forward(pair[0], tmp_path / "nt", max_memory="8GiB").copy.config.experts is None
        return
    with pytest.raises(Refused) as refused:
        api.plan_forward(pair[0], tmp_path / "nt", max_memory="8GiB")
    assert refused.value.exit_code == 5 and words in str(refused.value)


def test_another_model_is_told_before_anything_is_computed(pair, tmp_path):
    from stream_reshard.errors import DifferenceError
    other = save_model(tmp_path / "hf", "qwen2_moe", PLAIN["qwen2_moe"][1])
    with pytest.raises(DifferenceError, match="where the source has layers.0.mlp.gate, the copy has layers.0.mlp.gate_proj"):
        api.run_forward(api.plan_forward(other, pair[1], max_memory="8GiB"))
    longer = save_model(tmp_path / "long", "llama", {"num_hidden_layers": 6})
    with pytest.raises(DifferenceError, match="the source has layers.4.input_layernorm, the copy has norm"):
        api.run_forward(api.plan_forward(longer, pair[1], max_memory="8GiB"))


def test_a_notebook_stops_it_between_two_bands(pair):
    stop, seen = api.Stop(), []

    def progress(done, total):
        seen.append((done, total))
        if done == 3:
            stop.request(signal.SIGTERM)

    plan = api.plan_forward(*pair, max_memory="8GiB", tokens=8)
    with pytest.raises(Interrupted) as interrupted:
        api.run_forward(plan, progress, stop)
    assert interrupted.value.exit_code == 143 and seen == [(1, 7), (2, 7), (3, 7)]
    seen.clear()
    result = api.run_forward(plan, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (7, 7) and result.difference is None and result.comparison.num_tokens == 8
    assert result.facts["logits"]["num_same_argmax"] == 8 and any("likeliest" in line for line in result.lines)
