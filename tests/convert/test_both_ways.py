"""Hugging Face to Nanotron to Hugging Face gives every tensor back; Nanotron to Nanotron gives what a conversion from
Hugging Face gives. Every element of a source is its own bit pattern."""
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conversions import assert_same, convert, tensors, tree
from sources import INDEX, make_source
from trees import GOLDEN, MANIFEST

from stream_reshard.cli import main
from stream_reshard.cli.demo import CONFIG, write_random_source
from stream_reshard.convert.conversion import Options, plan_conversion, run_conversion
from stream_reshard.errors import Interrupted

MODELS = {"llama": {}, "tied": {"tied": True}, "qwen2": {"family": "qwen2"}, "two shards": {"num_shards": 2},
          "four kv heads": {"config": {"num_key_value_heads": 4}}, "mistral": {"family": "mistral"},
          "smollm3": {"family": "smollm3", "tied": True}, "qwen2_moe": {"family": "qwen2_moe"}}
WAYS = [["--tp", 1], ["--tp", 2, "--pp", 2], ["--tp", 2, "--rope", "interleaved"],
        ["--tp", 2, "--vocab-multiple", 8], ["--pp", 3, "--checkpoint-version", "1.4"]]
OLD = ["--tp", 2, "--pp", 2, "--checkpoint-version", "1.2"]


def every_way():
    """Each model by each way that Nanotron has for it; most of them are left to the heavy tests."""
    for name in MODELS:
        for flags in [*WAYS, OLD]:
            if flags is OLD and name in ("qwen2", "smollm3", "qwen2_moe"):
                continue  # Release 0.4 has no Qwen2Config.
            is_quick = name == "llama" or flags in (WAYS[1], WAYS[2])
            yield pytest.param(name, flags, id=" ".join(map(str, [name, *flags])),
                               marks=() if is_quick else pytest.mark.heavy)


@pytest.mark.parametrize("name, flags", list(every_way()))
def test_there_and_back(tmp_path, name, flags):
    source = make_source(tmp_path / "hf", **MODELS[name])
    convert(source, tmp_path / "nt", *flags)
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf")
    assert_same(tensors(tmp_path / "back"), tensors(source))
    before, after = (json.loads((root / "config.json").read_text()) for root in (source, tmp_path / "back"))
    # Nanotron has one class for Llama and Mistral; with full attention they are the same.
    dropped = {"rope_scaling"} | ({"architectures", "model_type", "sliding_window"} if name == "mistral" else set())
    ours = {key: value for key, value in before.items() if key not in dropped}
    assert {key: after.get(key) for key in ours} == ours
    for pair in ((source, tmp_path / "back"), (tmp_path / "nt", tmp_path / "back")):
        convert("verify", *pair)


ROUTERS = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)]


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_router_in_float32_loses_no_bit(tmp_path, has_manifest):
    """Nanotron keeps routers in float32 for a reason: so does the way back, also after a training without a manifest."""
    random = np.random.default_rng(0)
    source = make_source(tmp_path / "hf", family="qwen2_moe", extra={
        key: random.standard_normal((3, 16)).astype(np.float32) for key in ROUTERS})
    convert(source, tmp_path / "nt", "--tp", 2)
    if not has_manifest:
        (tmp_path / "nt" / MANIFEST).unlink()
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf", *([] if has_manifest else ["--vocab-size", 11]))
    assert_same(tensors(tmp_path / "back"), tensors(source))
    convert(tmp_path / "nt", tmp_path / "cast", "--to", "hf", "--dtype", "bfloat16",
            *([] if has_manifest else ["--vocab-size", 11]))
    assert {tensor.dtype.name for tensor in tensors(tmp_path / "cast").values()} == {"uint16"}


def test_a_cast_model_comes_back_in_the_dtype_of_the_cast(tmp_path):
    convert(make_source(tmp_path / "hf", family="qwen2_moe"), tmp_path / "nt", "--dtype", "float32")
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf")
    assert {tensor.dtype.name for tensor in tensors(tmp_path / "back").values()} == {"uint32"}


