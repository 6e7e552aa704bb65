"""Llama: the family that Nanotron's LlamaConfig and Qwen2Config express (nanotron/models/llama.py, qwen.py).

`half` and `pair` are the two dims of a head under rotary embedding, which rotates element (0, j) together with (1, j).
Hugging Face stores a head as (half, pair), Nanotron with `rope_interleaved` as (pair, half).
"""
from stream_reshard.model.architectures.base import Family
from stream_reshard.model.parameters import Row

_HF = "model.layers.{layer}."
_NT = "decoder.{layer}.pp_block."

EMBEDDING = Row("embedding", "vocab | hidden", "vocab", "model.embed_tokens.weight",
                "token_position_embeddings.pp_block.token_embedding.weight")
ATTENTION_NORM = Row("layers.{layer}.attention_norm", "hidden", None, _HF + "input_layernorm.weight",
                     _NT + "input_layernorm.weight")
ATTENTION_IN = (
    Row("layers.{layer}.attention.q", "heads half pair | hidden", "heads", _HF + "self_attn.q_proj.weight",
        _NT + "attn.qkv_proj.weight"),
    Row("layers.{layer}.attention.k", "kv_heads half pair | hidden", "kv_heads", _HF + "self_attn.k_proj.weight",
        _NT + "attn.qkv_proj.weight"),
    Row("layers.{layer}.attention.v", "kv_heads head_dim | hidden", "kv_heads", _HF + "self_attn.v_proj.weight",
        _NT + "attn.qkv_proj.weight"),
)
ATTENTION_OUT = Row("layers.{layer}.attention.o", "hidden | heads head_dim", "heads", _HF + "self_attn.o_proj.weight",
                    _NT + "attn.o_proj.weight")
MLP_NORM = Row("layers.{layer}.mlp_norm", "hidden", None, _HF + "post_attention_layernorm.weight",
               _NT + "post_attention_layernorm.weight")
MLP = (
    Row("layers.{layer}.mlp.gate", "ffn | hidden", "ffn", _HF + "mlp.gate_proj.weight",
        _NT + "mlp.gate_up_proj.weight"),
    Row("layers.{layer}.mlp.up", "ffn | hidden", "ffn", _HF + "mlp.up_proj.weight", _NT + "mlp.gate_up_proj.weight"),
    Row("layers.{layer}.mlp.down", "hidden | ffn", "ffn", _HF + "mlp.down_proj.weight", _NT + "mlp.down_proj.weight"),
)
FINAL = (
    Row("final_norm", "hidden", None, "model.norm.weight", "final_layer_norm.pp_block.weight"),
    Row("lm_head", "vocab | hidden", "vocab", "lm_head.weight", "lm_head.pp_block.weight"),
)

LLAMA = Family(
    name="llama",
    hugging_face_class="LlamaForCausalLM",
    model_type="llama",
    settings={"attention_bias": False, "mlp_bias": False},
    defaults={"bos_token_id": 1, "eos_token_id": 2},
    nanotron_configs=("LlamaConfig", "Qwen2Config"),
    rows=(EMBEDDING, ATTENTION_NORM, *ATTENTION_IN, ATTENTION_OUT, MLP_NORM, *MLP, *FINAL),
)
