"""Hugging Face to Nanotron to Hugging Face gives every tensor back; Nanotron to Nanotron gives what a conversion from
Hugging Face gives. Every element of a source is its own bit pattern."""
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sources import INDEX, bfloat16, make_source
from trees import GOLDEN

from stream_reshard.cli import main
from stream_reshard.convert import Options, plan_conversion, run_conversion
from stream_reshard.demo import CONFIG, write_random_source
from stream_reshard.errors import Interrupted
from stream_reshard.topology import Topology


def convert(*arguments):
    assert main([*map(str, arguments), "--quiet"]) == 0


def tensors(root):
    """The tensors of a Hugging Face folder, by key alone."""
    return {name.partition(":")[2]: array for name, array in bfloat16(root).items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, array in want.items():
        assert np.array_equal(got[key], array), key


def tree(root):
    """(header, data) of every weight file. The spaces that pad a header follow the source, so they are left out."""
    found = {}
    for path in sorted((root / "model").rglob("*.safetensors")):
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        found[path.relative_to(root).as_posix()] = raw[8:begin].rstrip(b" "), raw[begin:]
    return found


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


def test_a_vocabulary_that_is_not_known_is_asked_for(tmp_path, capsys):
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "nt", "--tp", 2)
    (tmp_path / "nt" / "stream_reshard.json").unlink()
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), "--to", "hf"]) == 2
    assert "--vocab-size is needed: the embedding has 12 rows" in capsys.readouterr().err
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), "--to", "hf", "--vocab-size", "13"]) == 2
    assert "--vocab-size 13: the embedding has 12 rows" in capsys.readouterr().err
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf", "--vocab-size", 11)
    assert_same(tensors(tmp_path / "back"), tensors(source))


def test_format_1_3_is_read(tmp_path):
    """It says nothing of RoPE and interleaves, as all did before September 2024."""
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "nt", "--tp", 2, "--checkpoint-version", "1.4", "--rope", "interleaved")
    for path in (tmp_path / "nt" / "model").rglob("*rank*"):
        path.write_bytes(path.read_bytes().replace(b'"version":"1.4"', b'"version":"1.3"'))
    config = json.loads((tmp_path / "nt" / "model_config.json").read_text())
    config.pop("rope_interleaved")
    (tmp_path / "nt" / "model_config.json").write_text(json.dumps(config))
    (tmp_path / "nt" / "stream_reshard.json").unlink()
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf", "--vocab-size", 11)
    assert_same(tensors(tmp_path / "back"), tensors(source))


