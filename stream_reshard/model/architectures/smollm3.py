"""SmolLM3: Llama's tensors, tied; every n-th layer has no rotary embedding, which only Qwen2Config can express
(`no_rope_layer`, nanotron/models/qwen.py)."""
from stream_reshard.model.architectures.base import Family
from stream_reshard.model.architectures.llama import LLAMA

SMOLLM3 = Family(
    name="smollm3",
    hugging_face_class="SmolLM3ForCausalLM",
    model_type="smollm3",
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2000000.0,
              "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
    settings={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    nanotron_configs=("Qwen2Config",),
    rows=LLAMA.rows,
    tie_by_default=True,
)
