"""Mistral: Llama's tensors and forward pass, if attention is full; Nanotron has no such sliding window."""
from stream_reshard.model.architectures.base import Family
from stream_reshard.model.architectures.llama import LLAMA

MISTRAL = Family(
    name="mistral",
    hugging_face_class="MistralForCausalLM",
    model_type="mistral",
    defaults=LLAMA.defaults | {"num_key_value_heads": 8, "max_position_embeddings": 131072},
    settings={"sliding_window": None},
    nanotron_configs=LLAMA.nanotron_configs,
    rows=LLAMA.rows,
)
