"""Verify is not talked round: by no manifest, no dtype or count that a copy says of itself, and no file beside it."""
import json
import shutil

import numpy as np
import pytest
from damage import bare, edit_header, edit_json, every, forge, poke, start_here
from running import call
from sources import edit_config, make_source, make_tensors, shapes_of
from trees import EMBEDDING, MANIFEST

from stream_reshard.options import ALLOWABLE
from stream_reshard.machine import memory

SCALED = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}


@pytest.fixture
def scaled(tmp_path):
    """(a source whose rope_scaling was accepted, the conversion)."""
    source = make_source(tmp_path / "hf", config=SCALED)
    assert call(source, tmp_path / "nt", "--quiet", "--allow", "rope_scaling") == 0
    return source, tmp_path / "nt"


FORGED = [
    ("num_attention_heads", 2), ("num_key_value_heads", 4), ("rms_norm_eps", 0.5), ("rope_theta", 7.0),
    ("max_position_embeddings", 9), ("hidden_act", "gelu"), ("rope_seq_len_interpolation_factor", 4.0),
    ("_use_qkv_packed", False), ("sliding_window_size", 3), ("flex_attention_mask", "document"),
    ("_attn_implementation", "flex_attention"), ("_attn_implementation", "none_of_nanotrons")]


@pytest.mark.parametrize("key, value", FORGED)
def test_a_manifest_allows_no_other_value(made, copied, differs, key, value):
    """It says so of every setting there is, and config.yaml says the same as model_config.json."""
    edit_json(root := copied("tp1", is_bare=False), "model_config.json", **{key: value})
    forge(root, lambda m: m["facts"].update(allowed=[key, *ALLOWABLE, "stages", "x"]))
    differs(made("hf"), root, [f"{key}: in the source"], "--edited", "model_config.json")


def test_a_manifest_allows_nothing_that_no_user_could(made, copied, differs, tmp_path):
    """Not even where the copy says nothing of it."""
    source = shutil.copytree(made("tp1"), tmp_path / "source")
    edit_json(source, "model_config.json", rope_seq_len_interpolation_factor=2.0)
    start_here(root := copied("tp2pp2", is_bare=False))
    forge(root, lambda m: m["facts"].update(allowed=["rope_seq_len_interpolation_factor"]))
    differs(source, root, ["rope_seq_len_interpolation_factor: in the source"], "--edited", "config.yaml")


def test_what_a_manifest_lets_pass_is_told(scaled, verify, differs):
    source, root = scaled
    code, out, _ = verify(source, root)
    assert code == 0 and "accepted rope_scaling: in the source: rope_type is 'llama3'" in out
    assert ": not set; by DST's manifest" in out
    code, out, _ = verify(source, root, "--json")
    assert [text.partition(":")[0] for text in json.loads(out)["accepted"]] == ["rope_scaling"]
    edit_json(root, "model_config.json", rope_scaling={"type": "linear", "factor": 2.0})
    differs(source, root, ["rope_scaling: in the source", "'linear'"], "--edited", "model_config.json")


def test_an_old_format_may_say_nothing_of_the_base_but_nothing_else(tmp_path, verify, differs):
    source = make_source(tmp_path / "hf", config={"rope_theta": 5e5})
    flags = ["--checkpoint-version", "1.2", "--allow", "rope_theta", "--quiet"]
    assert call(source, root := tmp_path / "nt", *flags) == 0
    assert verify(source, root)[0] == 0
    edit_json(root, "model_config.json", rope_theta=7.0)
    differs(source, root, ["rope_theta: in the source: '500000.0'", "'7.0'"], "--edited", "model_config.json")


