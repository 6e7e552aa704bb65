"""Hostile configs: whatever a key holds, one clear refusal, or the work is done; never anything between."""
import pytest
from running import call, deadline, said
from sources import edit_config, make_source

KEYS = """architectures model_type hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim vocab_size tie_word_embeddings max_position_embeddings rms_norm_eps rope_theta
    rope_scaling rope_parameters partial_rotary_factor initializer_range hidden_act bos_token_id eos_token_id
    pad_token_id attention_bias mlp_bias sliding_window use_sliding_window max_window_layers layer_types
    attention_dropout quantization_config num_local_experts num_experts qk_norm use_qk_norm qk_layernorm torch_dtype
    unknown""".split()
VALUES = ["null", "true", "false", "0", "-1", "1", "-0.0", "2.5", "1e999", "-1e999", "1e-320", "NaN", "9" * 4300,
          "9" * 4301, "[]", "{}", '""', '"16"', str(2**47 - 115), str(2**48), r'"\u001b[2J\n\r\u0000"', r'"\ud800"',
          '"%s"' % ("x" * 10**4), r'["\u001b[2J\n"]', r'{"rope_type":"\u001b[2J\n"}',
          r'{"type":"\ud800","factor":1e999}', '{"rope_theta":{}}', "[" * 900 + "]" * 900,
          '{"a":' * 900 + "0" + "}" * 900, "[%s]" % ",".join(["7"] * 9999), '["LlamaForCausalLM",5]',
          "{%s}" % ",".join(f'"{i}":0' for i in range(2000)), '[["LlamaForCausalLM"]]']
ALLOWED = ["--allow", "rope_scaling", "--allow", "partial_rotary_factor", "--allow", "sliding_window", "--allow",
           "hidden_act"]


@pytest.mark.parametrize("step", [pytest.param(2, id="half"), pytest.param(1, id="all", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("key", KEYS)
def test_value_in_a_config(tmp_path, capsys, key, step):
    """Whatever stands under a key that is read, it is refused with words, or taken. One key begins with the first value,
    the next with the second."""
    root, wrong = make_source(tmp_path / "hf"), []
    edit_config(root, {key: "HERE"})
    text = (root / "config.json").read_text()
    for i, value in list(enumerate(VALUES))[KEYS.index(key) % step::step]:
        (root / "config.json").write_text(text.replace('"HERE"', value))
        try:
            with deadline(30):
                code = call("plan", root, "--tp", "2", *(ALLOWED if i % 3 else []))
            assert code == (3 if said(capsys)[1] else 0), code
        except BaseException as error:
            wrong.append(f"{value:.40}: {type(error).__name__} {error!s:.300}")
    assert not wrong, "\n".join(wrong)


def test_many_keys_in_a_config(tmp_path, capsys):
    assert call("plan", make_source(tmp_path / "hf", config={f"k{i}": 0 for i in range(3000)})) == 0
    assert "not understood" in said(capsys)[0]
