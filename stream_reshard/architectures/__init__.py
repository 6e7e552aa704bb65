"""Architectures: one small table per model family; a new family is its difference from an old one.

- base:  Family, and how it becomes a Model
- llama: Llama and what shares its modules (SmolLM2, TinyLlama, Vicuna ...)
- qwen2: Llama with biases on the query, key and value projections
- mistral: Llama's tensors, full attention
- qwen2_moe: Qwen2 with experts in place of the MLP
- smollm3: Llama's tensors, some layers without rotary embedding

A family is chosen by the class name that config.json itself gives, never by a name that people gave the model.
"""
from stream_reshard.architectures.base import Family, build_model
from stream_reshard.architectures.llama import LLAMA
from stream_reshard.architectures.mistral import MISTRAL
from stream_reshard.architectures.qwen2 import QWEN2
from stream_reshard.architectures.qwen2_moe import QWEN2_MOE
from stream_reshard.architectures.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.hugging_face_class: family for family in (LLAMA, QWEN2, MISTRAL, SMOLLM3, QWEN2_MOE)}
"""By the class name in config.json's `architectures`."""

UNSUPPORTED = {
    "Qwen3ForCausalLM": "its q_norm and k_norm weights have no place in Nanotron",
    "Olmo2ForCausalLM": "its q_norm and k_norm weights and its norm order have no place in Nanotron",
    "Gemma2ForCausalLM": "its norms, logit caps and embedding scale have no place in Nanotron",
    "MixtralForCausalLM": "a mixture of experts in this form has no place in Nanotron",
    "Qwen3MoeForCausalLM": "its q_norm and k_norm weights have no place in Nanotron",
    "DeepseekV3ForCausalLM": "its latent attention has no place in Nanotron",
    "Starcoder2ForCausalLM": "Nanotron's main branch no longer runs Starcoder2",
    "MambaForCausalLM": "Nanotron's main branch no longer runs Mamba",
    "Phi3ForCausalLM": "its projections are fused and its rope is scaled in ways Nanotron does not know",
}
"""Why a well-known class is refused, for a message that helps."""

__all__ = ["FAMILIES", "UNSUPPORTED", "Family", "build_model"]