@pytest.mark.parametrize("source", ["hf", "tp1", "padded"])
def test_a_forged_vocabulary_hides_no_row(made, copied, tmp_path, verify, differs, source):
    """Of a Nanotron source that keeps no count, rows that the copy leaves out must be zero, or a user says it."""
    original = shutil.copytree(made(source), tmp_path / "original")
    (original / MANIFEST).unlink(missing_ok=True)
    root = copied("tp1", is_bare=False)
    for path in every(root, "token_embedding", ".safetensors") + every(root, "lm_head", ".safetensors"):
        raw = path.read_bytes()
        path.write_bytes(raw[:-6 * 32] + bytes(6 * 32))
    forge(root, lambda m: m["facts"].update(vocab_size=5))
    forge(root, lambda m: [file.update(xxh3_128=None) for file in m["files"]])
    problems = differs(original, root, ["the vocabulary has 5 rows"] if source == "hf" else [
        "row 5 of the source is not zero", "--vocab-size 5"])
    if source != "hf":
        assert any("lm_head" in line for line in problems)
        differs(original, root, ["the vocabulary has 5 rows", "11 in the source"], "--vocab-size", "11")
        assert verify(original, root, "--vocab-size", "5")[0] in (0, 5)


def test_a_vocabulary_is_said_of_a_nanotron_source_alone(made, copied, tmp_path, verify):
    assert verify(made("hf"), made("tp1"), "--vocab-size", "11")[0] == 2
    for count in ("0", "12", "17"):
        code, _, problems = verify(made("padded"), made("hf"), "--vocab-size", count)
        assert code == 2 and f"--vocab-size {count}" in problems[0]
    bare(root := copied("padded"))
    poke(every(root, EMBEDDING)[0], -1)
    assert verify(root, made("hf"))[0] == 5 and verify(root, made("hf"), "--vocab-size", "11")[0] == 0
    assert call(root, tmp_path / "back", "--to", "hf", "--vocab-size", "11", "--quiet", "--verify") == 0


@pytest.mark.parametrize("word, code", [("bfloat16", 0), ("float16", 5), ("float32", 5), ("x", 5), ("keep", 5)])
def test_a_cast_is_told_and_fits_what_is_stored(made, copied, verify, word, code):
    start_here(root := copied("float_cast", is_bare=False))
    forge(root, lambda m: m["facts"].update(dtype=word))
    found, out, problems = verify(made("float_hf"), root, "--edited", "config.yaml")
    assert found == code
    assert found or "cast     float32 to bfloat16, by DST's manifest" in out
    if word in ("float16", "float32", "x"):
        assert any("a cast of the weights to" in line and "stored in bfloat16" in line for line in problems)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("word, equal", [("bfloat16", True), ("torch.bfloat16", True), (None, True), ("auto", True),
                                         ("float16", False), ("float32", False), ("x", False), (7, False)])
def test_a_copy_is_loaded_in_the_dtype_it_is_stored_in(made, copied, verify, key, word, equal):
    edit_config(root := copied("hf3"), {"torch_dtype": ...} | {key: word})
    code, _, problems = verify(made("tp1"), root)
    assert code == (0 if equal else 5) and (equal or "transformers would load" in problems[0])
    assert verify(root, made("tp1"))[0] == 0


ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """A Qwen2-MoE whose routers are in float32, with bits that bfloat16 has no room for; and it converted."""
    root = tmp_path_factory.mktemp("moe")
    config = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 11}
    shapes = {key: shape for key, shape in shapes_of("qwen2_moe", config, False).items() if key.endswith("mlp.gate.weight")}
    routers = {key: np.linspace(0.1, 0.9, array.size, dtype=np.float32).reshape(array.shape)
               for key, array in make_tensors(shapes).items()}
    source = make_source(root / "hf", family="qwen2_moe", extra=routers)
    assert call(source, root / "nt", "--quiet", "--tp", "2") == 0
    return source, root / "nt"


def rounded(moe, root):
    """The Hugging Face folder with routers that were rounded to bfloat16."""
    source, _ = moe
    config = json.loads((source / "config.json").read_text())
    shapes = shapes_of("qwen2_moe", config, False)
    routers = {key: (np.linspace(0.1, 0.9, int(np.prod(shape)), dtype=np.float32).view(np.uint32) >> 16).astype(
        np.uint16).reshape(shape) for key, shape in shapes.items() if key.endswith("mlp.gate.weight")}
    return make_source(root, family="qwen2_moe", extra=routers)


def test_a_router_in_float32_stays_what_it_is(moe, tmp_path, verify, differs):
    source, root = moe
    back = rounded(moe, tmp_path / "back")
    assert verify(source, root)[0] == 0
    differs(source, back, [f"{ROUTER} has the dtype BF16, in the source F32"])
    differs(root, back, [f"{ROUTER} [0, 0]", "the source has 0.1 (0x3dcccccd)"])
    differs(back, root, [ROUTER, "the source has"])
    assert verify(root, back, "--dtype", "bfloat16")[0] == 5, "rounded down, where a cast rounds to nearest"