def test_the_target_must_be_said(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt")
    assert main([str(tmp_path / "nt"), str(tmp_path / "other"), "--tp", "2"]) == 2
    assert "--to hf" in capsys.readouterr().err
    assert main([str(tmp_path / "hf"), str(tmp_path / "other"), "--vocab-size", "11"]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("flags, message", [
    (["--to", "hf", "--tp", "2"], "--tp, --pp with --to hf"), (["--to", "hf", "--rope", "neox"], "--rope with --to hf"),
    (["--to", "hf", "--vocab-size", "0"], "--vocab-size 0: the embedding has 12 rows"),
    (["--to", "hf", "--max-shard-size", "0"], "is not a size"),
    (["--to", "hf", "--tokenizer", "/nowhere"], "holds none of")])
def test_flags_that_mean_nothing_are_refused(tmp_path, capsys, flags, message):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def damage_stale(root):
    path = next((root / "model").rglob("*tp-rank-1-of-2*"))
    shutil.copy(path, path.with_name(re.sub("tp-rank-1-of-2", "tp-rank-1-of-4", path.name)))
    return "files of several topologies"


def damage_missing(root):
    path = next((root / "model").rglob("*tp-rank-1-of-2*"))
    path.unlink()
    return f"{path.name}' is missing"


def damage_extra(root):
    path = next((root / "model").rglob("*input_layernorm/*"))
    other = path.parent.with_name("q_norm") / path.name
    other.parent.mkdir()
    shutil.copy(path, other)
    return "holds a parameter that the model does not have"


def damage_exchanged(root):
    one, two = sorted((root / "model").rglob("*0/pp_block/attn/o_proj/*"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    return "is cut in another way than Nanotron cuts it for its rank"


def damage_shape(root):
    path = root / "model_config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 20', '"intermediate_size": 24'))
    return "but model_config.json asks for"


def damage_version(root):
    path = next((root / "model").rglob("*gate_up_proj/*"))
    path.write_bytes(path.read_bytes().replace(b'"1.5"', b'"1.4"'))
    return "files of several format versions"


def damage_limit(root):
    path = root / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window_size": 32}))
    return "sliding_window_size is '32'"


def damage_config(root):
    (root / "model_config.json").unlink()
    return "it is not a committed checkpoint"


@pytest.mark.parametrize("damage", [damage_stale, damage_missing, damage_extra, damage_exchanged, damage_shape,
                                    damage_version, damage_limit, damage_config])
@pytest.mark.parametrize("to", ["hf", "nanotron"])
def test_a_source_that_is_not_whole_is_refused(tmp_path, capsys, damage, to):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    message = damage(tmp_path / "nt")
    assert main([str(tmp_path / "nt"), str(tmp_path / "out"), "--to", to]) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_block_on_another_stage_is_found_where_it_stands(tmp_path, capsys):
    """Nanotron's loader looks for it everywhere; so do we, and say it."""
    source = make_source(tmp_path / "hf")
    convert(source, tmp_path / "nt", "--pp", 2)
    for path in sorted((tmp_path / "nt" / "model").rglob("*decoder/0/**/*pp-rank-0-of-2*")):
        path.rename(path.with_name(path.name.replace("pp-rank-0", "pp-rank-1")))
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), "--to", "hf"]) == 0
    assert "decoder.0 stand on other stages" in capsys.readouterr().out
    assert_same(tensors(tmp_path / "back"), tensors(source))


def test_a_shard_is_cut_from_more_files_than_may_be_open(tmp_path):
    source = make_source(tmp_path / "hf", config={"num_hidden_layers": 12, "hidden_size": 8, "intermediate_size": 8})
    convert(source, tmp_path / "nt", "--tp", 2)
    code = ("import resource, sys; from stream_reshard.cli import main; "
            f"resource.setrlimit(resource.RLIMIT_NOFILE, (40, {resource.getrlimit(resource.RLIMIT_NOFILE)[1]})); "
            "sys.exit(main(sys.argv[1:]))")
    subprocess.run([sys.executable, "-c", code, tmp_path / "nt", tmp_path / "back", "--to", "hf", "--quiet"],
                   check=True, cwd=Path(__file__).parents[1])
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
    options, seen = Options(tmp_path / "nt", tmp_path / "back", Topology(), to="hf", max_shard_nbytes=1000), []

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


@pytest.mark.parametrize("family, config, code, message", [
    ("mistral", {"sliding_window": ...}, 3, "sliding_window is not said, which means 4096"),
    ("mistral", {"sliding_window": 32}, 3, "Nanotron would attend to everything"),
    ("mistral", {"sliding_window": 32, "head_dim": 8}, 3, "head_dim is '8'"),
    ("qwen2_moe", {"norm_topk_prob": True}, 3, "norm_topk_prob is true"),
    ("qwen2_moe", {"mlp_only_layers": [0]}, 3, "layers without experts are not converted"),
    ("qwen2_moe", {"decoder_sparse_step": 2}, 3, "decoder_sparse_step is '2'"),
    ("qwen2_moe", {"num_experts_per_tok": 4}, 3, "4 of 3 experts are chosen"),
    ("smollm3", {"no_rope_layers": [0, 1]}, 3, "not every n-th"),
    ("smollm3", {"no_rope_layers": [1, 2]}, 3, "not a list of 0 and 1"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 3}, 3, "is not a multiple of 3")])