@pytest.mark.parametrize("to", [["--tp", 1], ["--tp", 2, "--pp", 2, "--dp", 2], ["--tp", 2, "--rope", "neox"], OLD],
                         ids=lambda flags: " ".join(map(str, flags)))
@pytest.mark.parametrize("old", [["--tp", 1], ["--tp", 2, "--vocab-multiple", 8], ["--pp", 3, "--rope", "interleaved"],
                                 OLD], ids=lambda flags: " ".join(map(str, flags)))
def test_across_is_what_a_conversion_from_the_start_gives(tmp_path, old, to):
    source = make_source(tmp_path / "hf", config={"vocab_size": 13})
    convert(source, tmp_path / "a", *old)
    convert(tmp_path / "a", tmp_path / "b", "--to", "nanotron", *to)
    keeps = "--rope" in to or to is OLD or "interleaved" not in old and old is not OLD
    convert(source, tmp_path / "direct", *to, *([] if keeps else ["--rope", "interleaved"]))
    assert tree(tmp_path / "b") == tree(tmp_path / "direct")
    for name in ("model_config.json", "checkpoint_metadata.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    convert("verify", tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm3", "mistral", "qwen2_moe"])
def test_shards_are_those_of_transformers(tmp_path, family, tied):
    """Same shards, same index, same tensors as `save_pretrained` writes, and transformers loads the folder."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": tied}
    if family == "smollm3":
        sizes |= {"no_rope_layer_interval": 3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "mistral":
        sizes |= {"sliding_window": None, "head_dim": 8}
    if family == "qwen2_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                  "shared_expert_intermediate_size": 40}
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="9KB")
    convert(tmp_path / "hf", tmp_path / "nt", "--tp", 2)
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf", "--max-shard-size", "9KB")
    want, got = (json.loads((root / INDEX).read_text()) for root in (tmp_path / "hf", tmp_path / "back"))
    assert got["weight_map"].keys() == want["weight_map"].keys()
    if family != "qwen2_moe":  # Its experts are one tensor in memory, and listed in another order.
        assert got["weight_map"] == want["weight_map"]
    assert got["metadata"]["total_size"] == want["metadata"]["total_size"]
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
                     for name in ("hf", "back"))
    assert type(after) is (transformers.LlamaForCausalLM if family == "mistral" else type(model))
    assert after.dtype == torch.bfloat16
    tokens = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        assert torch.equal(after(tokens).logits, before(tokens).logits)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden checkpoints are not beside this checkout")
@pytest.mark.parametrize("source, saved", [("llama_gqa_hf", "llama_gqa_tp1_pp1_dp1"),
                                           ("llama_gqa_hf", "llama_gqa_tp2_pp2_dp2"),
                                           ("llama_tied_hf", "llama_tied_tp2_pp2_dp1"),
                                           ("qwen2_hf", "qwen2_tp2_pp2_dp1")])
def test_what_nanotron_saved_comes_back(tmp_path, source, saved):
    """Its headers hold np.int64(...), and no manifest says how many rows of the vocabulary are true."""
    vocab = json.loads((GOLDEN / source / "config.json").read_text())["vocab_size"]
    convert(GOLDEN / saved, tmp_path / "hf", "--to", "hf", "--vocab-size", vocab)
    assert_same(tensors(tmp_path / "hf"), tensors(GOLDEN / source))


def test_a_shard_is_cut_from_more_files_than_may_be_open(tmp_path):
    source = make_source(tmp_path / "hf", config={"num_hidden_layers": 12, "hidden_size": 8, "intermediate_size": 8})
    convert(source, tmp_path / "nt", "--tp", 2)
    code = ("import resource, sys; from stream_reshard.cli import main; "
            f"resource.setrlimit(resource.RLIMIT_NOFILE, (40, {resource.getrlimit(resource.RLIMIT_NOFILE)[1]})); "
            "sys.exit(main(sys.argv[1:]))")
    subprocess.run([sys.executable, "-c", code, tmp_path / "nt", tmp_path / "back", "--to", "hf", "--quiet"],
                   check=True, cwd=Path(__file__).parents[2])
    assert_same(tensors(tmp_path / "back"), tensors(source))


def test_the_way_back_reads_and_writes_every_byte_once(tmp_path, capsys):
    """Columns of four ranks are put together before they are written, so that a file is written in its order."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 8,
             "num_key_value_heads": 8, "vocab_size": 4000}
    write_random_source(tmp_path / "hf", CONFIG | sizes)
    convert(tmp_path / "hf", tmp_path / "nt", "--tp", 4)
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), "--to", "hf", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    nbytes = 2 * told["num_parameters"]
    assert nbytes <= told["io"]["rchar"] < 1.2 * nbytes and told["io"]["wchar"] < 1.1 * nbytes
    assert_same(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))