def test_a_router_of_few_bits_is_the_same_in_float32(tmp_path, verify, differs):
    source = make_source(tmp_path / "hf", family="qwen2_moe")
    assert call(source, root := tmp_path / "nt", "--quiet", "--tp", "2") == 0
    assert verify(source, root)[0] == verify(root, source)[0] == 0
    poke(every(root, "mlp/router/")[0], -1)
    (root / MANIFEST).unlink()
    differs(root, source, [ROUTER.replace("0", "0")])


def test_experts_are_compared_in_parts_of_rows(tmp_path, verify, differs, monkeypatch):
    """They stand transposed in Nanotron."""
    monkeypatch.setattr(memory, "MAX_BLOCK_NBYTES", 32)
    source = make_source(tmp_path / "hf", family="qwen2_moe")
    assert call(source, root := tmp_path / "nt", "--quiet", "--tp", "2", "--rope", "interleaved") == 0
    assert verify(source, root)[0] == verify(root, source)[0] == 0
    (root / MANIFEST).unlink()
    poke(every(root, "merged_down_proj")[0], -1)
    differs(source, root, ["experts.2.down_proj.weight [15, 5]", "at [2, 5, 15] of the file"])


def test_nanotron_keeps_routers_in_float32(made, moe, tmp_path, differs):
    root = shutil.copytree(moe[1], tmp_path / "nt")
    bare(root)
    for path in every(root, "mlp/router/"):
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = raw[8:begin].replace(b'"F32"', b'"BF16"').replace(b"[0,192]", b"[0,96]").rstrip()
        header += b" " * (-len(header) % 8)
        data = (np.frombuffer(raw[begin:], np.uint32) >> 16).astype(np.uint16).tobytes()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    differs(moe[0], root, [f"{ROUTER} has the dtype BF16", "Nanotron has F32"])


FOLLOWED = ["latest.txt", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin",
            "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
            "MODEL.SAFETENSORS", "Model.safetensors", "Config.json", "MODEL_CONFIG.JSON", "Config.yaml", "Latest.txt",
            "model.safetensors.index.fp32.json", "consolidated.safetensors", "Model/x", "MODEL/model/x"]


@pytest.mark.parametrize("kind", ["tp1", "hf3"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_a_reader_would_follow_is_extra(made, copied, verify, differs, kind, name):
    """Without a manifest, and with one that names it."""
    root = copied(kind)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("1")
    differs(made("hf"), root, [f"'{name}' is extra"])
    (root / name).unlink()
    assert verify(made("hf"), root)[0] == 0


def test_what_no_reader_follows_is_no_matter(made, copied, verify):
    root = copied("tp1")
    for name in ("notes.txt", "README.md", "LICENSE", "tokenizer.json", "optimizer/x", "logs/latest.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    assert verify(made("hf"), root)[0] == 0


@pytest.mark.parametrize("name", ["config.yaml", "checkpoint_metadata.json"])
@pytest.mark.parametrize("is_bare", [True, False], ids=["bare", "forged"])
def test_what_stands_beside_the_weights_is_missed(made, copied, verify, differs, name, is_bare):
    root = copied("tp1", is_bare)
    (root / name).unlink()
    flags = ["--allow", name]
    if not is_bare:
        start_here(root)
        forge(root, lambda m: m.update(files=[file for file in m["files"] if file["path"] != name]))
        flags += [] if name == "config.yaml" else ["--edited", "config.yaml"]
    differs(made("hf"), root, [f"'{name}' is missing"])
    assert verify(made("hf"), root, *flags)[0] == 0


@pytest.mark.parametrize("version", ["9.9", "1.6", "1.1", "2.0"])
def test_a_format_that_nobody_knows(made, copied, differs, version):
    root = copied("tp2pp2")
    edit_header(root, '"1.5"', f'"{version}"', "-rank-")
    edit_json(root, "checkpoint_metadata.json", version=version)
    differs(made("hf"), root, [f"'{version}' is not known", "1.2, 1.3, 1.4, 1.5"])