def test_what_a_family_cannot_say_in_nanotron_is_refused(tmp_path, capsys, family, config, code, message):
    source = make_source(tmp_path / "hf", family=family, config=config)
    assert main([str(source), str(tmp_path / "nt")]) == code
    assert message in capsys.readouterr().err


def test_layers_without_rope_are_told_to_nanotron(tmp_path):
    for name, config in (("list", {}), ("interval", {"no_rope_layers": ...}), ("none", {"no_rope_layers": [1, 1]})):
        convert(make_source(tmp_path / name, family="smollm3", config=config), tmp_path / f"{name}-nt")
        told = json.loads((tmp_path / f"{name}-nt" / "model_config.json").read_text())
        assert told.get("no_rope_layer") == (None if name == "none" else 2) and "is_qwen2_config" in told


def experts(root, layer, name, shape):
    """(path, header, array) of Nanotron's experts of a layer."""
    path = root / f"model/model/decoder/{layer}/pp_block/mlp/experts/model_merged_{name}_proj.safetensors"
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return path, raw[:begin], np.frombuffer(raw[begin:], np.uint16).reshape(shape)


def test_experts_are_stacked_transposed_gate_before_up(tmp_path):
    source = make_source(tmp_path / "hf", family="qwen2_moe")
    convert(source, tmp_path / "nt", "--tp", 2)
    want = tensors(source)
    _, _, gate_up = experts(tmp_path / "nt", 1, "gate_up", (3, 16, 12))
    _, _, down = experts(tmp_path / "nt", 1, "down", (3, 6, 16))
    for expert in range(3):
        gate, up, out = (want[f"model.layers.1.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert np.array_equal(gate_up[expert], np.concatenate([gate.T, up.T], axis=1))
        assert np.array_equal(down[expert], out.T)
    told = json.loads((tmp_path / "nt" / "model_config.json").read_text())["moe_config"]
    assert (told["num_experts"], told["top_k"], told["enable_shared_expert"]) == (3, 2, True)


@pytest.mark.parametrize("change", [lambda array: array[[1, 0, 2]], lambda array: np.roll(array, 6, axis=2),
                                    lambda array: array[:, ::-1]], ids=["experts", "gate and up", "columns"])
def test_exchanged_experts_are_found(tmp_path, capsys, change):
    source = make_source(tmp_path / "hf", family="qwen2_moe")
    convert(source, tmp_path / "nt")
    path, header, array = experts(tmp_path / "nt", 0, "gate_up", (3, 16, 12))
    path.write_bytes(header + np.ascontiguousarray(change(array)).tobytes())
    (tmp_path / "nt" / "stream_reshard.json").unlink()
    assert main(["verify", str(source), str(tmp_path / "nt")]) == 5
    assert "experts.0.gate_proj.weight [0, 0]" in capsys.readouterr().err


def test_an_expert_larger_than_a_buffer_comes_back(tmp_path):
    """Beside a row of gate stands one of up: a block of gate is read with what stands in between."""
    pytest.importorskip("torch")
    sizes = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8,
             "num_key_value_heads": 8, "vocab_size": 300, "architectures": ["Qwen2MoeForCausalLM"],
             "model_type": "qwen2_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 1408,
             "shared_expert_intermediate_size": 64}
    write_random_source(tmp_path / "hf", CONFIG | sizes)
    convert(tmp_path / "hf", tmp_path / "nt", "--tp", 2, "--max-memory", "8GiB")
    convert(tmp_path / "nt", tmp_path / "back", "--to", "hf", "--max-memory", "8GiB")
    assert_same(tensors(tmp_path / "back"), tensors(tmp_path / "hf"))
    convert("verify", tmp_path / "hf", tmp_path / "nt")


def damage_sizes(root, **sizes):
    path = root / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes))


