"""A conversion that went wrong is caught by the forward pass, and the report points at the right place."""
import json
import re
import shutil

import numpy as np
import pytest
from conversions import convert
from forwards import PLAIN, save_model
from running import call

from stream_reshard import api
from stream_reshard.errors import Refused

pytestmark = pytest.mark.usefixtures("transformers")

TP2 = ("--tp", 2, "--pp", 2)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """converted(model, *flags): (source, the conversion); both stay as they are."""
    root, made = tmp_path_factory.mktemp("mutations"), {}

    def pair(name, *flags):
        if name not in made:
            made[name] = save_model(root / name / "hf", *PLAIN[name])
        if (key := (name, *flags)) not in made:
            made[key] = root / name / str(len(made))
            convert(made[name], made[key], *flags)
        return made[name], made[key]
    return pair


def weights(root, parameter):
    return sorted((root / "model/model" / parameter.rsplit(".", 1)[0].replace(".", "/")).glob("*.safetensors"))


def edit(path, change):
    """Change the array of a weight file; bfloat16 as 16-bit patterns."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])["data"]
    array = np.frombuffer(raw[begin:], {"BF16": np.uint16, "F32": np.uint32}[header["dtype"]]).reshape(header["shape"])
    path.write_bytes(raw[:begin] + np.ascontiguousarray(change(array)).tobytes())


def rows_exchanged(parameter, sizes, order):
    """The blocks of rows, of these sizes, of a parameter stand in another order, in every rank."""
    def mutate(root):
        def exchanged(array):
            blocks = np.split(array, np.cumsum(sizes)[:-1])
            return np.concatenate([blocks[place] for place in order])
        for path in weights(root, parameter):
            edit(path, exchanged)
    return mutate


def ranks_exchanged(parameter):
    """What two tensor-parallel ranks hold, without their headers: the files look as they should."""
    def mutate(root):
        one, two = weights(root, parameter)
        first, second = (path.read_bytes() for path in (one, two))
        for path, header, data in ((one, first, second), (two, second, first)):
            begin, other = (8 + int.from_bytes(raw[:8], "little") for raw in (header, data))
            path.write_bytes(header[:begin] + data[other:])
    return mutate


def layers_exchanged(one, two):
    """Two layers, whatever stages they are on: each has the place that the other should have."""
    def mutate(root):
        for path in weights(root, f"decoder.{one}.pp_block.attn.qkv_proj.weight")[0].parents[2].rglob("*.safetensors"):
            pattern = re.sub(r"pp-rank-\d", "pp-rank-?", str(path.relative_to(root)))
            other, = root.glob(pattern.replace(f"decoder/{one}/", f"decoder/{two}/"))
            mine, theirs = path.read_bytes(), other.read_bytes()
            path.write_bytes(theirs)
            other.write_bytes(mine)
    return mutate


def told(**changes):
    def mutate(root):
        path = root / "model_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return mutate


def one_element(parameter, index):
    def mutate(root):
        def flipped(array):
            array = array.copy()
            array[index] ^= 0x3F00
            return array
        edit(weights(root, parameter)[0], flipped)
    return mutate


def experts_exchanged(root):
    edit(weights(root, "decoder.3.pp_block.mlp.experts.merged_down_proj")[0], lambda array: array[::-1])


QKV, ATTENTION = [32, 16, 16], "decoder.{}.pp_block.attn.{}.weight"
CASES = {
    "k and v": ("llama", TP2, rows_exchanged(ATTENTION.format(1, "qkv_proj"), QKV, (0, 2, 1)),
                "layers.1.self_attn.k_proj", "decoder.1.pp_block.attn.qkv_proj"),
    "biases of k and v": ("qwen2", TP2, rows_exchanged("decoder.3.pp_block.attn.qkv_proj.bias", QKV, (0, 2, 1)),
                          "layers.3.self_attn.k_proj", "decoder.3.pp_block.attn.qkv_proj"),
    "rope taken for interleaved": ("llama", TP2, told(rope_interleaved=True), "layers.0.self_attn.q_proj",
                                   "SRC has heads in halves, DST heads interleaved"),
    "rope taken for halves": ("llama", (*TP2, "--rope", "interleaved"), told(rope_interleaved=False),
                              "layers.0.self_attn.q_proj", "decoder.0.pp_block.attn.qkv_proj"),
    "gate and up": ("llama", TP2, rows_exchanged("decoder.2.pp_block.mlp.gate_up_proj.weight", [48, 48], (1, 0)),
                    "layers.2.mlp.gate_proj", "decoder.2.pp_block.mlp.gate_up_proj"),
    "ranks of qkv": ("llama", TP2, ranks_exchanged(ATTENTION.format(2, "qkv_proj")), "layers.2.self_attn.q_proj",
                     "tensor-parallel rank"),
    "ranks of o": ("llama", TP2, ranks_exchanged(ATTENTION.format(2, "o_proj")), "layers.2.self_attn.o_proj",
                   "decoder.2.pp_block.attn.o_proj"),
    "ranks of gate and up": ("llama", TP2, ranks_exchanged("decoder.0.pp_block.mlp.gate_up_proj.weight"),
                             "layers.0.mlp.gate_proj", "decoder.0.pp_block.mlp.gate_up_proj"),
    "ranks of down": ("llama", TP2, ranks_exchanged("decoder.3.pp_block.mlp.down_proj.weight"),
                      "layers.3.mlp.down_proj", "decoder.3.pp_block.mlp.down_proj"),
    "ranks of the embedding": ("tied", (*TP2, "--vocab-multiple", 2), ranks_exchanged(
        "token_position_embeddings.pp_block.token_embedding.weight"), "embed_tokens", "token_embedding"),
    "ranks of the head": ("llama", TP2, ranks_exchanged("lm_head.pp_block.weight"), None, "lm_head"),
    "layers of two stages": ("llama", TP2, layers_exchanged(1, 3), "layers.1.input_layernorm",
                             "decoder.1.pp_block.input_layernorm"),
    "norm eps": ("llama", TP2, told(rms_norm_eps=1e-6), "layers.0.input_layernorm",
                 "SRC has rms_norm_eps 1e-05, DST rms_norm_eps 1e-06"),
    "rope theta": ("theta", TP2, told(rope_theta=10000.0), "layers.0.self_attn.q_turned",
                   "SRC has rope_theta 300, unscaled, heads in halves, DST rope_theta 10000,"),
    "layers without rope": ("smollm3", TP2, told(no_rope_layer=4), "layers.1.self_attn.q_turned",
                            "SRC has no rotary embedding"),
    "one row of a norm": ("llama", TP2, one_element("decoder.1.pp_block.post_attention_layernorm.weight", 5),
                          "layers.1.post_attention_layernorm", "post_attention_layernorm"),
    "the final norm": ("llama", TP2, one_element("final_layer_norm.pp_block.weight", 9), "norm", "final_layer_norm"),
    "one weight": ("llama", TP2, one_element("decoder.2.pp_block.mlp.down_proj.weight", (3, 4)),
                   "layers.2.mlp.down_proj", "feature 3, "),
    "experts": ("qwen2_moe", TP2, experts_exchanged, "layers.3.mlp.experts", "decoder.3.pp_block.mlp.experts"),
    "the router": ("qwen2_moe", TP2, rows_exchanged("decoder.1.pp_block.mlp.router.weight", [1, 5], (1, 0)),
                   "layers.1.mlp.gate", "router"),
    "the shared expert": ("qwen2_moe", TP2, rows_exchanged(
        "decoder.0.pp_block.mlp.shared_expert.gate_up_proj.weight", [20, 20], (1, 0)),
        "layers.0.mlp.shared_expert.gate_proj", "shared_expert.gate_up_proj")}
"""(model, flags, what goes wrong, step at which it shows, words of the message)."""


@pytest.mark.parametrize("case", CASES)
def test_what_went_wrong_is_found_where_it_is(converted, tmp_path, capsys, case):
    model, flags, mutate, step, words = CASES[case]
    source, whole = converted(model, *flags)
    shutil.copytree(whole, tmp_path / "nt")
    (tmp_path / "nt" / "stream_reshard.json").unlink()
    mutate(tmp_path / "nt")
    assert call("verify", source, tmp_path / "nt", "--forward", "--json", "--allow", "padding") == 5
    out, err = capsys.readouterr()
    forward = json.loads(out)["forward"]
    line = err.splitlines()[-1]
    assert not forward["agrees"] and words in line, line
    if step is None:
        assert forward["first_difference"] is None and "the logits differ" in line
    else:
        assert forward["first_difference"]["step"] == step and f"the first difference is at {step}: " in line
        before = [row for row in forward["layers"] if not row["first_difference"]]
        assert all(row["relative"] < 1e-4 for row in before if row["layer"] is not None)
    assert forward["logits"]["kl_mean"] > 0


@pytest.mark.parametrize("case", sorted({(model, flags) for model, flags, *_ in CASES.values()}), ids=str)
def test_nothing_is_found_where_nothing_went_wrong(converted, capsys, case):
    source, whole = converted(case[0], *case[1])
    assert call("verify", source, whole, "--forward", "--json") == 0
    forward = json.loads(capsys.readouterr().out)["forward"]
    assert forward["agrees"] and forward["first_difference"] is None
    assert max(row["relative"] for row in [*forward["layers"], forward["logits"]]) < 2e-5
    assert forward["logits"]["num_same_argmax"] == forward["num_tokens"]


@pytest.mark.parametrize("which, words", [(-1, None), (0, "which are not in order")], ids=["last", "first"])
def test_moved_layers_are_run_where_they_are_allowed(converted, tmp_path, which, words):
    """The last layer of stage 0 may stand on stage 1, as a template may have it; the first may not pass the others."""
    source, whole = converted("llama", *TP2)
    shutil.copytree(whole, tmp_path / "nt")
    decoder = tmp_path / "nt/model/model/decoder"
    moved = sorted(path for path in decoder.iterdir() if any(path.rglob("*pp-rank-0-of-2*")))[which]
    for path in moved.rglob("*pp-rank-0-of-2*"):
        path.rename(path.with_name(path.name.replace("pp-rank-0-of-2", "pp-rank-1-of-2")))
    if words:
        with pytest.raises(Refused, match=words):
            api.plan_forward(source, tmp_path / "nt", max_memory="8GiB", allow=("stages",))
        return
    plan = api.plan_forward(source, tmp_path / "nt", max_memory="8GiB", allow=("stages",))
    assert api.run_forward(plan).difference is None


def test_a_layer_on_a_wrong_stage_is_told(converted, tmp_path, capsys):
    """Its rank would look for a file that is not there."""
    source, whole = converted("llama", *TP2)
    shutil.copytree(whole, tmp_path / "nt")
    for path in (tmp_path / "nt/model/model/decoder/1").rglob("*pp-rank-0-of-2*"):
        path.rename(path.with_name(path.name.replace("pp-rank-0-of-2", "pp-rank-1-of-2")))
    with pytest.raises(Refused) as refused:
        api.plan_forward(source, tmp_path / "nt", max_memory="8GiB")
    assert refused.value.exit_code == 5 and len(refused.value.problems) == 8
    for problem in refused.value.problems:
        assert "decoder/1/" in str(problem)
        assert "stage 0 of Nanotron looks for it there; its files name stage 1" in str(problem)
    assert call("verify", source, tmp_path / "nt", "--forward") == 5
    assert "is on stage 1, Nanotron's balancing looks for it on stage 0" in capsys.readouterr().err