def test_a_stopped_run_to_shards_goes_on(tmp_path):
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "nt", "--tp", 2)
    options, seen = Options(tmp_path / "nt", tmp_path / "back", to="hf", max_shard_size=1000), []

    def stop(job):
        seen.append(job)
        if len(seen) == 2:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        run_conversion(plan_conversion(options), stop)
    assert not (tmp_path / "back").exists()
    assert run_conversion(plan_conversion(options)).num_kept >= 2
    assert_same(tensors(tmp_path / "back"), tensors(source))


def test_only_what_this_tool_made_is_overwritten(tmp_path, capsys):
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "nt", "--tp", 2)
    original = make_source(tmp_path / "precious")
    assert main([str(tmp_path / "nt"), str(original), "--to", "hf", "--overwrite"]) == 4
    assert "nor was it made by this tool" in capsys.readouterr().err
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf")
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf", "--max-shard-size", "2KB", "--overwrite")
    assert not (tmp_path / "back" / "model.safetensors").exists()
    assert_same(tensors(tmp_path / "back"), tensors(source))


def test_shards_cut_anew_do_not_lose_what_the_config_says(tmp_path, capsys):
    """Hugging Face to Hugging Face is only another size of shards, or another dtype."""
    source = make_source(tmp_path / "hf", num_shards=2)
    convert(source, tmp_path / "one", "--to", "hf")
    assert_same(tensors(tmp_path / "one"), tensors(source))
    scaled = make_source(tmp_path / "scaled", config={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert main([str(scaled), str(tmp_path / "no"), "--to", "hf", "--allow", "rope_scaling"]) == 3
    assert "config.json: rope_type is 'linear'" in capsys.readouterr().err


def test_another_tokenizer_is_another_output(tmp_path):
    source = make_source(tmp_path / "hf")
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"name": name}))
    convert(source, tmp_path / "nt", "--tokenizer", tmp_path / "one")
    convert(source, tmp_path / "nt", "--tokenizer", tmp_path / "one")
    assert main([str(source), str(tmp_path / "nt"), "--tokenizer", str(tmp_path / "other")]) == 4
    convert(source, tmp_path / "nt", "--tokenizer", tmp_path / "other", "--overwrite")
    assert json.loads((tmp_path / "nt" / "tokenizer.json").read_text()) == {"name": "other"}


def test_tokenizer_and_generation_files_go_along(tmp_path, capsys):
    source = make_source(tmp_path / "hf")
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    convert(source, tmp_path / "nt")
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf")
    assert (tmp_path / "back" / "generation_config.json").read_text() == '{"eos_token_id": 2}'
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text('{"other": 1}')
    convert(tmp_path / "nt", tmp_path / "given", "--to", "hf", "--tokenizer", tmp_path / "other")
    assert (tmp_path / "given" / "tokenizer.json").read_text() == '{"other": 1}'
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "nt"), str(tmp_path / "no"), "--to", "hf", "--tokenizer", str(tmp_path / "empty")]) == 2
    assert "holds none of tokenizer.json" in capsys.readouterr().err