@pytest.mark.parametrize("family, sizes, message", [
    ("llama", {"vocab_size": 11}, "11 vocab cannot be split by the 2 tensor-parallel ranks"),
    ("llama", {"intermediate_size": 21}, "21 ffn cannot be split"),
    ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1}, "1 heads cannot be split"),
    ("qwen2_moe", {"moe_config": {"num_experts": 4000, "top_k": 2, "moe_intermediate_size": 6, "layers": [-1],
                                  "shared_expert_intermediate_size": 10, "enable_shared_expert": True}},
     "holds 3 experts, model_config.json says 4000"),
    ("qwen2_moe", {"moe_config": {"num_experts": 10**6}}, "of 1000000 experts are chosen")])
def test_sizes_that_are_not_those_of_the_files_are_refused(tmp_path, capsys, family, sizes, message):
    convert(make_source(tmp_path / "hf", family=family), tmp_path / "nt", "--tp", 2)
    damage_sizes(tmp_path / "nt", **sizes)
    assert main([str(tmp_path / "nt"), str(tmp_path / "out"), "--to", "hf"]) == 3
    assert message in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nt")]) == 0
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "nt")]) in (3, 5)


def test_a_name_that_speaks_of_a_million_ranks_is_refused(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt")
    for path in (tmp_path / "nt" / "model").rglob("*tp-rank-0-of-1*"):
        path.rename(path.with_name(path.name.replace("tp-rank-0-of-1", "tp-rank-0-of-999999")))
    assert main([str(tmp_path / "nt"), str(tmp_path / "out"), "--to", "hf"]) == 3
    assert "speak of 999999 ranks" in capsys.readouterr().err


def test_an_unknown_block_is_named(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt")
    path = next((tmp_path / "nt" / "model").rglob("*lm_head/pp_block/*"))
    other = Path(str(path).replace("lm_head", "vision_tower"))
    other.parent.mkdir(parents=True)
    shutil.copy(path, other)
    assert main(["inspect", str(tmp_path / "nt")]) == 0
    assert "vision_tower" in capsys.readouterr().out


def test_shards_cut_anew_do_not_lose_what_the_config_says(tmp_path, capsys):
    """Hugging Face to Hugging Face is only another size of shards, or another dtype."""
    source = make_source(tmp_path / "hf", num_shards=2)
    convert(source, tmp_path / "one", "--to", "hf")
    assert_same(tensors(tmp_path / "one"), tensors(source))
    scaled = make_source(tmp_path / "scaled", config={"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    assert main([str(scaled), str(tmp_path / "no"), "--to", "hf", "--allow", "rope_scaling"]) == 3
    assert "config.json: rope_type is 'linear'" in capsys.readouterr().err


def test_keys_of_nanotron_mean_nothing_in_another_config(tmp_path):
    source = make_source(tmp_path / "hf", config={"no_rope_layer": 2})
    convert(source, tmp_path / "nt")
    assert "no_rope_layer" not in json.loads((tmp_path / "nt" / "model_config.json").read_text())


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


def test_a_source_of_links_into_the_destination_is_kept(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    shutil.copytree(tmp_path / "nt", tmp_path / "links", copy_function=lambda a, b: Path(b).symlink_to(a))
    for path in (tmp_path / "links").iterdir():
        if path.is_symlink():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
    assert main([str(tmp_path / "links"), str(tmp_path / "nt"), "--to", "nanotron", "--overwrite"]) == 4
    assert "links to are in" in capsys.readouterr().err


def test_what_the_manifest_says_of_the_vocabulary_stands(tmp_path, capsys):
    convert(make_source(tmp_path / "hf"), tmp_path / "nt", "--tp", 2)
    assert main([str(tmp_path / "nt"), str(tmp_path / "back"), "--to", "hf", "--vocab-size", "10"]) == 2
    assert "--vocab-size 10: the manifest of" in capsys.readouterr().err


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
